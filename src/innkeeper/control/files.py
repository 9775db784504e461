"""Files of an instance: read, stat, write, list; and the public ones, by the instance's public id alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from innkeeper.bus.contract import Call, Data, Message
from innkeeper.control import audit, lifecycle, provisioning, rooms
from innkeeper.control.live_table import Entry
from innkeeper.core.host_verbs import ListFiles, ReadFile, StatFile, WriteFile, path_to_wire, to_wire
from innkeeper.core.instance import Instance
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import (
    FileMissingError,
    InstanceFailedError,
    InstanceNotFoundError,
    InvalidRequestError,
    PayloadTooLargeError,
    UnavailableError,
)

if TYPE_CHECKING:
    from innkeeper.control.context import Control

PATH_BYTES_MAX = 4_095
PAGE_MAX = 1_000
HOST_SECONDS = 30.0
# Longest silence between two pieces of a file.
STALL_SECONDS = 60.0
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
    """An open file: its size (of the whole file), time, type, and its bytes from the asked offset on."""

    def __init__(self, instance: Instance, head: dict[str, Any], events: AsyncIterator[Any]) -> None:
        self.instance = instance
        self.size: int = head["size"]
        self.mtime_ns: int = head["mtime_ns"]
        self.mime: str = head["mime"]
        self._events = events

    @property
    def chunks(self) -> AsyncIterator[bytes]:
        """The bytes, as they come. Raises the typed error when the file cannot be read to its end."""
        return self._chunks()

    async def _chunks(self) -> AsyncIterator[bytes]:
        while (event := await _next(self._events)) is not None:
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
    wire_path = _wire(path)
    _check_range(offset, length)
    control.metrics.file_reads += 1
    async with _reading(control, principal, entry, wire_path, offset, length, max_bytes, None) as reader:
        yield reader


@asynccontextmanager
async def read_public(
    control: Control, public_id: UUID, path: bytes, *, offset: int = 0, length: int | None = None
) -> AsyncIterator[FileReader]:
    """Open a public file: whoever knows the instance's public id may, as far as its `public_files` says.

    Raises:
        FileMissingError: no such instance, file or permission; they look alike.

    """
    wire_path = _wire(path)
    _check_range(offset, length)
    entry = control.live.by_public_id(public_id) or await rooms.load_public(control, public_id)
    if entry is None or entry.doomed or entry.spec.public_files == "off":
        raise FileMissingError
    control.metrics.public_file_reads += 1
    nobody = Principal(entry.instance.organization_id, None, frozenset({PUBLIC}), "public")
    public = entry.spec.public_files
    async with _reading(control, nobody, entry, wire_path, offset, length, None, public) as reader:
        yield reader


async def stat(control: Control, principal: Principal, entry: Entry, path: bytes) -> FileStat:
    """What a path of an instance is. Raises as `read`."""
    wire_path = _wire(path)
    answer = await _request(control, principal, entry, StatFile(entry.instance.id, wire_path))
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
    wire_path = _wire(path)
    if not 1 <= limit <= PAGE_MAX:
        raise InvalidRequestError(f"limit: must be between 1 and {PAGE_MAX}")
    answer = await _request(
        control, principal, entry, ListFiles(entry.instance.id, wire_path, cursor=cursor, limit=limit)
    )
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
    max_bytes: int | None = None,
) -> FileWritten:
    """Write a file of an instance, whole or not at all; missing directories are made.

    Raises:
        PayloadTooLargeError: `chunks` gave more than `max_bytes`; nothing is written.

    """
    wire_path = _wire(path)
    if mode is not None and not 0 <= mode <= 0o7777:
        raise InvalidRequestError("mode: must be between 0 and 07777")
    await lifecycle.usable(control, principal, entry)
    control.metrics.file_writes += 1
    verb = WriteFile(entry.instance.id, wire_path, mode=mode)
    with _Open(control, entry):
        async with control.bus.open(_host(entry), WriteFile.verb, to_wire(verb)) as call:
            await _send(call, chunks, max_bytes)
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    answer = await call.result()
            except TimeoutError:
                raise UnavailableError("The host did not answer in time") from None
            except InstanceNotFoundError:
                # What the caller sent is spent, so it is the caller who has to send it again.
                provisioning.mark_lost(control, entry)
                raise UnavailableError("The guest is gone; the next use starts it again on its disk") from None
    control.later.audit(
        audit.event(principal, "file.write", "instance", entry.instance.id, {"path": wire_path[:1_000]})
    )
    return FileWritten(entry.instance, answer["bytes"], bool(answer["created"]))


class _Open:
    """Counts a stream as use of the instance, so that it does not expire under it."""

    def __init__(self, control: Control, entry: Entry) -> None:
        self._control = control
        self._entry = entry

    def __enter__(self) -> None:
        self._entry.open_streams += 1

    def __exit__(self, *_: object) -> None:
        self._entry.open_streams -= 1
        self._control.live.touch(self._entry)


@asynccontextmanager
async def _reading(
    control: Control,
    principal: Principal,
    entry: Entry,
    wire_path: str,
    offset: int,
    length: int | None,
    max_bytes: int | None,
    public: str | None,
) -> AsyncIterator[FileReader]:
    await lifecycle.usable(control, principal, entry)
    verb = ReadFile(entry.instance.id, wire_path, offset=offset, length=length, max_bytes=max_bytes, public=public)
    params = to_wire(verb)
    with _Open(control, entry):
        for attempt in range(2):
            async with control.bus.open(_host(entry), ReadFile.verb, params) as call:
                events = aiter(call.events())
                try:
                    head = await _next(events)
                except InstanceNotFoundError:
                    if attempt:
                        raise InstanceFailedError("The guest is gone") from None
                else:
                    if not isinstance(head, Message):
                        raise UnavailableError("The host answered out of turn")
                    yield FileReader(entry.instance, head.body, events)
                    return
            await lifecycle.revive(control, principal, entry)


async def _request(control: Control, principal: Principal, entry: Entry, verb: Any) -> dict[str, Any]:
    await lifecycle.usable(control, principal, entry)
    with _Open(control, entry):
        try:
            return await control.bus.request(_host(entry), verb.verb, to_wire(verb), timeout_seconds=HOST_SECONDS)
        except InstanceNotFoundError:
            await lifecycle.revive(control, principal, entry)
            return await control.bus.request(_host(entry), verb.verb, to_wire(verb), timeout_seconds=HOST_SECONDS)


async def _send(call: Call, chunks: AsyncIterable[bytes], max_bytes: int | None) -> None:
    sent = 0
    async for chunk in chunks:
        sent += len(chunk)
        if max_bytes is not None and sent > max_bytes:
            raise PayloadTooLargeError(f"The file is larger than {max_bytes} bytes")
        if chunk:
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    await call.send_data(chunk)
            except TimeoutError:
                # The guest decides when it takes more.
                raise UnavailableError("The guest takes no more of the file") from None
    await call.send_end()


async def _next(events: AsyncIterator[Any]) -> Any:
    try:
        async with asyncio.timeout(STALL_SECONDS):
            return await anext(events, None)
    except TimeoutError:
        raise UnavailableError("The host did not answer in time") from None


def _wire(path: bytes) -> str:
    if not path.startswith(b"/") or b"\0" in path or len(path) > PATH_BYTES_MAX:
        raise InvalidRequestError(f"path: must be absolute, without NUL, at most {PATH_BYTES_MAX} bytes")
    return path_to_wire(path)


def _check_range(offset: int, length: int | None) -> None:
    if offset < 0 or (length is not None and length < 0):
        raise InvalidRequestError("range: must not be negative")


def _host(entry: Entry) -> UUID:
    if entry.instance.host_id is None:
        raise UnavailableError(f"The {entry.kind} has no host")
    return entry.instance.host_id
