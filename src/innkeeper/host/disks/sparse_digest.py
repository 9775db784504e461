"""The checksum of a disk's file: of what is in it, however the file system lays it out."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

BLOCK_BYTES = 1 << 16
_ZEROS = bytes(BLOCK_BYTES)


def sparse_digest(path: Path) -> str:
    """SHA-256, in hex, of the file's size and of each of its blocks that is not all zeros, with its place.

    Holes are not read; whether zeros are written or a hole makes no difference, which copying and trimming change. What was read does not stay in the
    kernel's cache, which the guests' disks need. Takes two seconds for a gigabyte: call it in a thread. Raises OSError.
    """
    digest = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        size = os.fstat(fd).st_size
        digest.update(size.to_bytes(8, "big"))
        at = 0
        while (data := _next_data(fd, at)) is not None:
            end = os.lseek(fd, data, os.SEEK_HOLE)
            first = at = data - data % BLOCK_BYTES
            while at < end:
                block = _read(fd, at, min(BLOCK_BYTES, size - at))
                if block != _ZEROS[: len(block)]:
                    digest.update(at.to_bytes(8, "big"))
                    digest.update(block)
                at += BLOCK_BYTES
            os.posix_fadvise(fd, first, at - first, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return digest.hexdigest()


def _next_data(fd: int, at: int) -> int | None:
    """Where the next data begins, at or after an offset."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise


def _read(fd: int, at: int, size: int) -> bytes:
    """The whole block. Raises OSError where the file ends before."""
    block = os.pread(fd, size, at)
    while len(block) < size:
        more = os.pread(fd, size - len(block), at + len(block))
        if not more:
            raise OSError(errno.EIO, "the file is shorter than it was")
        block += more
    return block
