"""The rows of a change scan, read from the file that the scanner left. Its writer is not trusted with anything else."""

from __future__ import annotations

import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

_HEADER = struct.Struct("<8sQQQ")  # magic, rows, offset of the index, identity
_ROW = struct.Struct("<BBHQ")  # status, kind, length of the path, size; the path follows
_OFFSET = struct.Struct("<Q")
_MAGIC = b"INNCHNG1"
_INDEX_EVERY = 1000
_MAX_PATH_BYTES = 4095
# Of what a guest lists: paths of over 100 bytes each, in the bytes that are taken of it.
MAX_LISTED = 250_000
# What no walk of a tree comes to: an empty name, the directory itself, the one above it.
_UNTRUE = re.compile(rb"/\.{0,2}(?:/|\Z)")
_STATUS: dict[int, Literal["created", "modified", "deleted"]] = {1: "created", 2: "modified", 3: "deleted"}
_KIND: dict[int, Literal["file", "symlink"]] = {1: "file", 2: "symlink"}


@dataclass(frozen=True)
class FileChange:
    """One changed file: its absolute path in the guest (any bytes), and its size in bytes (0 when deleted)."""

    path: bytes
    status: Literal["created", "modified", "deleted"]
    size: int
    kind: Literal["file", "symlink"]


@dataclass(frozen=True)
class ChangeSet:
    """What one command changed: `rows` are the first of `total`, sorted by path; `duration_us` is the scan's own time."""

    total: int
    rows: tuple[FileChange, ...]
    scanned_entries: int
    duration_us: int


def count_changes(result: Path) -> int:
    """How many rows a result has. Raises as `read_changes` does."""
    with _open(result) as file:
        return _header(file)[0]


def read_changes(result: Path, cursor: int, limit: int) -> tuple[list[FileChange], int | None]:
    """Up to `limit` rows from row `cursor` on, and the cursor after them (None at the end).

    Raises FileNotFoundError where there is no result (so also of a command without changes), ValueError for a file that
    no scanner wrote, OSError.
    """
    if cursor < 0 or limit < 0:
        raise ValueError("a cursor and a limit are not negative")
    with _open(result) as file:
        return _page(file, cursor, limit)


def check_result(result: Path) -> int:
    """How many rows a result has that a guest wrote. Raises ValueError unless every one, and the index, is as a scanner writes them; OSError."""
    with _open(result) as file:
        total, index = _header(file)
        if not 0 < total <= MAX_LISTED:
            raise ValueError(f"{total} rows; 1 to {MAX_LISTED} are taken")
        offsets = []
        for number in range(total):
            if number % _INDEX_EVERY == 0:
                offsets.append(file.tell())
            _row(file)
        if file.tell() != index or file.read() != b"".join(map(_OFFSET.pack, offsets)):
            raise ValueError("the result is damaged")
        return total


def _open(result: Path) -> BinaryIO:
    # The scanner's user could put anything here: never follow, never wait for the other end of a FIFO.
    fd = os.open(result, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError("the result is not a regular file")
    return open(fd, "rb", closefd=True)  # noqa: PTH123  (an open descriptor, which the caller closes)


def _header(file: BinaryIO) -> tuple[int, int]:
    """Number of rows and place of the index."""
    magic, total, index, _ = _HEADER.unpack(_exactly(file, _HEADER.size))
    if magic != _MAGIC:
        raise ValueError("the result has another format")
    return total, index


def _page(file: BinaryIO, cursor: int, limit: int) -> tuple[list[FileChange], int | None]:
    total, index = _header(file)
    last = min(total, cursor + limit)
    if cursor >= last:
        return [], cursor if cursor < total else None
    file.seek(_seekable(index + _OFFSET.size * (cursor // _INDEX_EVERY)))
    file.seek(_seekable(_OFFSET.unpack(_exactly(file, _OFFSET.size))[0]))
    rows: list[FileChange] = []
    for number in range(cursor - cursor % _INDEX_EVERY, last):
        row = _row(file)
        if number >= cursor:
            rows.append(row)
    return rows, last if last < total else None


def _row(file: BinaryIO) -> FileChange:
    status, kind, length, size = _ROW.unpack(_exactly(file, _ROW.size))
    path = _exactly(file, length)
    if status not in _STATUS or kind not in _KIND or not 1 < length <= _MAX_PATH_BYTES or size >= 1 << 63:
        raise ValueError("the result is damaged")
    if not path.startswith(b"/") or b"\0" in path or _UNTRUE.search(path):
        raise ValueError("the result is damaged")
    return FileChange(path, _STATUS[status], size, _KIND[kind])


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise ValueError("the result ends early")
    return data


def _seekable(offset: int) -> int:
    if offset >= 1 << 62:
        raise ValueError("the result is damaged")
    return offset
