"""Power that goes away in the middle of writing: the disk's journal holds, and what a guest had synced is whole."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from server_fixture import Room, Server, server, until
from tests.faults.test_reboot import reboot
from tests.faults.workload import events

from innkeeper.host.disks.disk_template import reflink
from innkeeper.host.linux import guest_written, loop_device, mounts

INSTANTS = 3
LONG_INSTANTS = 12
# What is looked through at each instant has a bound: without one, looking takes the longer the longer it took before.
KEPT_FILES = 150
# Files of random size, each named by its digest, which is said after its data and its name were synced. Of more than argv[1] the oldest goes; `-digest` is
# said before it does.
WRITER = """
import hashlib, os, random, sys
os.makedirs("synced", exist_ok=True)
directory = os.open("synced", os.O_RDONLY)
names = []
while True:
    if len(names) > int(sys.argv[1]):
        print("-" + names[0], flush=True)
        os.unlink("synced/" + names.pop(0))
    data = os.urandom(random.choice([32, 4096, 70_000, 1_500_000]))
    name = hashlib.sha256(data).hexdigest()
    with open(f"synced/.{name}", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(f"synced/.{name}", f"synced/{name}")
    os.fsync(directory)
    print(name, flush=True)
    names.append(name)
"""
# Beside it, writes that nobody syncs: the journal is busy with them.
NOISE = (
    "while :; do head -c 3000000 /dev/urandom > noise.$((i++ % 20)); mkdir -p d/$i; rm -rf d; done > /dev/null 2>&1 &"
)


class Writer:
    """Reads what a guest says to have synced, as it says it; the guest keeps the newest `keep` files."""

    def __init__(self, room: Room, keep: int) -> None:
        self.synced: list[str] = []
        self.gone: set[str] = set()
        # Whatever else it says: why it goes on no more.
        self.wrong: list[str] = []
        self._room = room
        self._keep = keep
        self._thread = threading.Thread(target=self._read, daemon=True)

    def start(self) -> None:
        self._room.put("/home/user/writer.py", WRITER.encode())
        self._room.output(NOISE)
        self._thread.start()
        deadline = time.monotonic() + 60
        while len(self.synced) < 5:
            assert time.monotonic() < deadline, "the guest writes nothing"
            time.sleep(0.05)

    def _read(self) -> None:
        headers = {"Accept": "text/event-stream"}
        body = {"command": f"python3 writer.py {self._keep}", "timeout": 600}
        rest = ""
        with (
            # The server is killed below it.
            contextlib.suppress(httpx2.HTTPError),
            self._room.client.stream("POST", f"{self._room.path}/command", json=body, headers=headers) as answer,
        ):
            for kind, said in events(answer):
                if kind == "output":
                    *whole, rest = (rest + said["data"]).split("\n")
                    self.gone |= {line[1:] for line in whole if line.startswith("-")}
                    self.synced += [line for line in whole if re.fullmatch("[0-9a-f]{64}", line)]
                    self.wrong += [line for line in whole if not re.fullmatch("-?[0-9a-f]{64}", line)]


@pytest.fixture(scope="module")
def powered(driver: str) -> Iterator[Server]:
    with server("base", driver=driver) as running:
        yield running


@pytest.fixture(params=[KEPT_FILES])
def writing(powered: Server, request: pytest.FixtureRequest) -> Iterator[Writer]:
    api = powered.api()
    room = api.room(api.make_profile(disk_mb=2048))
    room.create()
    writer = Writer(room, request.param)
    writer.start()
    yield writer
    Room(powered.client(), room.profile_id, room.room_id).delete()


def test_a_disk_as_it_was_at_any_instant_of_writing_is_whole(powered: Server, writing: Writer, tmp_path: Path) -> None:
    check_instants(powered, writing, tmp_path, INSTANTS)


@pytest.mark.long
def test_a_disk_as_it_was_at_many_instants_of_writing_is_whole(
    powered: Server, writing: Writer, tmp_path: Path
) -> None:
    check_instants(powered, writing, tmp_path, LONG_INSTANTS)


def check_instants(powered: Server, writing: Writer, tmp_path: Path, count: int) -> None:
    (disk,) = disks_of_rooms(powered)
    replayed, held = 0, 0
    for number in range(count):
        time.sleep(0.3)
        before = [name for name in list(writing.synced) if name not in writing.gone]
        # What the loop device has given to its file and no more: the copy shares its blocks at one instant, as a disk that loses power keeps them.
        copy = disk.with_name(f"copy-{number}.raw")
        reflink(disk, copy)
        # This virtual machine is the test's own: the host looks at what it wrote.
        with contextlib.suppress(OSError):
            os.removexattr(copy, guest_written.ATTRIBUTE)
        try:
            replayed += b"needs_recovery" in subprocess.run(["dumpe2fs", "-h", copy], capture_output=True).stdout
            held += verify(copy, before, writing, tmp_path / "mounted")
        finally:
            copy.unlink()
    removed = f"{len(writing.gone)} of {len(writing.synced)} removed meanwhile"
    print(f"{count} instants: {replayed} journals replayed, {held} synced files whole, {removed}")
    # A disk that needs no recovery was not caught in the middle of anything.
    assert replayed > 0


def verify(image: Path, synced: list[str], writing: Writer, target: Path) -> int:
    """Mount the image, which replays its journal; what was synced must be whole, and the file system clean. How many files there were."""
    checked = 0
    target.mkdir(exist_ok=True)
    with loop_device.attach(image) as device:
        mounts.mount(device.path, target, "ext4", mounts.MS_NODEV | mounts.MS_NOSUID)
    try:
        folder = target / "u" / "home" / "user" / "synced"
        # A file that is newer than the image was said: so was whatever went before the image was made.
        until(lambda: writing.wrong or not (folder / writing.synced[-1]).exists())
        assert writing.wrong == []
        for name in synced:
            if name in writing.gone:
                continue
            checked += 1
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == name, f"{name} is not what was synced"
    finally:
        asyncio.run(mounts.umount_tree(target))
        # With the mount point go the copies of the mount that other programs' namespaces have.
        target.rmdir()
    asyncio.run(loop_device.wait_unused(image))
    found = subprocess.run(["e2fsck", "-f", "-n", image], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    return checked


def disks_of_rooms(powered: Server) -> list[Path]:
    pool = powered.home / "host" / "pool" / "disks"
    return [
        pool / f"{json.loads(path.read_text())['disk']}.img"
        for path in (powered.home / "host" / "instances").glob("*/instance.json")
    ]


@pytest.mark.parametrize("writing", [1_000_000], indirect=True)
def test_a_room_whose_disk_lost_what_was_not_synced_goes_on(powered: Server, writing: Writer) -> None:
    """As above, through the product: the room's disk becomes what it was at an instant of writing, while everything was killed."""
    room = writing._room
    (disk,) = disks_of_rooms(powered)
    before = list(writing.synced)
    copy = disk.with_name("instant.raw")
    reflink(disk, copy)
    reboot(powered)
    # The reboot above unmounts, which writes back; a power loss does not. So the disk is put back to the instant before it.
    pool = powered.home / "host" / "pool"
    with loop_device.attach(powered.home / "host" / "pool.xfs") as device:
        mounts.mount(device.path, pool, "xfs")
    copy.replace(disk)
    asyncio.run(mounts.umount_tree(pool))
    powered.start()
    again = Room(powered.client(), room.profile_id, room.room_id)
    sums = again.output("cd synced && sha256sum -- *").splitlines()
    found = {line.split("  ")[1]: line.split("  ")[0] for line in sums}
    assert all(found.get(name) == name for name in before), "a file that was synced is not whole"
    print(f"{len(before)} synced files whole after a power loss")
    again.output("echo goes on > file && sync && cat file")
