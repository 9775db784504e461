"""Empty disks: one sparse ext4 image per size, made once, of which every guest gets a reflink copy in milliseconds."""

# ruff: noqa: ASYNC240  # a rename or mkdir on a local disk takes microseconds, a hop to a thread takes longer

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path

from innkeeper.host.linux import command, guest_written
from innkeeper.host.linux.hold import held

FICLONE = 0x40049409
# Part of the template's name: a change of the options below makes new templates and leaves existing disks alone.
TEMPLATE_VERSION = 1
MIN_DISK_MIB = 64


def mkfs_argv(image: Path, size_mib: int) -> list[str]:
    """The command that makes an empty disk of `size_mib` in a new sparse file. 20-50 ms, a few MiB written at any size."""
    return [
        "mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-L", "inn-disk",
        # A sparse file reads as zeros, so neither mkfs nor, later, the kernel's lazy initializer writes inode tables:
        # at 10 GiB those would be 160 MiB per guest that nobody asked for.
        "-E", "nodiscard,assume_storage_prezeroed=1",
        "--", str(image), f"{size_mib}M",
    ]  # fmt: skip


async def ensure_template(directory: Path, size_mib: int) -> Path:
    """The template for disks of `size_mib`, made now where it is missing. Raises ValueError, CommandFailed."""
    if size_mib < MIN_DISK_MIB:
        raise ValueError(f"a disk has at least {MIN_DISK_MIB} MiB")
    template = directory / f"ext4-v{TEMPLATE_VERSION}-{size_mib}m.img"
    if template.exists():
        return template
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd, name = tempfile.mkstemp(prefix=".template-", dir=directory)
    os.close(fd)
    fresh = Path(name)
    try:
        with held(fresh):
            await command.run(mkfs_argv(fresh, size_mib))
        fresh.chmod(0o400)
        fresh.replace(template)
    finally:
        fresh.unlink(missing_ok=True)
    return template


def reflink(source: Path, target: Path) -> None:
    """Make `target` a new file that shares every block with `source`: milliseconds at any size.

    Raises FileExistsError; OSError (EOPNOTSUPP, EXDEV) where the file system cannot. Leaves no half-made target.
    """
    source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        target_fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            guest_written.carry(source_fd, target_fd)
            fcntl.ioctl(target_fd, FICLONE, source_fd)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        finally:
            os.close(target_fd)
    finally:
        os.close(source_fd)


def reflink_over(source: Path, target: Path) -> None:
    """Make `target`, a file as long as `source`, share every block with it: what was in it is gone. Raises OSError."""
    source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        target_fd = os.open(target, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.ioctl(target_fd, FICLONE, source_fd)
        finally:
            os.close(target_fd)
    finally:
        os.close(source_fd)


def reflink_unnamed(source: Path) -> int:
    """A descriptor of a copy that shares every block with `source` and has no name: it is gone when the descriptor is closed. Raises OSError."""
    source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        copy_fd = os.open(source.parent, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        try:
            guest_written.carry(source_fd, copy_fd)
            fcntl.ioctl(copy_fd, FICLONE, source_fd)
        except BaseException:
            os.close(copy_fd)
            raise
        return copy_fd
    finally:
        os.close(source_fd)


def can_reflink(directory: Path) -> bool:
    """Whether the file system of `directory` shares blocks between files; tried with two small files."""
    fd, name = tempfile.mkstemp(prefix=".reflink-", dir=directory)
    copy = Path(name + "-copy")
    try:
        os.write(fd, b"\0" * 4096)
        reflink(Path(name), copy)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(fd)
        for path in (Path(name), copy):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
