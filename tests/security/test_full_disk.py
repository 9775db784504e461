"""A host whose disk is full, of bytes or of files: new work is refused, what runs goes on or fails clearly, nothing is ruined, and it all comes back."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from server_fixture import Room, Server, free_port, leftovers, put_into, until
from tests.faults.workload import events
from tests.guest_drivers import QEMU, SETTINGS
from tests.guest_kernel import put_kernel
from tests.integration import oci_fixture as oci
from tests.integration.daemon_fixture import NEEDS_RUNSC

from innkeeper.host.linux import loop_device

pytestmark = [NEEDS_RUNSC]

DISK_MIB = 2_048
# The state directory and a server's first rooms take some hundred files of it.
DISK_FILES = 4_096
MIB = 1 << 20


class SmallDisk:
    """A file system of its own for a state directory, and whoever fills it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.mount = base / "disk"
        self._filler = self.mount / "somebody-elses"

    def make(self) -> None:
        image = self.base / "disk.img"
        self.mount.mkdir()
        subprocess.run(["truncate", "-s", f"{DISK_MIB}M", image], check=True)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", "-N", str(DISK_FILES), image], check=True)
        subprocess.run(["mount", "-o", "loop", image, self.mount], check=True)

    def free_bytes(self) -> int:
        found = os.statvfs(self.mount)
        return found.f_bavail * found.f_frsize

    def fill(self, *, leave: int = 0) -> None:
        self._filler.mkdir(exist_ok=True)
        with contextlib.suppress(OSError), (self._filler / "large").open("wb") as large:
            os.posix_fallocate(large.fileno(), 0, max(1, self.free_bytes() - leave - MIB))
        descriptor = os.open(self._filler / "rest", os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            while self.free_bytes() > leave:
                os.write(descriptor, bytes(4096))
        os.close(descriptor)

    def fill_with_files(self) -> None:
        self._filler.mkdir(exist_ok=True)
        number = 0
        with contextlib.suppress(OSError):
            while True:
                (self._filler / str(number)).touch()
                number += 1

    def clear(self) -> None:
        for path in self._filler.iterdir():
            path.unlink()

    def remove(self) -> None:
        deadline = time.monotonic() + 30
        while subprocess.run(["umount", self.mount], capture_output=True).returncode and time.monotonic() < deadline:
            time.sleep(0.2)
        # With it go the copies of the mount in namespaces of other programs, which would keep the loop device.
        self.mount.rmdir()
        until(lambda: not loop_device.devices_backed_by(self.base))
        subprocess.run(["rm", "-rf", self.base], check=True)


class ServerOnSmallDisk(Server):
    """Its log lies elsewhere: on a full disk nobody would read why."""

    @property
    def log_path(self) -> Path:
        return self.home.parents[1] / "log"


@pytest.fixture(scope="module")
def disk(driver: str) -> Iterator[SmallDisk]:
    """One for the server of each driver."""
    made = SmallDisk(Path(tempfile.mkdtemp(prefix="ikd", dir="/var/tmp")))
    made.make()
    yield made
    made.remove()


@pytest.fixture(scope="module")
def innkeeper(disk: SmallDisk, driver: str) -> Iterator[Server]:
    home = disk.mount / "home"
    home.mkdir(mode=0o755)
    put_into(home / "host", "base")
    (home / "host").chmod(0o700)
    if driver == QEMU:
        put_kernel(home / "host")
    settings = {
        **SETTINGS[driver],
        "INNKEEPER_IMAGES": "base",
        "INNKEEPER_KEEP_MACHINES": "false",
        # More than there is: what its guests write decides, as on a host that was given too little.
        "INNKEEPER_POOL_DISK_MB": "8192",
        "INNKEEPER_DISK_RESERVE_MB": "200",
    }
    running = ServerOnSmallDisk(home, free_port(), settings)
    try:
        running.start()
        yield running
    finally:
        if running.process is not None:
            running.stop()
    assert leftovers(running) == []
    with contextlib.closing(sqlite3.connect(home / "api" / "innkeeper.db")) as database:
        assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
    checked = subprocess.run(["xfs_repair", "-n", home / "host" / "pool.xfs"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr[-2000:]


@pytest.fixture
def room(innkeeper: Server) -> Iterator[Room]:
    """A room that has been at work, with something on its disk."""
    api = innkeeper.api()
    made = api.room(api.make_profile())
    assert made.output("echo precious > /home/user/kept; sync; cat /home/user/kept") == "precious"
    yield made
    innkeeper.api().room(made.profile_id, made.room_id).delete()


def refused(answer: object) -> None:
    """Clearly, in the dialect's shape."""
    assert answer.status_code == 503, answer.text  # type: ignore[attr-defined]
    body = answer.json()  # type: ignore[attr-defined]
    assert body["error"] == "service_unavailable"
    assert "disk is full" in body["message"] or "No available hosts" in body["message"], body


def writes(room: Room) -> bool:
    """Whether a command can write: a disk that failed is found out by the first one that cannot, and mounted anew by the next."""
    answer = room.post("rm -f /home/user/large && touch /home/user/t && sync")
    return answer.status_code == 200 and bool(answer.json()["result"]["exit_code"] == 0)


def works_again(innkeeper: Server, room: Room) -> None:
    assert (
        room.output("cat /home/user/kept; head -c 8388608 /dev/urandom > /home/user/more; sync; echo $?")
        == "precious\n0"
    )
    api = innkeeper.api()
    new = api.room(api.make_profile())
    assert new.output("echo new") == "new"
    assert new.delete().status_code == 204


@pytest.mark.microvms
def test_a_full_disk_refuses_what_is_new_and_comes_back(innkeeper: Server, disk: SmallDisk, room: Room) -> None:
    api = innkeeper.api()
    goes = api.room(room.profile_id)
    goes.create()
    disk.fill()
    assert disk.free_bytes() == 0
    for _ in range(3):
        refused(api.room(room.profile_id).client.post(api.room(room.profile_id).path))
        refused(room.post("touch /home/user/never"))
    # What needs no new space goes on, first of all what makes some.
    assert room.file("/home/user/kept", raw=1).text == "precious\n"
    assert len(api.client.get("/api/profiles").json()) > 0
    assert goes.delete().status_code == 204
    assert api.client.get("/api/profiles").status_code == 200
    assert "internal_error" not in innkeeper.log()
    disk.clear()
    works_again(innkeeper, room)
    assert room.run("ls /home/user/never")["result"]["exit_code"] != 0


@pytest.mark.microvms
def test_a_disk_without_room_for_files_refuses_likewise(innkeeper: Server, disk: SmallDisk, room: Room) -> None:
    disk.fill_with_files()
    api = innkeeper.api()
    refused(api.room(room.profile_id).client.post(api.room(room.profile_id).path))
    refused(room.post("touch /home/user/never"))
    disk.clear()
    works_again(innkeeper, room)


@pytest.mark.gvisor_only(reason="a microVM stands still until there is room: integration/test_daemon_full_pool.py")
def test_a_guest_that_fills_the_hosts_disk_loses_its_own_only(innkeeper: Server, disk: SmallDisk, room: Room) -> None:
    api = innkeeper.api()
    neighbour = api.room(room.profile_id)
    assert neighbour.output("echo neighbour > /home/user/kept; sync; echo $?") == "0"
    disk.fill(leave=64 * MIB)
    # Its own disk has 10 GiB, so it is the host's that ends. Output that cannot be kept ends a command too.
    answer = room.post(
        "dd if=/dev/urandom of=/home/user/large bs=1M count=400 conv=fsync; sync; echo $?; sleep 0.5", timeout=60
    )
    assert answer.status_code in (200, 503), answer.text
    if answer.status_code == 200:
        assert answer.json()["result"]["output"] != "0", answer.json()
    else:
        assert answer.json()["error"] in ("service_unavailable", "instance_failed"), answer.json()
    disk.clear()
    # The neighbour never noticed, or is restarted on its disk; so is the one that did it.
    for one, kept in ((neighbour, "neighbour"), (room, "precious")):
        until(lambda one=one: writes(one), seconds=30)  # type: ignore[misc]
        assert one.output("cat /home/user/kept") == kept
    works_again(innkeeper, room)


@pytest.mark.long
def test_a_server_starts_on_a_full_disk_and_has_everything_when_there_is_room(
    innkeeper: Server, disk: SmallDisk, room: Room
) -> None:
    disk.fill(leave=4096)
    innkeeper.stop()
    innkeeper.start()
    refused(innkeeper.api().room(room.profile_id, room.room_id).post("true"))
    disk.clear()
    again = innkeeper.api().room(room.profile_id, room.room_id)
    until(lambda: again.client.post(again.path).status_code == 200)
    works_again(innkeeper, again)


def begin_build(innkeeper: Server, name: str, step: str) -> tuple[str, Iterator[tuple[str, dict[str, Any]]]]:
    """A build of one step, and its events as they come."""
    client = innkeeper.client()
    body = {"name": name, "dockerfile": f"FROM base\nUSER root\nRUN {step}\n", "context": False, "cache": False}
    answer = client.post("/v1/image-builds", json=body)
    assert answer.status_code == 201, answer.text
    build_id = answer.json()["id"]

    def said() -> Iterator[tuple[str, dict[str, Any]]]:
        with client.stream("GET", f"/v1/image-builds/{build_id}/events") as stream:
            yield from events(stream)

    return build_id, said()


def ended(said: Iterator[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """How the build ended."""
    return next(body for kind, body in said if kind == "end")


@pytest.mark.gvisor_only(reason="the guests of builds are gVisor's whatever those of rooms are")
@pytest.mark.parametrize("when", ["in a step", pytest.param("in the export", marks=pytest.mark.long)])
def test_a_build_on_a_disk_that_fills_up_says_so_and_leaves_nothing(
    innkeeper: Server, disk: SmallDisk, when: str
) -> None:
    step = "echo begun; sleep 2; dd if=/dev/urandom of=/large bs=1M count=400 conv=fsync"
    _, said = begin_build(innkeeper, "filling:1", step if when == "in a step" else "echo begun")
    until_said = "begun" if when == "in a step" else "making the image"
    for _, body in said:
        if until_said in body.get("data", "") + body.get("text", ""):
            disk.fill(leave=8 * MIB)
            break
    end = ended(said)
    assert end["status"] == "failed", end
    # What a guest wrote and the host has no room for, the guest may hear of itself, or whoever keeps its disk.
    assert re.search("line 3: RUN|cannot keep the step|disk is full", end["error"]), end
    disk.clear()
    until(lambda: nothing_leaked(innkeeper))
    _, said = begin_build(innkeeper, "filling:1", "echo whole > /made")
    assert ended(said)["status"] == "ready"
    assert innkeeper.client().delete("/v1/images/filling:1").status_code == 204


def nothing_leaked(innkeeper: Server) -> bool:
    """Nothing of a build or an import is on the host any more, nor counted as a leak."""
    host = innkeeper.home / "host"
    half = [*host.glob("images/.build-*"), *host.glob("pool/steps/.copy-*")]
    return not half and innkeeper.inn("doctor", "--leaks").returncode == 0


@pytest.mark.gvisor_only(reason="no guest has part in an import")
@pytest.mark.skipif(oci.NEEDS_TOOLS, reason="needs skopeo and umoci")
def test_an_import_on_a_disk_that_fills_up_says_so_and_leaves_nothing(innkeeper: Server, disk: SmallDisk) -> None:
    content = oci.oci_archive([oci.layer([("file", oci.file(os.urandom(1 << 20)))])])
    client = innkeeper.client()

    def pieces() -> Iterator[bytes]:
        yield content[:1000]
        disk.fill(leave=8 * MIB)
        # Whoever watches over the space looks several times a second.
        for at in range(1000, len(content), 10_000):
            time.sleep(0.1)
            yield content[at : at + 10_000]

    with contextlib.suppress(httpx2.TransportError):
        # The server need not read what it has no room for.
        client.put("/v1/images/filling:2/archive", content=pieces())
    until(lambda: client.get("/v1/images/filling:2").json()["status"] != "building")
    image = client.get("/v1/images/filling:2").json()
    assert image["status"] == "failed" and "too little disk space" in image["last_error"], image
    # And one that comes now is not begun at all.
    client.put("/v1/images/filling:2/archive", content=content)
    until(lambda: client.get("/v1/images/filling:2").json()["status"] != "building")
    assert "too little disk space" in client.get("/v1/images/filling:2").json()["last_error"]
    disk.clear()
    until(lambda: nothing_leaked(innkeeper))
    client.put("/v1/images/filling:2/archive", content=content)
    until(lambda: client.get("/v1/images/filling:2").json()["status"] == "ready")
    assert client.delete("/v1/images/filling:2").status_code == 204
