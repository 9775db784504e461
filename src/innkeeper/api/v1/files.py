"""Files of a VM under `/v1/vms/{vm_id}/files`."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from innkeeper.api import sse
from innkeeper.api.body import stream_body
from innkeeper.api.disconnect import cancelled_on_disconnect
from innkeeper.api.errors import describe
from innkeeper.api.file_stream import UPLOAD_MAX_BYTES, Streamed, attachment
from innkeeper.api.json_app import CurrentPrincipal
from innkeeper.api.v1.file_schemas import (
    VmCopy,
    VmFile,
    VmFileMatch,
    VmFileMatches,
    VmFilePage,
    VmFilesFound,
    VmFileStat,
    VmFileWritten,
    VmMkdir,
    VmPath,
    VmRename,
    VmTreeMade,
)
from innkeeper.api.v1.guest_paths import path_from_text, show_path
from innkeeper.control import files, trees, vms
from innkeeper.control.context import Control
from innkeeper.control.files import PAGE_MAX, FileEntry
from innkeeper.control.live_table import Entry
from innkeeper.control.silences import with_silences
from innkeeper.control.trees import SearchQuery, TreeEvent
from innkeeper.core.host_verbs import path_from_wire
from innkeeper.core.token import Principal
from innkeeper.errors import InnkeeperError, InvalidRequestError

FILES = "/v1/vms/{vm_id}/files"
# What JsonGate must leave unread: the content of files and archives.
STREAMED_PATHS = r"/v1/vms/[^/]+/files/(content|archive)|/upload|/download"
BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
BINARY_BODY: dict[str, Any] = {"requestBody": {"required": True, "content": {"application/octet-stream": BINARY}}}

Path = Annotated[str, Query(description="Absolute, or from the directory in which the VM's commands begin.")]
Cursor = Annotated[str | None, Query(max_length=8_192, description="`next_cursor` of the page before.")]
Limit = Annotated[int, Query(ge=1, le=PAGE_MAX)]


def add_file_routes(router: APIRouter, control: Control) -> None:
    """Add the routes; each is one use case."""

    async def located(principal: Principal, vm_id: str, text: str, *, name: str = "path") -> tuple[Entry, bytes]:
        entry = await vms.ready_entry(control, principal, vm_id)
        return entry, await trees.absolute(control, principal, entry, path_from_text(name, text))

    @router.get(FILES)
    async def list_files(
        principal: CurrentPrincipal, vm_id: str, path: Path, cursor: Cursor = None, limit: Limit = PAGE_MAX
    ) -> VmFilePage:
        """A page of a directory."""
        entry, place = await located(principal, vm_id, path)
        page = await files.list_directory(control, principal, entry, place, cursor=cursor, limit=limit)
        return VmFilePage(entries=[_row(place, one) for one in page.entries], next_cursor=page.next_cursor)

    @router.delete(FILES)
    async def remove_file(principal: CurrentPrincipal, vm_id: str, path: Path, recursive: bool = False) -> VmPath:
        """Remove a file or an empty directory, with `recursive` a whole one. A symlink is removed itself."""
        entry, place = await located(principal, vm_id, path)
        await trees.remove(control, principal, entry, place, recursive=recursive)
        return VmPath(path=show_path(place))

    @router.get(f"{FILES}/stat")
    async def stat_file(principal: CurrentPrincipal, vm_id: str, path: Path, follow: bool = True) -> VmFileStat:
        """What a path is; without `follow`, of a symlink what it is itself."""
        entry, place = await located(principal, vm_id, path)
        found = await files.stat(control, principal, entry, place, follow=follow)
        row = FileEntry(show_path(place), found.type, found.size, found.mode, found.mtime_ns)
        plain = _row(b"", row).model_dump()
        return VmFileStat(**{**plain, "uid": found.uid, "gid": found.gid, "target": found.target})

    @router.get(f"{FILES}/glob")
    async def glob_files(
        principal: CurrentPrincipal,
        vm_id: str,
        path: Path,
        pattern: Annotated[str, Query(max_length=4_096, description="Such as `**/*.{py,toml}`.")],
        cursor: Cursor = None,
        limit: Limit = PAGE_MAX,
    ) -> VmFilesFound:
        """A page of what lies below a directory and matches a pattern."""
        entry, place = await located(principal, vm_id, path)
        found = await trees.glob(control, principal, entry, place, pattern, cursor=cursor, limit=limit)
        rows = [_row(place, one) for one in found.entries]
        return VmFilesFound(entries=rows, unreadable=found.unreadable, next_cursor=found.next_cursor)

    @router.get(f"{FILES}/search")
    async def search_files(
        principal: CurrentPrincipal,
        vm_id: str,
        path: Path,
        query: Annotated[str, Query(max_length=1_024, description="Text, or with `regex` an expression (RE2).")],
        regex: bool = False,
        ignore_case: bool = False,
        include: Annotated[str | None, Query(max_length=4_096, description="A pattern of names or paths.")] = None,
        cursor: Cursor = None,
        limit: Limit = PAGE_MAX,
    ) -> VmFileMatches:
        """A page of the lines of the text files below a directory, or of one file, that hold something."""
        entry, place = await located(principal, vm_id, path)
        wanted = SearchQuery(query, regex=regex, ignore_case=ignore_case, include=include)
        found = await trees.search(control, principal, entry, place, wanted, cursor=cursor, limit=limit)
        return VmFileMatches(
            matches=[
                VmFileMatch(
                    path=show_path(_below(place, one.path)),
                    line=one.line,
                    column=one.column,
                    text=one.text,
                    cut=one.cut,
                )
                for one in found.matches
            ],
            binary=found.binary,
            unreadable=found.unreadable,
            long_lines=found.long_lines,
            next_cursor=found.next_cursor,
        )

    @router.post(f"{FILES}/mkdir", status_code=201)
    async def make_directory(principal: CurrentPrincipal, vm_id: str, body: VmMkdir) -> VmPath:
        """Make a directory."""
        entry, place = await located(principal, vm_id, body.path)
        await trees.make_directory(control, principal, entry, place, parents=body.parents)
        return VmPath(path=show_path(place))

    @router.post(f"{FILES}/rename")
    async def rename_file(principal: CurrentPrincipal, vm_id: str, body: VmRename) -> VmPath:
        """Give a file or directory another name. 409 `conflict` where the name is taken."""
        entry, place = await located(principal, vm_id, body.path)
        _, to = await located(principal, vm_id, body.to, name="to")
        await trees.rename(control, principal, entry, place, to, replace=body.replace)
        return VmPath(path=show_path(to))

    @router.post(f"{FILES}/copy", status_code=201)
    async def copy_file(principal: CurrentPrincipal, vm_id: str, body: VmCopy, request: Request) -> VmTreeMade:
        """Copy a file, or with `recursive` a directory. The copy has its name when it is whole."""
        entry, place = await located(principal, vm_id, body.path)
        _, to = await located(principal, vm_id, body.to, name="to")
        async with cancelled_on_disconnect(request.receive):
            tally = await trees.copy(
                control, principal, entry, place, to, recursive=body.recursive, replace=body.replace
            )
        return VmTreeMade(path=show_path(to), files=tally.files, size=tally.bytes, skipped=tally.skipped)

    @router.get(f"{FILES}/watch", response_class=Response, responses={200: {"content": sse.CONTENT}})
    async def watch_files(principal: CurrentPrincipal, vm_id: str, path: Path, recursive: bool = False) -> Response:
        """What changes in a directory, or below it, as server-sent events from now on."""
        entry, place = await located(principal, vm_id, path)

        async def serve(_: Scope, receive: Receive, send: Send) -> None:
            async with (
                cancelled_on_disconnect(receive, after_seconds=0),
                trees.watch(control, principal, entry, place, recursive=recursive) as events,
            ):
                await _send_events(send, events)

        return Streamed(serve)

    _add_content_routes(router, control)


def _add_content_routes(router: APIRouter, control: Control) -> None:
    async def located(principal: Principal, vm_id: str, text: str) -> tuple[Entry, bytes]:
        entry = await vms.ready_entry(control, principal, vm_id)
        return entry, await trees.absolute(control, principal, entry, path_from_text("path", text))

    file_bytes: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": BINARY}}}

    @router.head(f"{FILES}/content", response_class=Response, responses=file_bytes)
    @router.get(f"{FILES}/content", response_class=Response, responses=file_bytes)
    async def read_file(principal: CurrentPrincipal, vm_id: str, path: Path) -> Response:
        """The bytes of a file. Range, If-Range and If-None-Match count."""
        entry, place = await located(principal, vm_id, path)

        return attachment(
            lambda offset, length: files.read(control, principal, entry, place, offset=offset, length=length)
        )

    @router.put(f"{FILES}/content", openapi_extra=BINARY_BODY)
    async def write_file(
        principal: CurrentPrincipal,
        vm_id: str,
        request: Request,
        path: Path,
        mode: Annotated[
            str | None, Query(pattern="^0?[0-7]{3}$", description="Of a new file; 0644 without it.")
        ] = None,
    ) -> VmFileWritten:
        """Write a file, whole or not at all; missing directories are made, the mode of an existing file is kept."""
        refuse_conditions(request)
        entry, place = await located(principal, vm_id, path)
        chunks = stream_body(request.scope, request.receive, max_bytes=UPLOAD_MAX_BYTES)
        bits = None if mode is None else int(mode, 8)
        written = await files.write(control, principal, entry, place, chunks, mode=bits, max_bytes=UPLOAD_MAX_BYTES)
        return VmFileWritten(path=show_path(place), size=written.size, created=written.created)

    @router.get(
        f"{FILES}/archive",
        response_class=Response,
        responses={200: {"content": {"application/x-tar": BINARY}}},
    )
    async def read_archive(principal: CurrentPrincipal, vm_id: str, path: Path) -> Response:
        """What a directory holds, or one file, as a tar archive."""
        entry, place = await located(principal, vm_id, path)

        async def serve(_: Scope, receive: Receive, send: Send) -> None:
            async with (
                cancelled_on_disconnect(receive),
                trees.pack(control, principal, entry, place) as pieces,
            ):
                await _send_archive(send, pieces)

        return Streamed(serve)

    @router.put(f"{FILES}/archive", openapi_extra=BINARY_BODY)
    async def write_archive(principal: CurrentPrincipal, vm_id: str, request: Request, path: Path) -> VmTreeMade:
        """Unpack a tar archive, plain or compressed by gzip, bzip2 or xz, into a directory, whole or not at all."""
        refuse_conditions(request)
        entry, place = await located(principal, vm_id, path)
        chunks = stream_body(request.scope, request.receive, max_bytes=UPLOAD_MAX_BYTES)
        tally = await trees.unpack(control, principal, entry, place, chunks, max_bytes=UPLOAD_MAX_BYTES)
        return VmTreeMade(path=show_path(place), files=tally.files, size=tally.bytes, skipped=tally.skipped)


def refuse_conditions(request: Request) -> None:
    """Refuse what is not looked at here: whoever sends it would believe that nothing of somebody else's was written over, or that a part was written."""
    for name in ("If-Match", "If-None-Match", "If-Unmodified-Since", "Content-Range"):
        if name in request.headers:
            raise InvalidRequestError(f"{name}: is not supported by this server where something is written")


def _below(directory: bytes, path: str) -> bytes:
    below = path_from_wire(path)
    return directory.rstrip(b"/") + b"/" + below if below else directory


def _row(directory: bytes, entry: FileEntry) -> VmFile:
    path = _below(directory, entry.name) if directory else path_from_wire(entry.name)
    return VmFile(
        name=show_path(path.rstrip(b"/").rpartition(b"/")[2] or b"/"),
        path=show_path(path),
        type=entry.type,
        size=entry.size,
        mode=f"{stat.S_IMODE(entry.mode):04o}",
        modified_at=file_time(entry.mtime_ns),
    )


def file_time(nanoseconds: int) -> datetime:
    """A moment that a guest told, as near to it as can be said."""
    try:
        return datetime.fromtimestamp(nanoseconds / 1e9, UTC)
    except (OverflowError, ValueError, OSError):
        # A guest may date its files as it likes.
        return datetime.max.replace(tzinfo=UTC)


async def _send_archive(send: Send, pieces: AsyncIterator[bytes]) -> None:
    headers = [(b"content-type", b"application/x-tar"), (b"content-disposition", b"attachment")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_events(send: Send, events: AsyncIterator[TreeEvent]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": list(sse.HEADERS)})
    await send({"type": "http.response.body", "body": sse.frame("watching", {}), "more_body": True})
    try:
        async for frame in _frames(events):
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        last = sse.frame("end", {"reason": "gone"})
    except InnkeeperError as error:
        _, code, message, _ = describe(error)
        last = sse.frame("error", {"code": code, "message": message})
    await send({"type": "http.response.body", "body": last, "more_body": False})


async def _frames(events: AsyncIterator[TreeEvent]) -> AsyncIterator[bytes]:
    async with aclosing(with_silences(events)) as told:
        async for event in told:
            yield sse.PING if event is None else sse.frame(event.type, _event_data(event))


def _event_data(event: TreeEvent) -> dict[str, Any]:
    if event.path is None:
        return {}
    data: dict[str, Any] = {"path": event.path, "directory": event.directory}
    return data if event.moved_from is None else {**data, "from": event.moved_from}
