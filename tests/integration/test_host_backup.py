"""The host's half of a backup: what a killed daemon leaves of it, and guests that come and go meanwhile."""

import asyncio
import fcntl
import io
import os
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests import leaks
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, running_host

from innkeeper.archive.manifest import HOST_MANIFEST, check, parse_manifest
from innkeeper.archive.members import END, Entry, members
from innkeeper.bus.contract import Data, Message
from innkeeper.core.host_verbs import BackupHost
from innkeeper.core.volume_verbs import AttachVolume, CreateVolume, DetachVolume, RemoveVolume
from innkeeper.errors import ConflictError
from innkeeper.host.linux import guest_written
from innkeeper.host.linux.freeze import FIFREEZE, frozen, thaw

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]


async def backed_up(host: Host, sizes: dict[str, int] | None = None) -> tuple[set[UUID], bytes]:
    staged: set[UUID] = set()
    data = bytearray()
    async with host.bus.open(host.daemon.host_id, BackupHost.verb, {}) as call:
        async for event in call.events():
            if isinstance(event, Message):
                staged.update(UUID(one) for one in event.body.get("staged", ()))
                if sizes is not None:
                    sizes.update(event.body.get("staged_volumes", {}))
            elif isinstance(event, Data):
                data += event.data
        await call.result()
    return staged, bytes(data)


def content(archive: bytes, facts: dict[str, Any] | None = None) -> dict[str, Entry]:
    found, manifest = {}, b""
    for member in members(io.BytesIO(archive + END)):
        if member.name == HOST_MANIFEST:
            manifest, _ = member.read(1 << 24)
        else:
            found[member.name] = member.save(None)
    told, expected = parse_manifest(manifest)
    check(found, expected)
    if facts is not None:
        facts.update(told)
    return found


async def test_what_is_in_it(host: Host, instance: UUID) -> None:
    done = await host.ok(instance, "echo said; echo 1 > file")
    staged, archive = await backed_up(host)
    assert instance in staged
    found = content(archive)
    disk = host.machine(instance).record.disk
    for name in (
        "host/host-id",
        f"host/images/{host.image.digest}.erofs",
        f"host/disks/{disk}.img",
        f"host/instances/{instance}/instance.json",
        f"host/instances/{instance}/reported",
        f"host/changes/{instance}/baseline",
        f"host/instances/{instance}/journals/{done.execution_id}.json",
        f"host/instances/{instance}/journals/{done.execution_id}.head",
        f"host/changes/{instance}/{done.execution_id}.changes",
    ):
        assert name in found, name
    assert found[f"host/disks/{disk}.img"].bytes < 64 << 20 < found[f"host/disks/{disk}.img"].size
    # The guest is as it was, and nothing is left of the copies.
    assert (await host.ok(instance, "echo 2 >> file; cat file")).text == "1\n2\n"
    assert (await host.status())["leaked"] == 0
    pool = host.settings.host_dir / "pool"
    assert [target for target in open_files() if target.startswith(str(pool)) and "(deleted)" in target] == []


async def test_volumes_are_in_it_as_they_were(host: Host, instance: UUID) -> None:
    attached, kept, written = uuid4(), uuid4(), uuid4()
    await host.request(CreateVolume(attached, 64))
    await host.request(AttachVolume(instance, attached, "/data"))
    await host.ok(instance, "echo first > /data/file")
    await host.request(CreateVolume(kept, 64, attached, immutable=True))
    await host.request(CreateVolume(written, 64))
    store = host.settings.host_dir / "pool" / "volumes"
    with (store / f"{written}.img").open("rb+") as image:
        guest_written.mark(image.fileno())
    sizes: dict[str, int] = {}
    try:
        _, archive = await backed_up(host, sizes)
        # Who writes it goes on.
        await host.ok(instance, "echo second >> /data/file; grep -c . /data/file")
    finally:
        await host.request(DetachVolume(instance, attached))
        for one in (attached, kept, written):
            await host.request(RemoveVolume(one))
    assert sizes == {str(one): 64 for one in (attached, kept, written)}
    facts: dict[str, Any] = {}
    found = content(archive, facts)
    names = {one: f"host/volumes/{one}.img" for one in (attached, kept, written)}
    assert all(found[name].size == 64 << 20 for name in names.values())
    assert (facts["guest_written"], facts["immutable"]) == ([names[written]], [names[kept]])
    for one in (attached, kept):
        assert notes_in(archive, names[one]) == b"first\n"


def notes_in(archive: bytes, name: str) -> bytes:
    """The file `file` of a file system that is a member of an archive."""
    said = b""
    for member in members(io.BytesIO(archive + END)):
        if member.name != name:
            member.save(None)
            continue
        with TemporaryDirectory() as folder, Path(folder, "disk").open("wb+") as disk:
            member.save(disk.fileno())
            said = subprocess.run(["debugfs", "-R", "cat /file", disk.name], capture_output=True, check=True).stdout
    return said


def open_files() -> list[str]:
    found = []
    for descriptor in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names only
        try:
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115 - not a path
        except FileNotFoundError:
            continue
    return found


async def test_one_at_a_time_and_none_after_its_reader_went(host: Host, instance: UUID) -> None:
    async with host.bus.open(host.daemon.host_id, BackupHost.verb, {}) as call:
        async for event in call.events():
            if isinstance(event, Message) and "estimate_bytes" in event.body:
                break
        with pytest.raises(ConflictError):
            await backed_up(host)
    async with asyncio.timeout(30):
        while True:
            try:
                await backed_up(host)
            except ConflictError:
                await asyncio.sleep(0.05)
            else:
                break
    await host.ok(instance, "true")


async def test_guests_that_come_and_go_meanwhile(host: Host) -> None:
    kept = [await host.ensure() for _ in range(2)]

    async def come_and_go() -> None:
        for _ in range(3):
            guest = await host.ensure()
            await host.ok(guest, "echo x > x")
            await host.destroy(guest)

    moving = asyncio.ensure_future(come_and_go())
    while not moving.done():
        staged, archive = await backed_up(host)
        assert set(kept) <= staged
        found = content(archive)
        assert {str(one) for one in staged} == {name.split("/")[2] for name in found if name.endswith("instance.json")}
    await moving
    for guest in kept:
        await host.ok(guest, "echo still > here")
        await host.destroy(guest)


async def test_a_disk_that_a_killed_daemon_left_frozen_thaws(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("home")
    async with running_host(home, keep_running=True) as first:
        instance, lost = await first.ensure(), await first.ensure()
        disks = [
            first.settings.host_dir / "mounts" / "machines" / first.machine(one).id / "disk" for one in (instance, lost)
        ]
        (first.machine(lost).state_dir / "machine.json").write_text("{")
    for disk in disks:
        descriptor = os.open(disk, os.O_RDONLY)
        fcntl.ioctl(descriptor, FIFREEZE, 0)
        os.close(descriptor)
    try:
        async with asyncio.timeout(60), running_host(home) as second:
            assert second.daemon.recovered.adopted == 1
            assert (await second.ok(instance, "echo thawed > file; sync; cat file")).text == "thawed\n"
            await second.ensure(lost)
            await second.ok(lost, "true")
    finally:
        for disk in disks:
            thaw(disk)
    assert leaks.wait_for_none(home) == []


def test_the_hosts_own_file_system_is_never_frozen(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no file system is mounted there"), frozen(tmp_path):
        pass
    assert not thaw(tmp_path)
    assert not thaw(tmp_path / "absent")
