"""`/upload` and `/download`: InstaVM's way to send a session's VM a file and to fetch one."""

from __future__ import annotations

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
from innkeeper.api.multipart import boundary_of, part_events
from innkeeper.api.v1.base64_answer import send_base64
from innkeeper.api.v1.guest_paths import path_from_text, show_path
from innkeeper.api.v1.upload_form import UploadForm
from innkeeper.api.v1.vms import session_id
from innkeeper.control import files, sessions, trees
from innkeeper.control.context import Control
from innkeeper.control.live_table import Entry
from innkeeper.core.token import Principal
from innkeeper.errors import FileMissingError, InvalidRequestError

FIELDS = frozenset({"remote_path", "session_id", "recursive"})
NEEDED = ("remote_path", "session_id")
FORM_BYTES_MAX = 65_536


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
        form = UploadForm(part_events(boundary_of(request.scope), body), fields=FIELDS, needed=NEEDED)
        await form.begin()
        entry = await sessions.ready_entry(control, principal, session_id(form.text("session_id")))
        path = await trees.absolute(control, principal, entry, path_from_text("remote_path", form.text("remote_path")))
        if form.flag("recursive"):
            tally = await trees.unpack(control, principal, entry, path, form.content(), max_bytes=UPLOAD_MAX_BYTES)
            return Uploaded(
                status="success",
                path=show_path(path),
                size=tally.bytes,
                created=None,
                files=tally.files,
                skipped=tally.skipped,
            )
        path = await _file_path(control, principal, entry, path, form)
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
                await send_base64(send, head, file.chunks, None if file.size == 0 else file.size)

        return Streamed(serve)


async def _file_path(control: Control, principal: Principal, entry: Entry, path: bytes, form: UploadForm) -> bytes:
    """Where a file goes: the path, or its own name in it where that is a directory."""
    if not path.endswith(b"/"):
        try:
            found = await files.stat(control, principal, entry, path)
        except FileMissingError:
            return path
        if found.type != "dir":
            return path
    return path.rstrip(b"/") + b"/" + form.own_name("remote_path")


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
