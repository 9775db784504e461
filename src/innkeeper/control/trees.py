"""Trees of an instance's files: found, searched, moved, copied, removed, packed, unpacked and watched. `control/files.py` has single files."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from innkeeper.bus.contract import Data
from innkeeper.control import audit
from innkeeper.control.files import PAGE_MAX, FileEntry
from innkeeper.control.guest_calls import ask, next_event, reading, send, until_done, wire_path
from innkeeper.control.live_table import Entry
from innkeeper.core.host_verbs import path_from_wire
from innkeeper.core.token import Principal
from innkeeper.core.tree_verbs import (
    CopyPath,
    FindWorkdir,
    GlobFiles,
    MakeDirectory,
    PackTree,
    RemovePath,
    RenamePath,
    SearchFiles,
    UnpackTree,
    WatchTree,
)
from innkeeper.errors import InvalidRequestError

if TYPE_CHECKING:
    from innkeeper.control.context import Control

AUDITED_CHARACTERS = 1_000


@dataclass(frozen=True, slots=True)
class Found:
    """A page of paths that a pattern took; `entries` are named by their path from the directory. Only an absent cursor is the end."""

    entries: tuple[FileEntry, ...]
    unreadable: int
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class SearchQuery:
    """What to look for in the text files below a directory: text or, with `regex`, an expression (RE2); `include` is a pattern of paths or names."""

    text: str
    regex: bool = False
    ignore_case: bool = False
    include: str | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """A line that was found: `text` is the line, or where `cut` a part of it around the match; `line` and `column` (in bytes) count from 1."""

    path: str
    line: int
    column: int
    text: str
    cut: bool


@dataclass(frozen=True, slots=True)
class Matches:
    """A page of lines, and what the page passed over: files that are not text or not to be opened, lines that were looked at in pieces."""

    matches: tuple[Match, ...]
    binary: int
    unreadable: int
    long_lines: int
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Tally:
    """What a copy or an archive made: entries, bytes, and how many it left out (devices, FIFOs, sockets)."""

    files: int
    bytes: int
    skipped: int


@dataclass(frozen=True, slots=True)
class TreeEvent:
    """What happened: `created`, `modified`, `deleted`, `moved` (from `moved_from`), or `overflow`: some of it is not known."""

    type: str
    path: str | None = None
    moved_from: str | None = None
    directory: bool = False


async def absolute(control: Control, principal: Principal, entry: Entry, path: bytes) -> bytes:
    """The path itself, or where it is relative, below the directory in which the instance's commands begin."""
    if path.startswith(b"/"):
        return path
    answer = await ask(control, principal, entry, FindWorkdir(entry.instance.id))
    return path_from_wire(answer["path"]).rstrip(b"/") + b"/" + path


async def glob(
    control: Control,
    principal: Principal,
    entry: Entry,
    path: bytes,
    pattern: str,
    *,
    cursor: str | None = None,
    limit: int = PAGE_MAX,
) -> Found:
    """A page of the entries below a directory that a pattern takes. Raises FileMissingError, InvalidRequestError."""
    verb = GlobFiles(entry.instance.id, wire_path(path), _text("pattern", pattern), cursor=cursor, limit=limit)
    answer = await ask(control, principal, entry, verb)
    rows = (FileEntry(row["path"], row["type"], row["size"], row["mode"], row["mtime_ns"]) for row in answer["entries"])
    return Found(tuple(rows), answer["unreadable"], answer["next_cursor"])


async def search(
    control: Control,
    principal: Principal,
    entry: Entry,
    path: bytes,
    query: SearchQuery,
    *,
    cursor: str | None = None,
    limit: int = PAGE_MAX,
) -> Matches:
    """A page of the lines below a directory, or of one file, that hold something. Raises FileMissingError, InvalidRequestError."""
    verb = SearchFiles(
        entry.instance.id,
        wire_path(path),
        _text("query", query.text),
        regex=query.regex,
        ignore_case=query.ignore_case,
        include=None if query.include is None else _text("include", query.include),
        cursor=cursor,
        limit=limit,
    )
    answer = await ask(control, principal, entry, verb)
    return Matches(
        tuple(Match(**row) for row in answer["matches"]),
        answer["binary"],
        answer["unreadable"],
        answer["long_lines"],
        answer["next_cursor"],
    )


async def make_directory(control: Control, principal: Principal, entry: Entry, path: bytes, *, parents: bool) -> None:
    """Make a directory; with `parents` one that exists is no error. Raises ConflictError, FileMissingError."""
    verb = MakeDirectory(entry.instance.id, wire_path(path), parents=parents)
    await ask(control, principal, entry, verb)
    _audit(control, principal, entry, "file.mkdir", path=verb.path)


async def rename(
    control: Control, principal: Principal, entry: Entry, path: bytes, to: bytes, *, replace: bool
) -> None:
    """Give a file or directory another name. Raises FileMissingError; ConflictError for a name that is taken."""
    verb = RenamePath(entry.instance.id, wire_path(path), wire_path(to), replace=replace)
    await ask(control, principal, entry, verb)
    _audit(control, principal, entry, "file.rename", path=verb.path, to=verb.to)


async def copy(
    control: Control,
    principal: Principal,
    entry: Entry,
    path: bytes,
    to: bytes,
    *,
    recursive: bool,
    replace: bool,
) -> Tally:
    """Copy a file, or with `recursive` a directory, whole or not at all. Raises as `rename`; ConflictError for a full disk too."""
    verb = CopyPath(entry.instance.id, wire_path(path), wire_path(to), recursive=recursive, replace=replace)
    answer = await until_done(control, principal, entry, verb)
    _audit(control, principal, entry, "file.copy", path=verb.path, to=verb.to)
    return Tally(**answer)


async def remove(control: Control, principal: Principal, entry: Entry, path: bytes, *, recursive: bool) -> None:
    """Remove a file, an empty directory, or with `recursive` a whole one. Raises FileMissingError; ConflictError for a directory that is not empty."""
    verb = RemovePath(entry.instance.id, wire_path(path), recursive=recursive)
    await until_done(control, principal, entry, verb)
    _audit(control, principal, entry, "file.remove", path=verb.path)


@asynccontextmanager
async def pack(
    control: Control, principal: Principal, entry: Entry, path: bytes
) -> AsyncIterator[AsyncIterator[bytes]]:
    """What a directory holds, or one file, as a tar stream. Raises FileMissingError, ForbiddenError."""

    async def pieces() -> AsyncIterator[bytes]:
        while (event := await next_event(events)) is not None:
            if isinstance(event, Data):
                yield event.data

    async with reading(control, principal, entry, PackTree(entry.instance.id, wire_path(path))) as (_, events):
        control.metrics.file_reads += 1
        yield pieces()


async def unpack(
    control: Control,
    principal: Principal,
    entry: Entry,
    path: bytes,
    chunks: AsyncIterable[bytes],
    *,
    max_bytes: int | None = None,
) -> Tally:
    """Unpack a tar archive, plain or compressed, into a directory, whole or not at all. Raises InvalidRequestError for one that is broken or leads out."""
    verb = UnpackTree(entry.instance.id, wire_path(path))
    control.metrics.file_writes += 1
    answer = await send(control, principal, entry, verb, chunks, max_bytes=max_bytes)
    _audit(control, principal, entry, "file.unpack", path=verb.path)
    return Tally(**answer)


@asynccontextmanager
async def watch(
    control: Control, principal: Principal, entry: Entry, path: bytes, *, recursive: bool
) -> AsyncIterator[AsyncIterator[TreeEvent]]:
    """What changes in a directory or below it, from now on; ends when the directory is gone.

    Raises:
        RateLimitedError: too many watches of the instance.
        PayloadTooLargeError: too many directories.

    """
    verb = WatchTree(entry.instance.id, wire_path(path), recursive=recursive)
    async with reading(control, principal, entry, verb) as (_, events):
        yield _events(events)


async def _events(events: AsyncIterator[Any]) -> AsyncIterator[TreeEvent]:
    rest = b""
    # Not `next_event`: a quiet directory may say nothing for days.
    async for event in events:
        if not isinstance(event, Data):
            continue
        *lines, rest = (rest + event.data).split(b"\n")
        for line in map(json.loads, lines):
            yield TreeEvent(line["type"], line.get("path"), line.get("from"), line.get("directory", False))


def _text(name: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(f"{name}: must be valid Unicode") from None
    if "\0" in value:
        raise InvalidRequestError(f"{name}: must not contain NUL")
    return value


def _audit(control: Control, principal: Principal, entry: Entry, action: str, **details: str) -> None:
    cut = {name: value[:AUDITED_CHARACTERS] for name, value in details.items()} | entry.marks
    control.later.audit(audit.event(principal, action, "instance", entry.instance.id, cut))
