"""The form of a backup: a tar file whose disks are sparse as GNU tar writes them (pax, sparse format 1.0), so that `tar -xSf` reads it too.

Every member's bytes in the archive have a SHA-256, which a manifest further behind names. For a sparse file these are its map and its data.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tarfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from innkeeper.errors import InnkeeperError

BLOCK = 512
PIECE_BYTES = 1 << 20
END = bytes(2 * BLOCK)
PAX_MAX_BYTES = 1 << 20
MAP_MAX_ENTRIES = 10_000_000
# Every part of a name: no way up, nothing hidden, nothing that a shell or a terminal would take for its own.
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:@+-]{0,254}")

Extent = tuple[int, int]


class ArchiveError(InnkeeperError):
    """The archive is damaged, incomplete, or none of ours."""

    code = "archive_damaged"


@dataclass(frozen=True, slots=True)
class Entry:
    """A member as a manifest names it. `bytes` is what it takes in the archive, `size` its size as a file."""

    name: str
    bytes: int
    size: int
    sha256: str


def valid_name(name: str) -> bool:
    """Whether the name is one that a backup may hold."""
    return len(name) <= 1_000 and all(PART.fullmatch(part) for part in name.split("/"))


def extents(descriptor: int) -> list[Extent]:
    """Where a file has data: (offset, length) in ascending order, without its holes."""
    size, position, found = os.fstat(descriptor).st_size, 0, []
    while position < size:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        position = min(size, os.lseek(descriptor, start, os.SEEK_HOLE))
        found.append((start, position - start))
    return found


class ArchiveWriter:
    """Makes an archive's bytes, member by member, and remembers each for the manifest."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._mtime = int(time.time())

    def file(self, name: str, descriptor: int) -> Iterator[bytes]:
        """The bytes of a member with the content of an open file, which must not change meanwhile. Holes take nothing.

        Raises OSError; ValueError for a file that became shorter.
        """
        size, found = os.fstat(descriptor).st_size, extents(descriptor)
        if found == [(0, size)] or size == 0:
            yield from self._member(name, size, _data(descriptor, [(0, size)]), archived=size)
            return
        # As GNU tar does it: a hole at the end is marked by an extent without data.
        listed = found if found and sum(found[-1]) == size else [*found, (size, 0)]
        head = _map(listed)
        archived = len(head) + sum(length for _, length in found)
        yield from self._member(name, size, _chain(head, _data(descriptor, found)), archived=archived, sparse=True)

    def text(self, name: str, content: bytes) -> Iterator[bytes]:
        """The bytes of a member with this content."""
        yield from self._member(name, len(content), iter((content,)), archived=len(content))

    def _member(
        self, name: str, size: int, body: Iterator[bytes], *, archived: int, sparse: bool = False
    ) -> Iterator[bytes]:
        if not valid_name(name):
            raise ValueError(f"not a name for a backup's member: {name!r}")
        info = tarfile.TarInfo(f"GNUSparseFile.0/{name}" if sparse else name)
        info.size, info.mode, info.mtime = archived, 0o600, self._mtime
        if sparse:
            info.pax_headers = {
                "GNU.sparse.major": "1",
                "GNU.sparse.minor": "0",
                "GNU.sparse.name": name,
                "GNU.sparse.realsize": str(size),
            }
        yield info.tobuf(tarfile.PAX_FORMAT)
        digest, written = hashlib.sha256(), 0
        for piece in body:
            digest.update(piece)
            written += len(piece)
            yield piece
        if written != archived:
            raise ValueError(f"{name} changed while it was read")
        yield bytes(-archived % BLOCK)
        self.entries.append(Entry(name, archived, size, digest.hexdigest()))


def _map(listed: Iterable[Extent]) -> bytes:
    numbers = [number for extent in listed for number in extent]
    text = "".join(f"{number}\n" for number in (len(numbers) // 2, *numbers)).encode()
    return text + bytes(-len(text) % BLOCK)


def _chain(head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from rest


def _data(descriptor: int, found: Iterable[Extent]) -> Iterator[bytes]:
    for start, length in found:
        position, end = start, start + length
        while position < end and (piece := os.pread(descriptor, min(PIECE_BYTES, end - position), position)):
            position += len(piece)
            yield piece


class Member:
    """A member that is being read: take its content by `save` or `read`, once, before the next one."""

    def __init__(self, file: BinaryIO, name: str, archived: int, size: int, *, sparse: bool) -> None:
        self.name, self.archived, self.size, self.sparse = name, archived, size, sparse
        self._file = file
        self._left = archived
        self._digest = hashlib.sha256()

    def save(self, descriptor: int | None) -> Entry:
        """Write the content to an empty file, sparse where it was; None only reads it. What was read, for the manifest to be held against.

        Raises ArchiveError, OSError.
        """
        listed = self._read_map() if self.sparse else [(0, self.size)]
        if descriptor is not None:
            os.ftruncate(descriptor, self.size)
        for start, length in listed:
            position, end = start, start + length
            if not 0 <= start <= end <= self.size:
                raise ArchiveError(f"{self.name}: its map does not fit it")
            while position < end:
                piece = self._take(min(PIECE_BYTES, end - position))
                if descriptor is not None:
                    _pwrite_all(descriptor, piece, position)
                position += len(piece)
        if self._left:
            raise ArchiveError(f"{self.name}: its map does not fit it")
        return self._entry()

    def read(self, max_bytes: int) -> tuple[bytes, Entry]:
        """The content of a small member. Raises ArchiveError."""
        if self.sparse or self.archived > max_bytes:
            raise ArchiveError(f"{self.name}: too large")
        pieces = []
        while self._left:
            pieces.append(self._take(min(PIECE_BYTES, self._left)))
        return b"".join(pieces), self._entry()

    def _entry(self) -> Entry:
        _exactly(self._file, -self.archived % BLOCK)
        return Entry(self.name, self.archived, self.size, self._digest.hexdigest())

    def _take(self, count: int) -> bytes:
        if count > self._left:
            raise ArchiveError(f"{self.name}: its map does not fit it")
        piece = _exactly(self._file, count)
        self._digest.update(piece)
        self._left -= count
        return piece

    def _read_map(self) -> list[Extent]:
        text = self._take(BLOCK)
        count = _number(text.partition(b"\n")[0])
        if count > MAP_MAX_ENTRIES:
            raise ArchiveError(f"{self.name}: its map is too large")
        pieces, lines = [text], text.count(b"\n")
        while lines < 1 + 2 * count:
            pieces.append(self._take(BLOCK))
            lines += pieces[-1].count(b"\n")
        numbers = [_number(line) for line in b"".join(pieces).split(b"\n")[1 : 1 + 2 * count]]
        return list(zip(numbers[::2], numbers[1::2], strict=True))


def members(file: BinaryIO) -> Iterator[Member]:
    """The members of an archive that was made here, in order. Raises ArchiveError, also for an archive that ends too early."""
    while (header := _exactly(file, BLOCK)) != bytes(BLOCK):
        extended: dict[str, str] = {}
        info = _header(header)
        if info.type == tarfile.XHDTYPE:
            if info.size > PAX_MAX_BYTES:
                raise ArchiveError("a header is too large")
            extended = _records(_exactly(file, info.size))
            _exactly(file, -info.size % BLOCK)
            info = _header(_exactly(file, BLOCK))
        if info.type != tarfile.REGTYPE:
            raise ArchiveError(f"{info.name!r} is not a file")
        archived = _number(extended["size"].encode()) if "size" in extended else info.size
        sparse = "GNU.sparse.realsize" in extended
        size = _number(extended["GNU.sparse.realsize"].encode()) if sparse else archived
        name = extended.get("GNU.sparse.name") or extended.get("path") or info.name
        if not valid_name(name):
            raise ArchiveError(f"{name!r} is not a name that a backup holds")
        yield Member(file, name, archived, size, sparse=sparse)


def _header(block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise ArchiveError("a header is damaged") from error


def _records(data: bytes) -> dict[str, str]:
    """The records of a pax header: `<length> <key>=<value>` and a newline each, the length counting all of it."""
    found = {}
    while data:
        length = _number(data.partition(b" ")[0])
        record, data = data[:length], data[length:]
        key, equals, value = record.partition(b" ")[2].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise ArchiveError("a header is damaged")
        found[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "replace")
    return found


def _number(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise ArchiveError("a number is none")
    return int(text)


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise ArchiveError("the archive ends too early")
    return data


def _pwrite_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
