"""Freezing a mounted file system: everything written is on its device, and writers wait until it thaws."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

FIFREEZE = 0xC0045877
FITHAW = 0xC0045878


@contextlib.contextmanager
def frozen(mountpoint: Path) -> Iterator[None]:
    """The file system mounted exactly there, frozen for the block; nothing in the block may write to it.

    Raises OSError: EINVAL where nothing is mounted (else it would be the host's own file system that stands still).
    """
    descriptor = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        _check_mounted(descriptor, mountpoint)
        fcntl.ioctl(descriptor, FIFREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(descriptor, FITHAW, 0)
    finally:
        os.close(descriptor)


def thaw(mountpoint: Path) -> bool:
    """Thaw the file system mounted there; False where none is or it was not frozen. For what a killed process left."""
    try:
        descriptor = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        _check_mounted(descriptor, mountpoint)
        fcntl.ioctl(descriptor, FITHAW, 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    else:
        return True
    finally:
        os.close(descriptor)


def _check_mounted(descriptor: int, mountpoint: Path) -> None:
    if os.fstat(descriptor).st_dev == mountpoint.parent.stat().st_dev:
        raise OSError(errno.EINVAL, "no file system is mounted there", os.fspath(mountpoint))
