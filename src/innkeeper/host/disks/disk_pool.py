"""Where disks live: a directory whose file system can reflink; where the host's cannot, a sparse XFS made for the purpose."""

# ruff: noqa: ASYNC240  # a rename or mkdir on a local disk takes microseconds, a hop to a thread takes longer

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from innkeeper.host.disks.disk_template import can_reflink, ensure_template, reflink
from innkeeper.host.linux import command, loop_device, mounts

MIN_POOL_MIB = 1024
MIB = 1 << 20
# discard: what disks give back becomes free space of the host again, since the pool's file is sparse.
POOL_OPTIONS = "discard,logbsize=256k"


class DiskPool:
    """Disk images by name, under `directory`; copies of templates cost milliseconds whatever their size.

    Holds no state of its own: what a restarted daemon opens again is complete.
    """

    def __init__(self, directory: Path, *, backing: Path | None) -> None:
        self.directory = directory
        # The XFS file behind the directory; None where the host's own file system reflinks.
        self.backing = backing
        self.disks_directory = directory / "disks"
        self.templates_directory = directory / "templates"
        self.disks_directory.mkdir(exist_ok=True, mode=0o700)

    def disk_path(self, name: str) -> Path:
        """Where the disk called `name` is or would be."""
        if "/" in name or name.startswith("."):
            raise ValueError(f"not a name for a disk: {name!r}")
        return self.disks_directory / f"{name}.img"

    async def create_disk(self, name: str, size_mib: int, *, copy_of: Path | None = None) -> bool:
        """Make the disk `name`, empty or a copy; False when it exists already (its size then stays). Raises OSError (ENOSPC)."""
        source = copy_of or await ensure_template(self.templates_directory, size_mib)
        try:
            reflink(source, self.disk_path(name))
        except FileExistsError:
            return False
        return True

    async def remove_disk(self, name: str) -> bool:
        """Delete the disk `name`, off the event loop (the host gives back its blocks); False when there is none."""
        return await asyncio.to_thread(_unlink, self.disk_path(name))

    def disks(self) -> dict[str, int]:
        """Every disk by name, with the bytes it really takes (shared blocks counted)."""
        found = {}
        for path in self.disks_directory.glob("*.img"):
            # One may be removed at this moment.
            with contextlib.suppress(FileNotFoundError):
                found[path.stem] = path.stat().st_blocks * 512
        return found

    def free_bytes(self) -> int:
        """Room for new data: in the pool, and on the file system behind its sparse file."""
        free = [_free(self.directory)]
        if self.backing:
            free.append(_free(self.backing.parent))
        return min(free)

    def total_bytes(self) -> int:
        """The size of the file system that disks lie on; a sparse pool may be larger than what is behind it."""
        return shutil.disk_usage(self.directory).total

    def free_files(self) -> int:
        """Room for new files likewise."""
        behind = [self.backing.parent] if self.backing else []
        return min(_free_files(directory) for directory in (self.directory, *behind))

    async def close(self) -> None:
        """Unmount the pool where it is one of ours; disks still in use keep it alive until they are unmounted."""
        if self.backing:
            await mounts.umount_tree(self.directory)
            # A mount point that goes takes the copies of the mount with it that other namespaces have: that of an image's build would keep the pool's
            # file busy until the build ends, and no server could open the pool again before that. Replaced, not removed: on a full disk
            # the next start could not make it again. There the old one stays.
            with contextlib.suppress(OSError):
                fresh = _replacement(self.directory)
                fresh.mkdir(mode=0o700, exist_ok=True)
                fresh.rename(self.directory)


async def open_pool(host_dir: Path, *, size_mib: int | None = None) -> DiskPool:
    """The server's pool of disks at `<host_dir>/pool`, made and mounted where that has not happened yet.

    `size_mib` is the size of the XFS file at `<host_dir>/pool.xfs` when it has to be made (default: 90 % of what is free;
    it is sparse). Half a second the first time, 20 ms mounting, else 1 ms. Raises OSError, CommandFailed.
    """
    directory, backing = host_dir / "pool", host_dir / "pool.xfs"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.suppress(FileNotFoundError):
        _replacement(directory).rmdir()
    if mounts.is_mounted(directory):
        return DiskPool(directory, backing=backing)
    if not backing.exists():
        if can_reflink(directory):
            return DiskPool(directory, backing=None)
        await _make_backing(backing, size_mib or default_size_mib(_free(host_dir)))
    # XFS refuses a second mount of the same file system, and a former one may be on its way out.
    await loop_device.wait_unused(backing)
    # The disks above have a page cache of their own; direct I/O keeps the host from caching every block twice.
    with loop_device.attach(backing, direct_io=True) as device:
        flags = mounts.MS_NODEV | mounts.MS_NOSUID | mounts.MS_NOATIME
        # In a thread: after a crash XFS replays its log first.
        await asyncio.to_thread(mounts.mount, device.path, directory, "xfs", flags, POOL_OPTIONS)
    return DiskPool(directory, backing=backing)


def _replacement(directory: Path) -> Path:
    return directory.with_name("pool.next")


def default_size_mib(free_bytes: int) -> int:
    """The size of a pool nobody gave one for: 90 % of what is free now."""
    return max(MIN_POOL_MIB, free_bytes * 9 // 10 // MIB)


async def _make_backing(backing: Path, size_mib: int) -> None:
    fd, name = tempfile.mkstemp(prefix=".pool-", dir=backing.parent)
    fresh = Path(name)
    try:
        os.truncate(fd, max(MIN_POOL_MIB, size_mib) * MIB)
        await command.run(
            ["mkfs.xfs", "-q", "-K", "-m", "reflink=1", "-L", "inn-pool", "--", str(fresh)], timeout_seconds=120
        )
        fresh.replace(backing)
    finally:
        os.close(fd)
        fresh.unlink(missing_ok=True)


def _free(directory: Path) -> int:
    return shutil.disk_usage(directory).free


def _free_files(directory: Path) -> int:
    found = os.statvfs(directory)
    # File systems that make inodes as they go say that they have none at all.
    return found.f_favail if found.f_files else sys.maxsize


def _unlink(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True
