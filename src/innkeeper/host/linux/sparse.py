"""Holes in files: ranges that read as zeros and take no space."""

import ctypes
import errno

from innkeeper.host.linux.mounts import libc, oserror

FALLOC_FL_KEEP_SIZE = 0x1
FALLOC_FL_PUNCH_HOLE = 0x2

libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    if libc.fallocate(descriptor, mode, offset, length) < 0:
        raise oserror("fallocate")


def punch_hole(descriptor: int, offset: int, length: int) -> bool:
    """Make a range of a file a hole, its size unchanged; False on a file system that has none. Milliseconds at any length."""
    try:
        fallocate(descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return False
        raise
    return True
