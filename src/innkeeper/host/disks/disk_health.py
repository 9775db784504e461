"""Whether a guest's disk can still be written: the kernel stops that after a write of its journal failed, for the host's disk being full above all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from innkeeper.host.linux.mounts import all_mounts

ERRORS = "/sys/fs/ext4/{}/errors_count"
NO_ERRORS = b"0\n"


def has_stopped(directory: Path) -> bool:
    """Whether the ext4 that `directory` lies on takes no writes any more. 13 µs as long as it has seen no error. False where it is gone."""
    # Plain calls: it is asked twice a command, and pathlib would take as long again.
    with contextlib.suppress(OSError):
        if os.statvfs(directory).f_flag & os.ST_RDONLY:
            return True
        device = os.stat(directory).st_dev  # noqa: PTH116
        numbers = f"{os.major(device)}:{os.minor(device)}"
        name = os.readlink(f"/sys/dev/block/{numbers}").rpartition("/")[2]  # noqa: PTH115
        # The count outlives the mount: an error of long ago says nothing of now.
        if _read(ERRORS.format(name)) != NO_ERRORS:
            # Since Linux 6.15 such a file system is not shown as read-only, but for this word.
            return any("emergency_ro" in mount.super_options for mount in all_mounts() if mount.device == numbers)
    return False


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 32)
    finally:
        os.close(descriptor)
