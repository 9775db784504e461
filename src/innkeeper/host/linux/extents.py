"""Which blocks files take, by FIEMAP: reflink copies share most of theirs, and only the kernel knows which."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterable
from pathlib import Path

FS_IOC_FIEMAP = 0xC020660B
FIEMAP_FLAG_SYNC = 1
FIEMAP_EXTENT_LAST = 1
FIEMAP_EXTENT_SHARED = 0x2000
_HEAD = struct.Struct("=QQIIII")
_EXTENT = struct.Struct("=QQQ2QI3I")
_BATCH = 512


def shared_bytes(paths: Iterable[Path]) -> int:
    """What the files take together, blocks that several of them share counted once. A file that is gone takes nothing. Raises OSError."""
    extents: list[tuple[int, int]] = []
    for path in paths:
        try:
            extents += [(start, length) for start, length, _ in _extents(path)]
        except FileNotFoundError:
            continue
    total = end = 0
    for start, length in sorted(extents):
        if start + length > end:
            total += start + length - max(start, end)
            end = start + length
    return total


def own_bytes(path: Path) -> int:
    """What the file takes that no other file of the file system shares. Raises OSError."""
    return sum(length for _, length, shared in _extents(path) if not shared)


def _extents(path: Path) -> list[tuple[int, int, bool]]:
    """(physical start, length, whether another file has it too) of each extent of a file."""
    found: list[tuple[int, int, bool]] = []
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        at = 0
        while True:
            buffer = bytearray(_HEAD.size + _BATCH * _EXTENT.size)
            _HEAD.pack_into(buffer, 0, at, 2**64 - 1 - at, FIEMAP_FLAG_SYNC, 0, _BATCH, 0)
            fcntl.ioctl(fd, FS_IOC_FIEMAP, buffer)
            mapped = _HEAD.unpack_from(buffer)[3]
            for number in range(mapped):
                logical, physical, length, _, _, flags, *_ = _EXTENT.unpack_from(
                    buffer, _HEAD.size + number * _EXTENT.size
                )
                found.append((physical, length, bool(flags & FIEMAP_EXTENT_SHARED)))
                at = logical + length
                if flags & FIEMAP_EXTENT_LAST:
                    return found
            if not mapped:
                return found
    finally:
        os.close(fd)
