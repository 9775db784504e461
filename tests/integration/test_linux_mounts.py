"""Mounts and loop devices on the real kernel."""

import asyncio
import os
from pathlib import Path

import pytest

from innkeeper.host.linux import command, loop_device, mounts

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")]


def image(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(16 << 20)
    return path


@pytest.fixture
async def disk(tmp_path: Path) -> Path:
    path = image(tmp_path / "disk.img")
    await command.run(["mkfs.ext4", "-q", str(path)])
    return path


async def test_a_mount_keeps_the_loop_device_and_the_unmount_lets_it_go(disk: Path, tmp_path: Path) -> None:
    target = tmp_path / "a name\twith\\odd#bytes"
    target.mkdir()
    with loop_device.attach(disk) as device:
        assert loop_device.devices_backed_by(tmp_path) == {device.path: disk}
        mounts.mount(device.path, target, "ext4", mounts.MS_NODEV | mounts.MS_NOSUID)
    assert mounts.is_mounted(target)
    (found,) = mounts.mounts_under(tmp_path)
    assert found.target == str(target)
    assert {"nodev", "nosuid"} <= found.options
    (target / "file").write_bytes(b"x" * 100_000)
    assert await mounts.umount_tree(tmp_path) == [str(target)]
    assert not mounts.is_mounted(target)
    assert not await mounts.umount(target)
    assert loop_device.devices_backed_by(tmp_path) == {}


async def test_read_only_and_without_autoclear(disk: Path, tmp_path: Path) -> None:
    with loop_device.attach(disk, read_only=True, autoclear=False, direct_io=True) as device:
        pass
    assert device.path in loop_device.devices_backed_by(disk)
    try:
        with pytest.raises(OSError):
            os.close(os.open(device.path, os.O_WRONLY))
            device.path.write_bytes(b"x" * 4096)
    finally:
        loop_device.detach(device.path)
    loop_device.detach(device.path)
    loop_device.detach("/dev/loop999999")
    assert loop_device.devices_backed_by(tmp_path) == {}


async def test_a_failed_mount_leaves_no_device(tmp_path: Path) -> None:
    empty = image(tmp_path / "empty.img")
    with pytest.raises(OSError) as failure, loop_device.attach(empty) as device:
        mounts.mount(device.path, tmp_path, "ext4")
    assert failure.value.filename == str(tmp_path)
    assert loop_device.devices_backed_by(tmp_path) == {}
    with pytest.raises(FileNotFoundError):
        loop_device.attach(tmp_path / "absent.img")
    link = tmp_path / "link.img"
    link.symlink_to(empty)
    with pytest.raises(OSError):
        loop_device.attach(link)


async def test_many_at_once_do_not_take_each_others_device(tmp_path: Path) -> None:
    def attach(number: int) -> loop_device.LoopDevice:
        return loop_device.attach(image(tmp_path / f"{number}.img"))

    devices = await asyncio.gather(*(asyncio.to_thread(attach, number) for number in range(16)))
    try:
        assert len({device.path for device in devices}) == 16
        assert len(loop_device.devices_backed_by(tmp_path)) == 16
    finally:
        for device in devices:
            device.close()
    assert loop_device.devices_backed_by(tmp_path) == {}


async def test_a_tree_of_mounts_goes_from_the_leaves_and_busy_ones_are_detached(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    mounts.mount("none", top, "tmpfs")
    (top / "below").mkdir()
    mounts.bind("/usr", top / "below", flags=mounts.MS_RDONLY | mounts.MS_NODEV)
    with pytest.raises(OSError):
        (top / "below" / "x").touch()
    with (top / "held").open("w"):
        assert await mounts.umount_tree(top) == [str(top / "below"), str(top)]
    assert mounts.mounts_under(tmp_path) == []
