"""Holes in files: ranges that read as zeros and take no space."""

import ctypes
import errno
import os
from collections.abc import Iterator

from innkeeper.host.linux.mounts import libc, oserror

FALLOC_FL_KEEP_SIZE = 0x1
FALLOC_FL_PUNCH_HOLE = 0x2
PIECE_BYTES = 262_144
_ZEROS = bytes(PIECE_BYTES)

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


def copy_sparse(source: int, target: int) -> None:
    """Write what is not zero in a file to an empty one of the same size, both given as descriptors. Raises OSError."""
    for at, piece in pieces(source):
        written = 0
        while written < len(piece):
            written += os.pwrite(target, piece[written:], at + written)


def pieces(descriptor: int) -> Iterator[tuple[int, bytes]]:
    """Offset and content of each piece of a file that is not all zeros; every offset is a multiple of PIECE_BYTES. Raises OSError."""
    size, at = os.fstat(descriptor).st_size, 0
    while at < size:
        try:
            data = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        # A hole's end need not be a piece's beginning.
        at = max(at, data - data % PIECE_BYTES)
        piece = os.pread(descriptor, PIECE_BYTES, at)
        if not piece:
            return
        if piece != _ZEROS[: len(piece)]:
            yield at, piece
        at += PIECE_BYTES
