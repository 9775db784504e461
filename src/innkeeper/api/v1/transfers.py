"""`/upload` and `/download`: InstaVM's way to send a session's VM a file and to fetch one."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from innkeeper.api.body import header_values, read_body, stream_body
from innkeeper.api.disconnect import cancelled_on_disconnect
from innkeeper.api.file_stream import UPLOAD_MAX_BYTES, Streamed
from innkeeper.api.json_app import CurrentPrincipal
from innkeeper.api.multipart import PartBegin, PartData, PartEnd, PartEvent, boundary_of, part_events
from innkeeper.api.v1.guest_paths import path_from_text, show_path
from innkeeper.api.v1.vms import session_id
from innkeeper.control import files, sessions, trees
from innkeeper.control.context import Control
from innkeeper.control.live_table import Entry
from innkeeper.core.token import Principal
from innkeeper.errors import FileMissingError, InvalidRequestError

FIELDS = ("remote_path", "session_id", "recursive")
FIELD_BYTES_MAX = 8_192
# A client may send the file before it says where it goes: so much of it is kept until it does.
EARLY_BYTES_MAX = 1 << 20
FORM_BYTES_MAX = 65_536
# Base64 is made and sent in pieces, of a multiple of 3 bytes.
PIECE_BYTES = 3 << 16


class Uploaded(BaseModel):
    """What became of an upload."""

    model_config = ConfigDict(extra="forbid")

    status: str = Field(description="`success`.")
    path: str = Field(description="Where the file is, or the directory that the archive was unpacked into.")
    size: int = Field(description="Bytes of the file, or of the files in the archive.")
    created: bool | None = Field(description="Whether the file is new; null for an archive.")
    files: int | None = Field(description="Entries that an archive made; null for a file.")
    skipped: int | None = Field(description="Devices and FIFOs in an archive, which are left out; null for a file.")


def add_transfer_routes(router: APIRouter, control: Control) -> None:
    """Add the routes."""

    @router.post("/upload", openapi_extra={"requestBody": {"required": True, "content": _UPLOAD_BODY}})
    async def upload(principal: CurrentPrincipal, request: Request) -> Uploaded:
        """Send a file to a session's VM, or with `recursive` a tar archive that is unpacked there. Whole or not at all."""
        body = stream_body(request.scope, request.receive, max_bytes=UPLOAD_MAX_BYTES)
        form = UploadForm(part_events(boundary_of(request.scope), body))
        await form.begin()
        entry = await sessions.ready_entry(control, principal, session_id(form.text("session_id")))
        path = await trees.absolute(control, principal, entry, path_from_text("remote_path", form.text("remote_path")))
        if form.recursive:
            tally = await trees.unpack(control, principal, entry, path, form.content(), max_bytes=UPLOAD_MAX_BYTES)
            return Uploaded(
                status="success",
                path=show_path(path),
                size=tally.bytes,
                created=None,
                files=tally.files,
                skipped=tally.skipped,
            )
        path = await _file_path(control, principal, entry, path, form.filename)
        written = await files.write(control, principal, entry, path, form.content(), max_bytes=UPLOAD_MAX_BYTES)
        return Uploaded(
            status="success",
            path=show_path(path),
            size=written.size,
            created=written.created,
            files=None,
            skipped=None,
        )

    @router.post(
        "/download",
        response_class=Response,
        openapi_extra={"requestBody": {"required": True, "content": _DOWNLOAD_BODY}},
        responses={200: {"content": _DOWNLOAD_ANSWER}},
    )
    async def download(principal: CurrentPrincipal, request: Request) -> Response:
        """A file of a session's VM as JSON: `content` is its base64."""
        form = await _read_form(request.scope, request.receive)
        entry = await sessions.ready_entry(control, principal, session_id(_one(form, "session_id")))
        name = _one(form, "filename")
        path = await trees.absolute(control, principal, entry, path_from_text("filename", name))

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            async with cancelled_on_disconnect(receive), files.read(control, principal, entry, path) as file:
                head = {"status": "success", "filename": name, "size": file.size}
                await _send_base64(send, head, file.chunks, None if file.size == 0 else file.size)

        return Streamed(serve)


class UploadForm:
    """The parts of an upload: fields as they come, then the file as a stream; what follows it is read before the stream ends."""

    def __init__(self, events: AsyncIterator[PartEvent]) -> None:
        self._events = events
        self._fields: dict[str, str] = {}
        self._early: list[bytes] | None = None
        self._file_is_whole = False
        self.filename: str | None = None
        self._began = False

    async def begin(self) -> None:
        """Read up to the file's content; where that comes before the fields, and is small, all of the body. Raises InvalidRequestError."""
        while not self._began or self._early is not None:
            event = await anext(self._events, None)
            if event is None:
                break
            assert isinstance(event, PartBegin)  # noqa: S101
            if event.name != "file" or self._began:
                await self._field(event)
                continue
            self._began, self.filename = True, event.filename
            if not self._fields.keys() >= {"remote_path", "session_id"}:
                await self._keep_file()
        for name in ("remote_path", "session_id"):
            if name not in self._fields:
                raise InvalidRequestError(f"{name}: Field required")
        if not self._began:
            raise InvalidRequestError("file: Field required")

    def text(self, name: str) -> str:
        """A field's value."""
        return self._fields[name]

    @property
    def recursive(self) -> bool:
        """Whether the file is an archive to be unpacked. Raises InvalidRequestError for what is neither."""
        value = self._fields.get("recursive", "false").lower()
        if value not in ("true", "false"):
            raise InvalidRequestError("recursive: must be true or false")
        return value == "true"

    async def content(self) -> AsyncIterator[bytes]:
        """The file's bytes. Ends only when the whole body was read and makes sense."""
        for data in self._early or ():
            yield data
        while not self._file_is_whole:
            event = await anext(self._events)
            if isinstance(event, PartData):
                yield event.data
            self._file_is_whole = isinstance(event, PartEnd)
        async for event in self._events:
            assert isinstance(event, PartBegin)  # noqa: S101
            if event.name in FIELDS and event.name not in self._fields:
                raise InvalidRequestError(f"{event.name}: must come before file")
            await self._field(event)

    async def _keep_file(self) -> None:
        self._early, size = [], 0
        while isinstance(event := await anext(self._events), PartData):
            size += len(event.data)
            if size > EARLY_BYTES_MAX:
                raise InvalidRequestError("file: remote_path and session_id must come before a file of more than 1 MiB")
            self._early.append(event.data)
        self._file_is_whole = True

    async def _field(self, begin: PartBegin) -> None:
        if begin.name == "file":
            raise InvalidRequestError("file: given twice")
        value = b""
        while isinstance(event := await anext(self._events), PartData):
            value += event.data
            if len(value) > FIELD_BYTES_MAX:
                raise InvalidRequestError(f"{begin.name[:100]}: at most {FIELD_BYTES_MAX} bytes")
        if begin.name not in FIELDS:
            return
        if begin.name in self._fields:
            raise InvalidRequestError(f"{begin.name}: given twice")
        try:
            self._fields[begin.name] = value.decode()
        except UnicodeDecodeError:
            raise InvalidRequestError(f"{begin.name}: must be UTF-8") from None


async def _file_path(control: Control, principal: Principal, entry: Entry, path: bytes, filename: str | None) -> bytes:
    """Where a file goes: the path, or its own name in it where that is a directory."""
    if not path.endswith(b"/"):
        try:
            found = await files.stat(control, principal, entry, path)
        except FileMissingError:
            return path
        if found.type != "dir":
            return path
    # The client's path of the file, perhaps of another system.
    name = re.split(r"[/\\]", filename or "")[-1].encode("utf-8", "surrogateescape")
    if name in (b"", b".", b".."):
        raise InvalidRequestError("remote_path: names a directory, and the file has no name")
    return path.rstrip(b"/") + b"/" + name


async def _read_form(scope: Scope, receive: Receive) -> dict[str, list[str]]:
    kinds = header_values(scope["headers"], b"content-type")
    if len(kinds) != 1 or kinds[0].partition(b";")[0].strip().lower() != b"application/x-www-form-urlencoded":
        raise InvalidRequestError("Content-Type: must be application/x-www-form-urlencoded")
    body = await read_body(scope, receive, max_bytes=FORM_BYTES_MAX)
    try:
        return parse_qs(body.decode("ascii"), keep_blank_values=True, max_num_fields=50, errors="strict")
    except ValueError:
        raise InvalidRequestError("The body is not a valid form.") from None


def _one(form: dict[str, list[str]], name: str) -> str:
    values = form.get(name, [])
    if len(values) != 1:
        raise InvalidRequestError(f"{name}: Field required" if not values else f"{name}: given twice")
    return values[0]


async def _send_base64(send: Send, head: dict[str, Any], chunks: AsyncIterator[bytes], size: int | None) -> None:
    """`{..., "content": "..."}` in pieces. A file that does not have the size that was announced cuts the answer off."""
    left, rest = size, b""
    buffered: list[bytes] = [json.dumps(head, ensure_ascii=False)[:-1].encode("utf-8", "replace"), b', "content": "']
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    async for chunk in chunks:
        piece = chunk if left is None else chunk[:left]
        left = None if left is None else left - len(piece)
        rest += piece
        whole = len(rest) - len(rest) % 3
        if whole >= PIECE_BYTES:
            await send(
                {
                    "type": "http.response.body",
                    "body": b"".join((*buffered, base64.b64encode(rest[:whole]))),
                    "more_body": True,
                }
            )
            buffered, rest = [], rest[whole:]
        if left == 0:
            break
    if left:
        return  # it shrank: no end, so that the client sees that bytes are missing
    body = b"".join((*buffered, base64.b64encode(rest), b'"}'))
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


_SESSION = _text("The session whose VM it is.")
_UPLOAD_BODY: dict[str, Any] = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "properties": {
                "file": {"type": "string", "format": "binary", "description": "The file, or the archive."},
                "remote_path": _text("Where it goes: a file, or a directory that takes it in under its own name."),
                "session_id": _SESSION,
                "recursive": _text("`true`: unpack the archive into the directory `remote_path`."),
            },
            "required": ["file", "remote_path", "session_id"],
        }
    }
}
_DOWNLOAD_BODY: dict[str, Any] = {
    "application/x-www-form-urlencoded": {
        "schema": {
            "type": "object",
            "properties": {"filename": _text("The file's path."), "session_id": _SESSION},
            "required": ["filename", "session_id"],
        }
    }
}
_DOWNLOAD_ANSWER: dict[str, Any] = {
    "application/json": {
        "schema": {
            "type": "object",
            "properties": {
                "status": _text("`success`."),
                "filename": _text("As it was asked for."),
                "size": {"type": "integer", "description": "Bytes of the file."},
                "content": _text("The file as base64."),
            },
            "required": ["status", "filename", "size", "content"],
        }
    }
}
