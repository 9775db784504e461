"""Files of an instance: read, stat, write, list; and the public ones, by the instance's public id alone."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from innkeeper.bus.contract import Data
from innkeeper.control import audit, rooms
from innkeeper.control.guest_calls import ask, next_event, reading, send, wire_path
from innkeeper.control.live_table import Entry
from innkeeper.core.host_verbs import ListFiles, ReadFile, StatFile, WriteFile
from innkeeper.core.instance import Instance
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import FileMissingError, InvalidRequestError

if TYPE_CHECKING:
    from innkeeper.control.context import Control

PAGE_MAX = 1_000
PUBLIC = Scope.ROOMS


@dataclass(frozen=True, slots=True)
class FileStat:
    """What a path is: type `file`, `dir`, `symlink` or `other`; `target` of a symlink in the wire's spelling."""

    type: str
    size: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    target: str | None


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One name of a directory, in the wire's spelling (`host_verbs.path_to_wire`)."""

    name: str
    type: str
    size: int
    mode: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class FilePage:
    """Names in order of their bytes; `next_cursor` continues and is None at the end."""

    instance: Instance
    entries: tuple[FileEntry, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class FileWritten:
    """A file that was written: how many bytes, and whether it is new."""

    instance: Instance
    size: int
    created: bool


class FileReader:
    """An open file: its size (of the whole file), time, type, a `version` that no other content has, and its bytes from the asked offset on."""

    def __init__(self, instance: Instance, head: dict[str, Any], events: AsyncIterator[Any]) -> None:
        self.instance = instance
        self.size: int = head["size"]
        self.mtime_ns: int = head["mtime_ns"]
        self.mime: str = head["mime"]
        # Whatever writes a file moves one of these; one that is put in another's place differs in the first.
        self.version = f"{head['inode']:x}-{head['size']:x}-{head['mtime_ns']:x}-{head['ctime_ns']:x}"
        self._events = events

    @property
    def chunks(self) -> AsyncIterator[bytes]:
        """The bytes, as they come. Raises the typed error when the file cannot be read to its end."""
        return self._chunks()

    async def _chunks(self) -> AsyncIterator[bytes]:
        while (event := await next_event(self._events)) is not None:
            if isinstance(event, Data):
                yield event.data


@asynccontextmanager
async def read(
    control: Control,
    principal: Principal,
    entry: Entry,
    path: bytes,
    *,
    offset: int = 0,
    length: int | None = None,
    max_bytes: int | None = None,
) -> AsyncIterator[FileReader]:
    """Open a regular file of an instance, which is woken where it sleeps.

    Raises:
        FileMissingError: no file.
        InvalidRequestError: a directory, or not an absolute path.
        PayloadTooLargeError: more than `max_bytes`.

    """
    wired = wire_path(path)
    _check_range(offset, length)
    control.metrics.file_reads += 1
    async with _reading(control, principal, entry, wired, offset, length, max_bytes, None) as reader:
        yield reader


@asynccontextmanager
async def read_public(
    control: Control, public_id: UUID, path: bytes, *, offset: int = 0, length: int | None = None
) -> AsyncIterator[FileReader]:
    """Open a public file: whoever knows the instance's public id may, as far as its `public_files` says.

    Raises:
        FileMissingError: no such instance, file or permission; they look alike.

    """
    wired = wire_path(path)
    _check_range(offset, length)
    entry = control.live.by_public_id(public_id) or await rooms.load_public(control, public_id)
    if entry is None or entry.doomed or entry.spec.public_files == "off":
        raise FileMissingError
    control.metrics.public_file_reads += 1
    nobody = Principal(entry.instance.organization_id, None, frozenset({PUBLIC}), "public")
    public = entry.spec.public_files
    async with _reading(control, nobody, entry, wired, offset, length, None, public) as reader:
        yield reader


async def stat(control: Control, principal: Principal, entry: Entry, path: bytes, *, follow: bool = True) -> FileStat:
    """What a path of an instance is; without `follow`, of a symlink, what it is itself. Raises as `read`."""
    wired = wire_path(path)
    answer = await ask(control, principal, entry, StatFile(entry.instance.id, wired, follow=follow))
    return FileStat(
        type=answer["type"],
        size=answer["size"],
        mode=answer["mode"],
        uid=answer["uid"],
        gid=answer["gid"],
        mtime_ns=answer["mtime_ns"],
        target=answer.get("target"),
    )


async def list_directory(
    control: Control,
    principal: Principal,
    entry: Entry,
    path: bytes,
    *,
    cursor: str | None = None,
    limit: int = PAGE_MAX,
) -> FilePage:
    """A page of a directory of an instance. Raises as `read`; InvalidRequestError where it is no directory."""
    wired = wire_path(path)
    if not 1 <= limit <= PAGE_MAX:
        raise InvalidRequestError(f"limit: must be between 1 and {PAGE_MAX}")
    answer = await ask(control, principal, entry, ListFiles(entry.instance.id, wired, cursor=cursor, limit=limit))
    entries = tuple(
        FileEntry(row["name"], row["type"], row["size"], row["mode"], row["mtime_ns"]) for row in answer["entries"]
    )
    return FilePage(entry.instance, entries, answer["next_cursor"])


async def write(
    control: Control,
    principal: Principal,
    entry: Entry,
    path: bytes,
    chunks: AsyncIterable[bytes],
    *,
    mode: int | None = None,
    replace: bool = True,
    max_bytes: int | None = None,
) -> FileWritten:
    """Write a file of an instance, whole or not at all; missing directories are made.

    Raises:
        ConflictError: the disk is full; or without `replace` the name is taken.
        PayloadTooLargeError: `chunks` gave more than `max_bytes`; nothing is written.

    """
    wired = wire_path(path)
    if mode is not None and not 0 <= mode <= 0o7777:
        raise InvalidRequestError("mode: must be between 0 and 07777")
    control.metrics.file_writes += 1
    verb = WriteFile(entry.instance.id, wired, mode=mode, replace=replace)
    answer = await send(control, principal, entry, verb, chunks, max_bytes=max_bytes)
    details = {"path": wired[:1_000], **entry.marks}
    control.later.audit(audit.event(principal, "file.write", "instance", entry.instance.id, details))
    return FileWritten(entry.instance, answer["bytes"], bool(answer["created"]))


@asynccontextmanager
async def _reading(
    control: Control,
    principal: Principal,
    entry: Entry,
    wired: str,
    offset: int,
    length: int | None,
    max_bytes: int | None,
    public: str | None,
) -> AsyncIterator[FileReader]:
    verb = ReadFile(entry.instance.id, wired, offset=offset, length=length, max_bytes=max_bytes, public=public)
    async with reading(control, principal, entry, verb) as (head, events):
        yield FileReader(entry.instance, head, events)


def _check_range(offset: int, length: int | None) -> None:
    if offset < 0 or (length is not None and length < 0):
        raise InvalidRequestError("range: must not be negative")
