"""Rows about VMs that are suspended, resumed and forked, and about their volumes, over HTTP: microVMs beside gVisor guests, in turn.

The server is one of its own with a kernel for microVMs, which the other rows' server has not.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from tests.integration.image_fixture import put_into

from bench.drivers import DRIVERS, QEMU, home_for_both
from bench.rows import Budget, Row
from bench.server import Server

MEMORY_MB = 256
FORKS = 10
VOLUME_MB = 2_048
FILE_MB = 256
SETTINGS = {"INNKEEPER_TCG_COUNTS_AS_MICROVM": "true", "INNKEEPER_ROOM_WAIT_SECONDS": "120"}
# Prints megabytes per second: written, with what it takes to have all of it on the disk, and read again.
TRANSFER = """
import os, sys, time
piece, pieces = os.urandom(1 << 20), int(sys.argv[1])
began = time.perf_counter()
with open(sys.argv[2], "wb", buffering=0) as file:
    for _ in range(pieces): file.write(piece)
    os.fsync(file.fileno())
wrote = time.perf_counter() - began
with open(sys.argv[2], "rb", buffering=0) as file:
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began, buffer = time.perf_counter(), bytearray(1 << 20)
    while file.readinto(buffer): pass
print(pieces * 1.048576 / wrote, pieces * 1.048576 / (time.perf_counter() - began))
os.unlink(sys.argv[2])
"""


def measure(*, tries: int) -> list[Row]:
    """VMs of 256 MB and one processor in which an interpreter waits; each driver's samples are taken in turn."""
    rows: dict[str, Row] = {}
    with home_for_both() as home:
        put_into(home / "host", "base")
        server = Server(home, **SETTINGS)
        try:
            server.start()
            for driver in DRIVERS:
                _warm(server, driver)
            for _ in range(tries):
                for driver in DRIVERS:
                    _suspended(server, rows, driver)
            for _ in range(max(2, tries // 3)):
                for driver in DRIVERS:
                    _forked(server, rows, driver)
            for driver in DRIVERS:
                _volume(server, rows, driver, tries=max(3, tries // 3))
        finally:
            server.stop()
    return list(rows.values())


def _title(driver: str) -> str:
    return "microVM" if driver == QEMU else "gVisor"


def _row(rows: dict[str, Row], driver: str, name: str, title: str, *more: Any) -> Row:
    key = f"{driver}-{name}"
    return rows.setdefault(key, Row(key, f"{_title(driver)}: {title}", *more))


def _vm(server: Server, driver: str, **more: Any) -> str:
    wanted = {"driver": driver, "min_isolation": "none", "memory_mb": MEMORY_MB, "vm_lifetime_seconds": 3_600}
    return str(server.request("POST", "/v1/vms?wait=true", {**wanted, **more})["vm_id"])


def _warm(server: Server, driver: str) -> None:
    # The first of a kind makes what the next ones are started from.
    vm = _vm(server, driver)
    server.request("POST", "/execute", {"vm_id": vm, "code": "x = 1"})
    server.request("DELETE", f"/v1/vms/{vm}")


def _suspended(server: Server, rows: dict[str, Row], driver: str) -> None:
    vm = _vm(server, driver)
    server.request("POST", "/execute", {"vm_id": vm, "code": "x = 1"})
    # As it is when nobody has asked it for a while.
    time.sleep(1)
    budget = Budget(150)
    _row(rows, driver, "suspend", "suspend, to its answer", "ms", budget).take(
        lambda: server.request("POST", f"/v1/vms/{vm}/suspend")
    )
    budget = Budget(250 if driver == QEMU else 450)
    _row(rows, driver, "resume", "resume, to ready", "ms", budget).take(
        lambda: server.request("POST", f"/v1/vms/{vm}/resume")
    )
    server.request("POST", f"/v1/vms/{vm}/suspend")
    _row(rows, driver, "wake", "a cell that wakes it, with its interpreter as it was").take(
        lambda: _expect(server.request("POST", "/execute", {"vm_id": vm, "code": "print(x)"}), "1")
    )
    server.request("DELETE", f"/v1/vms/{vm}")


def _expect(answer: Any, printed: str) -> None:
    if answer["stdout"].strip() != printed:
        raise RuntimeError(f"it printed {answer['stdout']!r}")


def _forked(server: Server, rows: dict[str, Row], driver: str) -> None:
    vm = _vm(server, driver)
    made: list[Any] = []
    _row(rows, driver, "fork", f"fork of {FORKS}, all of them ready").take(
        lambda: made.extend(server.request("POST", f"/v1/vms/{vm}/fork", {"count": FORKS})["vms"])
    )
    for one in [vm, *(fork["vm_id"] for fork in made if fork["vm_id"])]:
        server.request("DELETE", f"/v1/vms/{one}")
    failed = [fork["error"] for fork in made if fork["error"]]
    if failed:
        raise RuntimeError(f"{len(failed)} of {FORKS} forks failed: {failed[0]}")


def _volume(server: Server, rows: dict[str, Row], driver: str, *, tries: int) -> None:
    volume = server.request("POST", "/v1/volumes", {"name": f"bench-{driver}", "quota_bytes": VOLUME_MB << 20})["id"]
    vm = _vm(server, driver, volumes=[{"volume_id": volume, "mount_path": "/data", "mode": "rw"}])
    found = [
        _row(rows, driver, f"volume-{name}", f"{FILE_MB} MB {title} a volume", "MB/s", Budget(at_least=True))
        for name, title in (("write", "written and synced to"), ("read", "read from"))
    ]
    host = server.home / "host" / "pool" / "bench"
    for _ in range(tries):
        body = {"argv": ["python3", "-c", TRANSFER, str(FILE_MB), "/data/file"], "timeout": 300}
        inside = server.request("POST", f"/v1/vms/{vm}/exec", body)["stdout"]
        outside = subprocess.run(
            [sys.executable, "-c", TRANSFER, str(FILE_MB), str(host)], check=True, capture_output=True, text=True
        ).stdout
        for row, value, peer in zip(found, inside.split(), outside.split(), strict=True):
            row.values.append(float(value))
            row.peer("the host's own disk").values.append(float(peer))
    server.request("DELETE", f"/v1/vms/{vm}")
    server.request("DELETE", f"/v1/volumes/{volume}")
