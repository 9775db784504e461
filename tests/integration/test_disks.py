"""Disks for real: loops, ext4, overlay, the reflink pool; and that nothing of them stays behind."""

import asyncio
import errno
import os
import secrets
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.integration.mounted_root import mounted_root

from innkeeper.host.disks import rootfs
from innkeeper.host.disks.disk_health import has_stopped
from innkeeper.host.disks.disk_pool import DiskPool, open_pool
from innkeeper.host.disks.disk_template import can_reflink, reflink
from innkeeper.host.disks.rootfs import DiskPlan
from innkeeper.host.linux import command, loop_device, mounts

sys.path.insert(0, str(Path(__file__).parent))
import image_fixture

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount disks")]


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[DiskPool]:
    pool = await open_pool(tmp_path, size_mib=1024)
    yield pool
    await pool.close()
    await image_fixture.assert_nothing_mounted(tmp_path)


@pytest.fixture
def plan(tmp_path: Path) -> DiskPlan:
    lower = tmp_path / "lower"
    (lower / "etc").mkdir(parents=True)
    (lower / "etc" / "motd").write_text("from the image")
    return DiskPlan(secrets.token_hex(4), 256, (lower,), tmp_path / "mounts" / "guest")


async def test_a_root_is_the_image_with_the_disk_above(pool: DiskPool, plan: DiskPlan) -> None:
    async with mounted_root(pool, plan) as disk:
        assert (disk.created, disk.adopted) == (True, False)
        assert (disk.root / "etc/motd").read_text() == "from the image"
        (disk.root / "etc/motd").write_text("changed")
        assert (disk.upper / "etc/motd").read_text() == "changed"
        assert (plan.lowers[0] / "etc/motd").read_text() == "from the image"
        for mounted in mounts.mounts_under(plan.mount_directory):
            assert {"nodev", "nosuid", "noatime"} <= mounted.options
    assert not plan.mount_directory.exists()
    assert pool.disks().keys() == {plan.name}


async def test_a_disk_that_the_kernel_stopped_is_told_from_one_that_had_an_error(
    pool: DiskPool, plan: DiskPlan
) -> None:
    async with mounted_root(pool, plan) as disk:
        assert not has_stopped(disk.upper)
        _report_error(disk.upper)
        assert not has_stopped(disk.upper)
        await command.run(("mount", "-o", "remount,errors=remount-ro", str(plan.mount_directory / "disk")))
        _report_error(disk.upper)
        assert has_stopped(disk.upper)
    assert not has_stopped(disk.upper)


def _report_error(directory: Path) -> None:
    """Have ext4 do what it does about an error."""
    device = directory.stat().st_dev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").readlink().name
    Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("a test")


async def test_the_disk_is_kept_and_found_again(pool: DiskPool, plan: DiskPlan) -> None:
    async with mounted_root(pool, plan) as disk:
        (disk.root / "kept").write_text("x")
        (disk.root / "etc/motd").unlink()
    async with mounted_root(pool, plan) as disk:
        assert not disk.created
        assert (disk.root / "kept").read_text() == "x"
        assert not (disk.root / "etc/motd").exists()
    assert await pool.remove_disk(plan.name)
    assert not await pool.remove_disk(plan.name)
    assert pool.disks() == {}


async def test_a_failed_mount_removes_its_new_disk_but_never_an_old_one(
    pool: DiskPool, plan: DiskPlan, tmp_path: Path
) -> None:
    broken = DiskPlan(plan.name, plan.size_mib, (tmp_path / "no such layer",), plan.mount_directory)
    async with mounted_root(pool, plan) as disk:
        (disk.root / "kept").write_text("x")
    with pytest.raises(FileNotFoundError):
        await rootfs.mount_root(pool, broken)
    assert pool.disks().keys() == {plan.name}
    async with mounted_root(pool, plan) as disk:
        assert (disk.root / "kept").read_text() == "x"


async def test_a_root_that_cannot_be_mounted_leaves_nothing(pool: DiskPool, plan: DiskPlan, tmp_path: Path) -> None:
    broken = DiskPlan(plan.name, plan.size_mib, (tmp_path / "no such layer",), plan.mount_directory)
    with pytest.raises(FileNotFoundError):
        async with mounted_root(pool, broken):
            pass
    assert not plan.mount_directory.exists()
    assert pool.disks() == {}


async def test_what_a_former_daemon_left_mounted_is_taken_over(pool: DiskPool, plan: DiskPlan) -> None:
    (await rootfs.mount_root(pool, plan)).root.joinpath("kept").write_text("x")
    async with mounted_root(pool, plan) as disk:
        assert disk.adopted
        assert (disk.root / "kept").read_text() == "x"
    # A second release finds it gone, which is fine.
    await rootfs.release(plan.mount_directory)


async def test_a_busy_root_goes_when_its_last_user_does(pool: DiskPool, plan: DiskPlan, tmp_path: Path) -> None:
    async with mounted_root(pool, plan) as disk:
        held = (disk.root / "open").open("w")
    assert mounts.mounts_under(plan.mount_directory) == []
    held.close()


async def test_the_size_of_a_disk_is_a_hard_quota(pool: DiskPool) -> None:
    lower = pool.directory / "lower"
    lower.mkdir()
    plan = DiskPlan("small", 64, (lower,), pool.directory.parent / "mounts" / "small")
    async with mounted_root(pool, plan) as disk:
        with pytest.raises(OSError) as failure, (disk.root / "big").open("wb", buffering=0) as file:
            for _ in range(70):
                file.write(bytes(1 << 20))
        assert failure.value.errno == errno.ENOSPC


async def test_copies_of_a_large_disk_cost_no_space(pool: DiskPool, plan: DiskPlan) -> None:
    await pool.create_disk("template", 10240)
    free = pool.free_bytes()
    for number in range(20):
        await pool.create_disk(f"copy-{number}", 10240)
    assert free - pool.free_bytes() < 4 << 20
    assert not await pool.create_disk("copy-1", 10240)


async def test_the_pool_is_found_again_with_what_is_in_it(pool: DiskPool, tmp_path: Path) -> None:
    await pool.create_disk("x", 64)
    assert (await open_pool(tmp_path)).disks().keys() == {"x"}
    await pool.close()
    again = await open_pool(tmp_path)
    assert again.disks().keys() == {"x"}
    assert (again.directory, again.backing) == (pool.directory, pool.backing)


async def test_a_pool_that_another_namespace_has_mounted_as_well_is_let_go_of_and_its_directory_stays(
    pool: DiskPool, tmp_path: Path
) -> None:
    # As an image's build has it: the copy of the mount would keep the pool's file busy.
    other = await asyncio.create_subprocess_exec(
        "unshare", "--mount", "--propagation", "private", "sh", "-c", "echo copied; read line",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert other.stdout is not None and await other.stdout.readline() == b"copied\n"
        await pool.close()
        assert not mounts.is_mounted(pool.directory)
        # A full disk would have no room to make it again at the next start.
        assert found(tmp_path) == {"pool", "pool.xfs"}
        assert pool.backing is not None
        async with asyncio.timeout(20):
            await loop_device.wait_unused(pool.backing)
        assert other.returncode is None
    finally:
        other.kill()
        await other.communicate()


def found(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


async def test_free_space_is_the_lesser_of_the_pool_and_what_is_behind_it(tmp_path: Path) -> None:
    host = tmp_path / "h"
    host.mkdir()
    mounts.mount("tmpfs", host, "tmpfs", 0, "size=400m")
    try:
        pool = await open_pool(host, size_mib=4096)
        try:
            assert pool.backing is not None
            assert pool.free_bytes() <= 400 << 20
        finally:
            await pool.close()
    finally:
        await mounts.umount_tree(host)


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden"])
def test_a_name_cannot_leave_the_pool(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        DiskPool(tmp_path, backing=None).disk_path(name)


async def test_a_reflink_never_replaces_a_file(pool: DiskPool) -> None:
    source, target = pool.directory / "a", pool.directory / "b"
    source.write_bytes(b"a" * 8192)
    target.write_bytes(b"b")
    with pytest.raises(FileExistsError):
        reflink(source, target)
    assert target.read_bytes() == b"b"
    assert can_reflink(pool.directory)


async def test_a_disk_that_is_attached_elsewhere_is_never_mounted_twice(
    pool: DiskPool, plan: DiskPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_device, "UNUSED_SECONDS", 0.1)
    async with mounted_root(pool, plan):
        other = DiskPlan(plan.name, plan.size_mib, plan.lowers, plan.mount_directory.parent / "other")
        with pytest.raises(OSError) as refused:
            await rootfs.mount_root(pool, other)
        assert refused.value.errno == errno.EBUSY
    async with mounted_root(pool, other):
        pass
