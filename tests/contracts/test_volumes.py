"""The driver contract's verbs for volumes, on every driver that has them: one guest for all of it, with the real agent."""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.contracts.drivers import KINDS, LINK_SECONDS, Guest, Kind, Lab, lab

from innkeeper.core.leak import LeakKind
from innkeeper.errors import (
    ConflictError,
    FileMissingError,
    GuestError,
    InnkeeperError,
    InstanceNotFoundError,
    NotHereError,
)
from innkeeper.host.disks.disk_template import mkfs_argv, reflink
from innkeeper.host.drivers.contract import Attaching, Capabilities, VolumeDisk, attaching
from innkeeper.host.guest_link import GuestInputError
from innkeeper.host.linux import command, guest_written, loop_device, mounts
from innkeeper.host.linux.subreaper import OrphanReaper, become_subreaper

pytestmark = pytest.mark.anyio

PATIENCE_SECONDS = 60.0


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(kind, id=kind.name, marks=[*kind.marks, *([] if kind is KINDS[0] else [pytest.mark.long])])
        for kind in KINDS
    ],
)
async def server(
    anyio_backend: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Lab]:
    kind: Kind = request.param
    if kind.missing is not None:
        pytest.skip(kind.missing)
    become_subreaper()
    with OrphanReaper().running():
        async with lab(kind, tmp_path_factory.mktemp(kind.name)) as there:
            if not there.driver.capabilities.volumes:
                pytest.skip("this driver has no volumes")
            yield there


@pytest.fixture(scope="module")
async def guest(server: Lab) -> Guest:
    return await server.start()


@pytest.fixture
def driver(server: Lab) -> Attaching:
    return attaching(server.driver)


@pytest.fixture
async def volume(server: Lab, guest: Guest, driver: Attaching) -> AsyncIterator[VolumeDisk]:
    """An empty volume of 64 MiB, which the guest has not got at the end."""
    there = await make(server)
    yield there
    await guest.run("pkill -x sleep")
    await take(guest, driver, there, force=True)
    there.image.unlink()


async def make(server: Lab) -> VolumeDisk:
    image = server.pool.directory / f"{secrets.token_hex(4)}.img"
    await command.run(mkfs_argv(image, 64))
    return VolumeDisk(secrets.token_hex(16), image, read_only=False)


async def ask(guest: Guest, verb: str, volume: VolumeDisk, path: str = "/data") -> None:
    params = {"volume": volume.name, "path": path, "read_only": volume.read_only}
    await guest.endpoint.request(verb, params, timeout_seconds=LINK_SECONDS)


async def bring(guest: Guest, driver: Attaching, volume: VolumeDisk, path: str = "/data") -> None:
    await driver.attach(guest.id, volume)
    await ask(guest, "mount_volume", volume, path)


async def take(
    guest: Guest, driver: Attaching, volume: VolumeDisk, path: str = "/data", *, force: bool = False
) -> None:
    """As the daemon does it: the guest lets go, then it is taken away, and the guest looks again."""
    try:
        await ask(guest, "unmount_volume", volume, path)
    except InnkeeperError:
        if not force:
            raise
    await driver.detach(guest.id, volume)
    await ask(guest, "unmount_volume", volume, path)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await driver.has_let_go(guest.id, volume):
            await asyncio.sleep(0.05)


async def test_what_is_written_is_on_the_volume_and_there_when_it_comes_again(
    guest: Guest, driver: Attaching, volume: VolumeDisk
) -> None:
    for _ in range(2):
        await bring(guest, driver, volume)
    assert await guest.run("echo kept > /data/file && mkdir /data/folder && sync") == (0, "")
    assert (await guest.run("test $(stat -f -c %b /data) -lt 20000"))[0] == 0, "that is another file system"
    for _ in range(2):
        await take(guest, driver, volume)
    assert (await guest.run("test -e /data"))[0] != 0
    assert loop_device.devices_backed_by(volume.image) == {}
    await bring(guest, driver, volume, "/deep/er/data")
    assert await guest.run("cat /deep/er/data/file") == (0, "kept\n")
    await take(guest, driver, volume, "/deep/er/data")


async def test_a_volume_that_is_full_is_full_for_its_guest_and_nobody_else(
    guest: Guest, driver: Attaching, volume: VolumeDisk
) -> None:
    await bring(guest, driver, volume)
    exit_code, text = await guest.run("dd if=/dev/urandom of=/data/large bs=1M count=100", seconds=90)
    assert (exit_code, "No space left on device" in text) == (1, True)
    assert await guest.run("echo more > /root/more && cat /root/more") == (0, "more\n")
    assert await guest.run("rm /data/large && echo again > /data/small && cat /data/small") == (0, "again\n")
    await take(guest, driver, volume)


async def test_one_that_may_only_be_read_cannot_be_written(
    server: Lab, guest: Guest, driver: Attaching, volume: VolumeDisk
) -> None:
    await bring(guest, driver, volume)
    await guest.run("echo kept > /data/file")
    await take(guest, driver, volume)
    before = volume.image.read_bytes()
    only_read = VolumeDisk(volume.name, volume.image, read_only=True)
    await bring(guest, driver, only_read)
    assert await guest.run("cat /data/file") == (0, "kept\n")
    for line in (
        "echo x > /data/file",
        "touch /data/new",
        "rm /data/file",
        "mount -o remount,rw /data && touch /data/x",
    ):
        assert (await guest.run(f"{line} 2>/dev/null"))[0] != 0, line
    await take(guest, driver, only_read)
    assert volume.image.read_bytes() == before


async def test_a_guest_that_uses_it_keeps_it_and_says_who_does(
    guest: Guest, driver: Attaching, volume: VolumeDisk
) -> None:
    await bring(guest, driver, volume)
    await guest.run("(cd /data; exec sleep 1000) > /dev/null 2>&1 & until pgrep -x sleep; do sleep 0.1; done")
    with pytest.raises(GuestError, match=r"busy: the volume is in use: sleep \(\d+\)"):
        await ask(guest, "unmount_volume", volume)
    assert await guest.run("echo still > /data/file && cat /data/file") == (0, "still\n")
    await guest.run("pkill -x sleep; while pgrep -x sleep; do sleep 0.1; done")
    await take(guest, driver, volume)


async def test_a_guest_that_lies_has_it_taken_away_and_no_trace_of_it_stays(
    guest: Guest, driver: Attaching, volume: VolumeDisk
) -> None:
    await bring(guest, driver, volume)
    await guest.run("(cd /data; exec sleep 1000) > /dev/null 2>&1 & until pgrep -x sleep; do sleep 0.1; done")
    await driver.detach(guest.id, volume)
    if not await driver.has_let_go(guest.id, volume):
        # It holds on to what it had open: that is known, and attaching it anew is the same file system.
        await bring(guest, driver, volume)
        assert await guest.run("echo same > /data/file && cat /data/file") == (0, "same\n")
    await guest.run("pkill -x sleep; while pgrep -x sleep; do sleep 0.1; done")
    await take(guest, driver, volume)
    assert (await guest.run("test -e /data"))[0] != 0


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/", GuestInputError),
        ("data", GuestInputError),
        ("/a/../data", GuestInputError),
        ("/data/", GuestInputError),
        ("//data", GuestInputError),
        ("/proc", GuestInputError),
        ("/proc/self/x", GuestInputError),
        ("/dev/shm", GuestInputError),
        ("/.innkeeper", GuestInputError),
        ("/.innkeeper/link/x", GuestInputError),
        ("/etc", ConflictError),
        ("/etc/passwd", ConflictError),
        ("/etc/passwd/x", GuestInputError),
        ("/root/way/x", GuestInputError),
        ("/root/way", ConflictError),
        ("/root/out/x", GuestInputError),
    ],
)
async def test_a_path_that_leads_elsewhere_is_refused(
    guest: Guest, driver: Attaching, volume: VolumeDisk, path: str, error: type[Exception]
) -> None:
    await guest.run("ln -sfn /proc /root/way; ln -sfn ../../../dev /root/out")
    await driver.attach(guest.id, volume)
    with pytest.raises(error):
        await ask(guest, "mount_volume", volume, path)
    assert (await guest.run("test -L /root/way && test -e /proc/self/status && test -s /etc/passwd"))[0] == 0
    await take(guest, driver, volume)


async def test_what_was_at_the_path_is_there_again(guest: Guest, driver: Attaching, volume: VolumeDisk) -> None:
    await guest.run("mkdir /data && chmod 1770 /data && chown 1000:1000 /data")
    await bring(guest, driver, volume)
    await guest.run("touch /data/file")
    await take(guest, driver, volume)
    assert await guest.run("stat -c '%a %u' /data && rmdir /data") == (0, "1770 1000\n")


async def test_a_volume_that_the_host_did_not_attach_is_not_found(guest: Guest, volume: VolumeDisk) -> None:
    with pytest.raises(FileMissingError):
        await ask(guest, "mount_volume", volume)
    assert (await guest.run("test -e /data"))[0] != 0


async def test_a_new_daemon_can_detach_what_the_one_before_attached(
    server: Lab, guest: Guest, driver: Attaching, volume: VolumeDisk
) -> None:
    await bring(guest, driver, volume)
    await driver.close(keep_running=True)
    server.driver = server.another_driver()
    adopted = await server.driver.adopt(guest.id, guest.plan.state_dir)
    assert adopted is not None
    guest.running = adopted
    await bring(guest, attaching(server.driver), volume)
    assert await guest.run("echo here > /data/file && cat /data/file") == (0, "here\n")
    await take(guest, attaching(server.driver), volume)


async def test_what_a_virtual_machine_may_have_written_the_host_never_mounts(
    server: Lab, guest: Guest, driver: Attaching, volume: VolumeDisk
) -> None:
    if not server.driver.needs.disk_files:
        with volume.image.open("rb") as file:
            guest_written.mark(file.fileno())
        with pytest.raises(ConflictError, match="only virtual machines"):
            await driver.attach(guest.id, volume)
        assert not any((server.home / "mounts" / "volumes" / guest.id).iterdir())
        return
    # Its own disk has been from the start, and a volume is from the moment on that it may write it; not before.
    assert guest_written.is_marked(server.pool.disk_path(guest.id))
    await bring(guest, driver, VolumeDisk(volume.name, volume.image, read_only=True))
    await take(guest, driver, VolumeDisk(volume.name, volume.image, read_only=True))
    assert not guest_written.is_marked(volume.image)
    await bring(guest, driver, volume)
    assert guest_written.is_marked(volume.image)
    await take(guest, driver, volume)
    copy = volume.image.with_suffix(".copy")
    reflink(volume.image, copy)
    try:
        for path in (volume.image, copy, server.pool.disk_path(guest.id)):
            with pytest.raises(ConflictError, match="only virtual machines"):
                loop_device.attach(path, read_only=True)
    finally:
        copy.unlink()


async def test_the_end_of_a_machine_lets_go_of_all(server: Lab, guest: Guest, driver: Attaching) -> None:
    # The last test of the guest.
    volumes = [await make(server), await make(server)]
    for number, volume in enumerate(volumes):
        await bring(guest, driver, volume, f"/data{number}")
    await guest.run("(cd /data0; exec sleep 1000) > /dev/null 2>&1 &")
    await driver.stop(guest.id)
    for volume in volumes:
        await loop_device.wait_unused(volume.image)
        with pytest.raises(InstanceNotFoundError):
            await driver.attach(guest.id, volume)
        await driver.detach(guest.id, volume)
        assert opened_by(volume.image) == []
    assert await driver.found() == set()


async def test_what_a_killed_daemon_left_is_found_and_removed(server: Lab) -> None:
    if server.driver.needs.disk_files:
        pytest.skip("nothing of it outlives the machine's process")
    ghost, volume = secrets.token_hex(8), await make(server)
    point = server.home / "mounts" / "volumes" / ghost / volume.name
    point.mkdir(parents=True)
    with loop_device.attach(volume.image) as device:
        mounts.mount(device.path, point, "ext4")
    assert await server.driver.found() == {ghost}
    assert [(kind, owner) for kind, _, owner in server.driver.leftovers(set())] == [(LeakKind.MOUNT, ghost)]
    assert server.driver.leftovers({ghost}) == []
    await server.driver.stop(ghost)
    await loop_device.wait_unused(volume.image)
    assert await server.driver.found() == set()


def opened_by(image: Path) -> list[str]:
    """Descriptors of processes that have the file open."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.readlink() == image and int(link.parts[2]) != os.getpid():
                found.append(str(link))
        except OSError:
            continue
    return found


async def test_a_driver_without_volumes_says_so(server: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(server.driver), "capabilities", Capabilities())
    with pytest.raises(NotHereError, match=server.driver.name):
        attaching(server.driver)
