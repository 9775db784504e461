"""Counts what exists on the machine in a server's name, by looking at the machine, and says what no record accounts for.

Written without the product's own leak search, so that neither can hide the other's mistake.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import subprocess
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from uuid import UUID

from server_fixture import CONTROL_GROUPS, all_pids, command_line
from tests.leaks import server_id

# Slots that are ready ahead, and one batch that is on its way in or out.
SPARE_SLOTS = 4
PATIENCE_SECONDS = 30.0
TEMPORARY = re.compile(r".*\.new|\.(template|pool|reflink|build|copy|inventory|inn-probe)-.*")


def unaccounted(home: Path, *, instances: Collection[str] | None = None) -> list[str]:
    """One line per thing that belongs to no machine, disk or image of the records below `home`. The server may be up or down.

    `instances` are the ids of those that live; without them the database is asked.
    """
    host = home / "host"
    records = dict(_records(host))
    machines = set(records)
    return sorted(
        [
            *_processes(home, machines),
            *_groups(home, machines),
            *_mounts(host, machines),
            *_loop_devices(home),
            *_disks(host, records),
            *_namespaces(home, records),
            *_slot_elements(home),
            *_folders(host, machines, _alive(home) if instances is None else set(instances)),
            *_temporary_files(host),
        ]
    )


def wait_for_none(home: Path, *, instances: Collection[str] | None = None) -> list[str]:
    """`unaccounted`, asked again while pools are filled and guests are taken apart.

    At the end what was found twice: a look takes seconds on a busy machine, and guests come up and go down during it.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    found = before = unaccounted(home, instances=instances)
    while found and time.monotonic() < deadline:
        time.sleep(0.2)
        now = unaccounted(home, instances=instances)
        found, before = [line for line in now if line in before], now
    return found


def runsc_pids(home: Path, kind: str = "") -> list[int]:
    """The server's runsc processes; `kind` is `sandbox` or `gofer`."""
    mark = os.fsencode(home) + b"/"
    name = f"runsc-{kind}".encode() if kind else b"runsc"
    return [pid for pid in all_pids() if mark in (line := command_line(pid)) and line.startswith(name)]


def groups_in(name: str) -> Iterator[Path]:
    """The control groups in each group of that name. Not by a glob, which fails where one goes that it is looking at: other servers have some, too."""
    for folder, names, _ in os.walk(CONTROL_GROUPS):
        if os.path.basename(folder) == name:  # noqa: PTH119 - thousands of them
            yield from (Path(folder, one) for one in names)


def vm_pids(home: Path) -> list[int]:
    """The server's QEMU processes."""
    found: set[int] = set()
    for group in groups_in(f"innkeeper-{server_id(home)}-vm"):
        with contextlib.suppress(OSError):
            found |= {int(pid) for pid in (group / "cgroup.procs").read_text().split()}
    return sorted(found)


def _records(host: Path) -> Iterator[tuple[str, dict[str, object]]]:
    for folder in (host / "machines").iterdir():
        record: dict[str, object] = {}
        # Without one it is on its way up or down: its folder accounts for what it has.
        with contextlib.suppress(OSError, ValueError):
            record = json.loads((folder / "machine.json").read_text())
        yield folder.name, record


def _processes(home: Path, machines: set[str]) -> Iterator[str]:
    mark = os.fsencode(home) + b"/"
    scanners = 0
    for pid in all_pids():
        line = command_line(pid)
        if mark not in line or pid == os.getpid():
            continue
        text = line.replace(b"\0", b" ").decode(errors="replace")
        if b"inn-agent" in line and line.rstrip(b"\0").endswith(b"scan"):
            scanners += 1
            if scanners > 1:
                yield f"second scanner {pid}"
        elif b"runsc" in line and not any(machine.encode() in line for machine in machines):
            yield f"process {pid}: {text[:300]}"
    # What runs in a microVM's group is QEMU, which names no path of the host.
    for group in groups_in(f"innkeeper-{server_id(home)}-vm"):
        with contextlib.suppress(OSError):
            if group.name not in machines and (pids := (group / "cgroup.procs").read_text().split()):
                yield f"processes {pids} of {group.name}"


def _groups(home: Path, machines: set[str]) -> Iterator[str]:
    for group in (f"innkeeper-{server_id(home)}", f"innkeeper-{server_id(home)}-vm"):
        yield from (f"control group {path}" for path in groups_in(group) if path.name not in machines)
    # Of imports: while one goes on there are some.
    yield from (f"control group {path}" for path in groups_in(f"innkeeper-{server_id(home)}-imports"))


def _mounts(host: Path, machines: set[str]) -> Iterator[str]:
    # Not the product's parser; the paths have no spaces here.
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        target = line.split(" ")[4]
        found = re.fullmatch(rf"{re.escape(str(host))}/mounts/(?:machines|volumes)/([^/]+)/.*", target)
        if found and found[1] not in machines:
            yield f"mount {target}"
    # The folder is made by the first sandbox.
    for path in (host / "mounts" / "volumes").glob("*"):
        if path.name not in machines:
            yield f"hub of {path.name}"


def _loop_devices(home: Path) -> Iterator[str]:
    mounted = {line.split(" - ")[1].split(" ")[1] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = file.read_text().strip()
        except OSError:
            continue
        device = f"/dev/{file.parts[3]}"
        if backing.startswith(f"{home}/") and (device not in mounted or backing.endswith("(deleted)")):
            yield f"loop device {device} of {backing}"


def _disks(host: Path, records: dict[str, dict[str, object]]) -> Iterator[str]:
    owned = {record.get("disk", machine) for machine, record in records.items()}
    for path in (host / "instances").glob("*/instance.json"):
        owned.add(json.loads(path.read_text())["disk"])
    for disk in (host / "pool" / "disks").iterdir():
        if disk.stem not in owned:
            yield f"disk {disk.name}"


def _namespaces(home: Path, records: dict[str, dict[str, object]]) -> Iterator[str]:
    prefix = f"ik{server_id(home)}-s"
    names = [name for name in _names(Path("/run/netns")) if name.startswith(prefix)]
    newer = dict(_records(home / "host"))
    held = {record.get("slot_index") for record in (*records.values(), *newer.values())}
    spare = [name for name in names if int(name.removeprefix(prefix)) not in held]
    if len(spare) > SPARE_SLOTS:
        yield f"network namespaces {sorted(spare)}, of which {SPARE_SLOTS} may be ready ahead"


def _slot_elements(home: Path) -> Iterator[str]:
    """Elements of nft sets, and interfaces, of slots whose namespace is gone."""
    router = f"ik{server_id(home)}-router"
    existing = {
        name.rpartition("-s")[2] for name in _names(Path("/run/netns")) if name.startswith(f"ik{server_id(home)}-s")
    }
    enter = ["nsenter", f"--net=/run/netns/{router}"]
    rules = subprocess.run([*enter, "nft", "list", "ruleset"], capture_output=True, text=True).stdout
    for body in re.findall(r"elements = \{([^}]*)\}", rules):
        for name in re.findall(r'"s(\d+)"', body):
            if name not in existing:
                yield f"nft element of slot {name}"
    links = subprocess.run([*enter, "ip", "-o", "link"], capture_output=True, text=True).stdout
    for name in re.findall(r"^\d+: s(\d+)@", links, re.MULTILINE):
        if name not in existing:
            yield f"interface of slot {name}"


def _alive(home: Path) -> set[str]:
    with contextlib.closing(sqlite3.connect(home / "api" / "innkeeper.db")) as database:
        rows = database.execute("select id from instances where state != 'destroyed'").fetchall()
    return {str(UUID(row)) for (row,) in rows}


def _folders(host: Path, machines: set[str], instances: set[str]) -> Iterator[str]:
    for name in _names(host / "instances"):
        if name not in instances:
            yield f"folder of instance {name}"
    for name in _names(host / "changes"):
        if name not in instances and name not in machines:
            yield f"baselines of {name}"


def _temporary_files(host: Path) -> Iterator[str]:
    for folder, below, files in os.walk(host):
        if Path(folder) == host:
            # The trees of guests and images, in which there may be any name, and very many.
            below.remove("mounts")
        in_trash = Path(folder) == host / "trash"
        yield from (
            f"temporary file {folder}/{name}" for name in (*below, *files) if in_trash or TEMPORARY.fullmatch(name)
        )


def _names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]
