"""The files of a build's context: a tar stream kept as it came, an index of it, and new tar streams made of parts of it. Nothing is ever unpacked here.

The stream comes from a client and is read with suspicion: names that lead elsewhere, types that no context has, and headers of absurd lengths are refused.
"""

from __future__ import annotations

import bz2
import hashlib
import io
import lzma
import os
import posixpath
import tarfile
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import IO

import anyio.to_thread

from innkeeper.core.build_context import ContextEntry, Selected
from innkeeper.errors import InvalidRequestError

FILES_MAX = 500_000
PIECE_BYTES = 262_144
# A name or a link target has at most 4 KiB; what tarfile reads in one go beyond that is no header of ours.
READ_BYTES_MAX = 1_048_576
_BLOCK = 512


class _Bounded(io.RawIOBase):
    """A file whose single reads are bounded: tarfile reads as much as a header says that an extended header has."""

    def __init__(self, file: IO[bytes]) -> None:
        self._inner = file

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > READ_BYTES_MAX:
            raise tarfile.ReadError("an extended header is too long")
        return self._inner.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._inner.seek(offset, whence)

    def tell(self) -> int:
        return self._inner.tell()


def index_context(path: Path) -> dict[str, ContextEntry]:
    """The entries of a context by path, directories that are only implied included. Reads every byte once.

    Raises:
        InvalidRequestError: it is no tar stream, or not one of a build context.

    """
    index: dict[str, ContextEntry] = {}
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=_Bounded(file), mode="r:", errorlevel=2) as archive:
                for member in archive:
                    _add(index, member, file)
                    # It would keep every one of them.
                    setattr(archive, "members", [])  # noqa: B010  # typeshed does not know the attribute
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            raise InvalidRequestError(f"context: not a tar stream that can be read: {error}") from None
    return index


def _add(index: dict[str, ContextEntry], member: tarfile.TarInfo, file: IO[bytes]) -> None:
    name = _name(member.name)
    if name == "":
        return
    if len(index) >= FILES_MAX:
        raise InvalidRequestError(f"context: more than {FILES_MAX} files")
    parent = posixpath.dirname(name)
    while parent and parent not in index:
        index[parent] = ContextEntry(parent, "dir", 0o755)
        parent = posixpath.dirname(parent)
    if parent and index[parent].type != "dir":
        raise InvalidRequestError(f"context: {member.name[:200]!r} lies below a file")
    mode, mtime = member.mode & 0o7777, max(0, int(member.mtime))
    if member.isdir():
        index[name] = ContextEntry(name, "dir", mode, mtime=mtime)
    elif member.issym():
        index[name] = ContextEntry(name, "symlink", 0o777, target=member.linkname, mtime=mtime)
    elif member.isreg() and not member.issparse():
        file.seek(member.offset_data)
        digest, archive = _digest(file, member.size)
        index[name] = ContextEntry(
            name,
            "file",
            mode,
            size=member.size,
            offset=member.offset_data,
            digest=digest,
            archive=archive,
            mtime=mtime,
        )
    else:
        raise InvalidRequestError(f"context: {member.name[:200]!r} is neither a file, a directory nor a symlink")


def _name(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or name.startswith("/") or "\0" in name or len(os.fsencode(name)) > 4_095:
        raise InvalidRequestError(f"context: {name[:200]!r} is no name for a file in a context")
    return "/".join(parts)


def _digest(file: IO[bytes], size: int) -> tuple[str, bool]:
    digest = hashlib.sha256()
    head = b""
    left = size
    while left:
        piece = file.read(min(PIECE_BYTES, left))
        if not piece:
            raise InvalidRequestError("context: the stream ends in the middle of a file")
        head = head or piece
        digest.update(piece)
        left -= len(piece)
    return digest.hexdigest(), is_archive(head)


def is_archive(head: bytes) -> bool:
    """Whether a file that begins so is a tar archive, compressed or not: what ADD unpacks. Judged by content, as Docker does."""
    try:
        if head.startswith(b"\x1f\x8b"):
            head = zlib.decompressobj(wbits=31).decompress(head, _BLOCK)
        elif head.startswith(b"BZh"):
            head = bz2.BZ2Decompressor().decompress(head, _BLOCK)
        elif head.startswith(b"\xfd7zXZ\0"):
            head = lzma.LZMADecompressor(memlimit=1 << 28).decompress(head, _BLOCK)
        tarfile.TarInfo.frombuf(head[:_BLOCK], "utf-8", "surrogateescape")
    except (tarfile.HeaderError, OSError, EOFError, zlib.error, lzma.LZMAError):
        return False
    return True


async def tar_of(path: Path, selected: Iterable[Selected]) -> AsyncIterator[bytes]:
    """A tar stream of entries of the context at `path`, under their selected names."""
    async for piece in _each_in_thread(_tar_pieces(path, list(selected))):
        yield piece


async def tar_of_texts(texts: Iterable[tuple[str, bytes]]) -> AsyncIterator[bytes]:
    """A tar stream of small files by name and content."""
    for name, content in texts:
        yield _header(name, ContextEntry(name, "file", 0o644, size=len(content))) + content + _padding(len(content))
    yield b"\0" * (2 * _BLOCK)


async def bytes_of(path: Path, entry: ContextEntry) -> AsyncIterator[bytes]:
    """The bytes of one file of the context."""
    async for piece in _each_in_thread(_file_pieces(path, entry)):
        yield piece


def _tar_pieces(path: Path, selected: list[Selected]) -> Iterator[bytes]:
    buffer = bytearray()
    with path.open("rb") as file:
        for one in selected:
            buffer += _header(one.name, one.entry)
            left = one.entry.size if one.entry.type == "file" else 0
            file.seek(one.entry.offset)
            while left:
                piece = file.read(min(PIECE_BYTES, left))
                if not piece:
                    raise InvalidRequestError("context: the stream ends in the middle of a file")
                left -= len(piece)
                buffer += piece
                if len(buffer) >= PIECE_BYTES:
                    yield bytes(buffer)
                    buffer.clear()
            buffer += _padding(one.entry.size if one.entry.type == "file" else 0)
            if len(buffer) >= PIECE_BYTES:
                yield bytes(buffer)
                buffer.clear()
    yield bytes(buffer) + b"\0" * (2 * _BLOCK)


def _file_pieces(path: Path, entry: ContextEntry) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(entry.offset)
        left = entry.size
        while left:
            piece = file.read(min(PIECE_BYTES, left))
            if not piece:
                raise InvalidRequestError("context: the stream ends in the middle of a file")
            left -= len(piece)
            yield piece


async def _each_in_thread(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    while (piece := await anyio.to_thread.run_sync(next, pieces, None)) is not None:
        yield piece


def _header(name: str, entry: ContextEntry) -> bytes:
    info = tarfile.TarInfo(name)
    info.type = {"dir": tarfile.DIRTYPE, "symlink": tarfile.SYMTYPE}.get(entry.type, tarfile.REGTYPE)
    info.mode, info.mtime, info.linkname = entry.mode, entry.mtime, entry.target
    info.size = entry.size if entry.type == "file" else 0
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _padding(size: int) -> bytes:
    return b"\0" * (-size % _BLOCK)
