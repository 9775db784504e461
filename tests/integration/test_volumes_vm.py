"""Volumes of a microVM by a real daemon, which is replaced by another meanwhile. One guest, translated, for all of it."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from tests import leaks
from tests.integration.booted_vm import NEEDS_QEMU, boot_files
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, running_host
from tests.integration.test_volumes import described, file_of, new

from innkeeper.core import volume_verbs as verbs
from innkeeper.core.checkpoint_verbs import TakeCheckpoint
from innkeeper.core.host_verbs import EnsureMachine
from innkeeper.errors import CheckpointFailedError, GuestWrittenError, NotHereError, VolumeInUseError
from innkeeper.host.linux import loop_device

pytestmark = [pytest.mark.anyio, pytest.mark.long, NEEDS_QEMU, NEEDS_RUNSC]

BOOT_SECONDS = 240

GUEST_SECONDS = 120
# Their serial numbers.
DISKS = "/sys/block/sd*/device/vpd_pg80"


def machine_of(host: Host, instance: UUID) -> int:
    """QEMU's process."""
    return int((host.machine(instance).state_dir / "vm.pid").read_text())


def opened(pid: int) -> set[tuple[int, int]]:
    """Device and inode of the files that a process has open."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            status = entry.stat()
            found.add((status.st_dev, status.st_ino))
    return found


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_dev, path.stat().st_ino


async def test_a_virtual_machine_has_volumes_and_keeps_them_over_a_new_daemon(tmp_path: Path) -> None:
    boot = boot_files()
    shutil.copytree(boot.kernel.parent, tmp_path / "host" / "kernels" / boot.kernel.parent.name)
    instance, other = uuid4(), uuid4()
    try:
        async with running_host(tmp_path, keep_running=True) as host:
            shape = host.shape(driver="qemu", memory_mb=256, disk_mb=1024)
            await host.request(EnsureMachine(instance, shape, "guest"), timeout_seconds=BOOT_SECONDS)
            await host.ensure(other)
            volume = await gvisor_writes_and_the_machine_reads(host, other, instance)
            await what_it_may_write_is_marked(host, other, instance, volume)
            with pytest.raises((CheckpointFailedError, NotHereError)):
                await host.request(TakeCheckpoint(instance, uuid4()))
    finally:
        # The next one ends what runs, whatever has happened.
        async with running_host(tmp_path) as host:
            assert [one["ready"] for one in (await described(host, volume))["attached"]] == [True]
            assert await said(host, instance, "cat /data/new") == "new\n"
            await who_uses_it_is_said_and_keeps_it(host, instance, volume)
            await what_the_guest_let_go_of_is_gone_at_once_and_is_found_again(host, instance, volume)
            await it_is_in_another_file_afterwards(host, instance, volume)
            await it_grows_where_it_is_attached_next(host, instance, volume)
            await host.destroy(instance)
            await host.request(verbs.RemoveVolume(volume))
            assert (await host.status())["leaked"] == 0
    assert leaks.wait_for_none(tmp_path) == []


async def said(host: Host, instance: UUID, line: str) -> str:
    return (await host.ok(instance, line, timeout_seconds=GUEST_SECONDS)).text


async def gvisor_writes_and_the_machine_reads(host: Host, other: UUID, instance: UUID) -> UUID:
    volume = await new(host)
    await host.request(verbs.AttachVolume(other, volume, "/data"))
    await host.ok(other, "echo kept > /data/file")
    await host.request(verbs.DetachVolume(other, volume))
    for reader in (other, instance):
        await host.request(verbs.AttachVolume(reader, volume, "/data", read_only=True), timeout_seconds=GUEST_SECONDS)
        assert await said(host, reader, "cat /data/file") == "kept\n"
    with pytest.raises(VolumeInUseError):
        await host.request(verbs.RemoveVolume(volume))
    for reader in (other, instance):
        await host.request(verbs.DetachVolume(reader, volume), timeout_seconds=GUEST_SECONDS)
    assert (await described(host, volume))["guest_written"] is False
    return volume


async def what_it_may_write_is_marked(host: Host, other: UUID, instance: UUID, volume: UUID) -> None:
    await host.request(verbs.AttachVolume(instance, volume, "/data"), timeout_seconds=GUEST_SECONDS)
    assert (await described(host, volume))["guest_written"] is True
    # The guest's user's, who is not root.
    assert await said(host, instance, "cat /data/file; echo new > /data/new; sync; id -un") == "kept\nuser\n"
    with pytest.raises(VolumeInUseError, match=str(instance)):
        await host.request(verbs.AttachVolume(other, volume, "/data"))


async def who_uses_it_is_said_and_keeps_it(host: Host, instance: UUID, volume: UUID) -> None:
    await said(host, instance, "(exec sleep 1000 > /data/open) 2> /dev/null & until pgrep -x sleep; do sleep 0.1; done")
    with pytest.raises(VolumeInUseError, match=r"sleep \(\d+\)"):
        await host.request(verbs.DetachVolume(instance, volume), timeout_seconds=GUEST_SECONDS)
    assert await said(host, instance, "echo still > /data/new; cat /data/new") == "still\n"
    await said(host, instance, "pkill -x sleep; while pgrep -x sleep; do sleep 0.1; done")


async def what_the_guest_let_go_of_is_gone_at_once_and_is_found_again(host: Host, instance: UUID, volume: UUID) -> None:
    """QEMU has it still. A guest whose kernel does, too, may mount a disk that is on its way out when the volume comes again."""
    await asked(host, instance, volume, "unmount_volume")
    assert identity(file_of(host, volume)) in opened(machine_of(host, instance))
    assert await said(host, instance, f"cat {DISKS} 2> /dev/null | tr -d '\\0' | grep -c {volume.hex} || true") == "0\n"
    await asked(host, instance, volume, "mount_volume")
    assert await said(host, instance, "cat /data/new") == "still\n"


async def asked(host: Host, instance: UUID, volume: UUID, verb: str) -> None:
    """The agent alone: what the daemon does before and after is not done."""
    params = {"volume": volume.hex, "path": "/data"}
    more = {"read_only": False} if verb == "mount_volume" else {}
    machine = host.machine(instance)
    async with machine.in_use():
        await machine.endpoint.request(verb, {**params, **more}, timeout_seconds=GUEST_SECONDS)


async def it_is_in_another_file_afterwards(host: Host, instance: UUID, volume: UUID) -> None:
    """Whatever QEMU may have kept open is not what the next one writes."""
    before = identity(file_of(host, volume))
    assert before in opened(machine_of(host, instance))
    await host.request(verbs.DetachVolume(instance, volume), timeout_seconds=GUEST_SECONDS)
    assert identity(file_of(host, volume)) != before
    assert before not in opened(machine_of(host, instance))
    third = await host.ensure()
    with pytest.raises(GuestWrittenError):
        await host.request(verbs.AttachVolume(third, volume, "/data"))
    assert loop_device.devices_backed_by(file_of(host, volume)) == {}


async def it_grows_where_it_is_attached_next(host: Host, instance: UUID, volume: UUID) -> None:
    await host.request(verbs.GrowVolume(volume, 256))
    await host.request(verbs.AttachVolume(instance, volume, "/srv/data"), timeout_seconds=GUEST_SECONDS)
    text = await said(
        host, instance, "cat /srv/data/new; head -c 150M /dev/zero > /srv/data/large; stat -c %s /srv/data/large"
    )
    assert text == f"still\n{150 << 20}\n"
