"""Files of volumes under `/v1/volumes/{volume_id}/files`."""

from __future__ import annotations

import stat
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from innkeeper.api.body import stream_body
from innkeeper.api.disconnect import cancelled_on_disconnect
from innkeeper.api.file_stream import UPLOAD_MAX_BYTES, Streamed, attachment
from innkeeper.api.json_app import CurrentPrincipal
from innkeeper.api.multipart import boundary_of, part_events
from innkeeper.api.v1.base64_answer import send_base64
from innkeeper.api.v1.files import BINARY, BINARY_BODY, file_time, refuse_conditions
from innkeeper.api.v1.guest_paths import path_from_text, show_path
from innkeeper.api.v1.upload_form import UploadForm
from innkeeper.api.v1.volume_file_schemas import (
    VolumeFile,
    VolumeFileDeleted,
    VolumeFileDownload,
    VolumeFileDownloaded,
    VolumeFileUploaded,
)
from innkeeper.control import volume_files
from innkeeper.control.context import Control
from innkeeper.control.files import FileEntry
from innkeeper.control.volume_files import LIST_MAX, relative
from innkeeper.control.volumes import parse_volume_id
from innkeeper.core.host_verbs import path_from_wire
from innkeeper.errors import InvalidRequestError

FILES = "/v1/volumes/{volume_id}/files"
# What JsonGate must leave unread.
STREAMED_PATHS = r"/v1/volumes/[^/]+/files/(content|upload)"
FIELDS = frozenset({"path", "overwrite"})
NEEDED = ("path",)

Path = Annotated[str, Query(description="From the volume's top.")]
_UPLOAD_BODY: dict[str, Any] = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "properties": {
                "file": {"type": "string", "format": "binary", "description": "The file."},
                "path": {
                    "type": "string",
                    "description": "Where it goes: a file, or a directory that takes it in under its own name.",
                },
                "overwrite": {"type": "string", "description": "`true`: a file that is there is replaced."},
            },
            "required": ["file", "path"],
        }
    }
}


def add_volume_file_routes(router: APIRouter, control: Control) -> None:
    """Add the routes; each is one use case."""

    @router.get(FILES)
    async def list_volume_files(
        principal: CurrentPrincipal,
        volume_id: str,
        prefix: Annotated[str, Query(description="How the paths begin.", max_length=4_095)] = "",
        recursive: Annotated[bool, Query(description="Also what lies in directories.")] = True,
        limit: Annotated[int, Query(ge=1, le=LIST_MAX)] = 1_000,
    ) -> list[VolumeFile]:
        """What is in a volume, the first `limit`."""
        found = await volume_files.list_files(
            control, principal, parse_volume_id(volume_id), prefix=prefix, recursive=recursive, limit=limit
        )
        return [_row(one) for one in found]

    @router.delete(FILES)
    async def delete_volume_file(
        principal: CurrentPrincipal,
        volume_id: str,
        path: Path,
        recursive: Annotated[bool, Query(description="A directory with all that is in it.")] = False,
    ) -> VolumeFileDeleted:
        """Delete a file or an empty directory; with `recursive` a whole one."""
        gone = await volume_files.remove(
            control, principal, parse_volume_id(volume_id), path_from_text("path", path), recursive=recursive
        )
        return VolumeFileDeleted(status="deleted", path=show_path(gone))

    @router.post(f"{FILES}/upload", openapi_extra={"requestBody": {"required": True, "content": _UPLOAD_BODY}})
    async def upload_volume_file(principal: CurrentPrincipal, volume_id: str, request: Request) -> VolumeFileUploaded:
        """Send a file, whole or not at all; missing directories are made. 409 `conflict` where it is there already and `overwrite` does not say so."""
        volume = parse_volume_id(volume_id)
        body = stream_body(request.scope, request.receive, max_bytes=UPLOAD_MAX_BYTES)
        form = UploadForm(part_events(boundary_of(request.scope), body), fields=FIELDS, needed=NEEDED)
        await form.begin()
        path = path_from_text("path", form.text("path"))
        if (
            path.endswith(b"/")
            or not path.strip(b"/.")
            or await volume_files.is_directory(control, principal, volume, path)
        ):
            path = path.rstrip(b"/") + b"/" + form.own_name("path")
        written = await volume_files.write(
            control,
            principal,
            volume,
            path,
            form.content(),
            replace=form.flag("overwrite"),
            max_bytes=UPLOAD_MAX_BYTES,
        )
        return VolumeFileUploaded(
            status="success", path=show_path(written.path), size=written.size, created=written.created
        )

    @router.post(f"{FILES}/download", response_class=Response, responses={200: {"model": VolumeFileDownloaded}})
    async def download_volume_file(principal: CurrentPrincipal, volume_id: str, body: VolumeFileDownload) -> Response:
        """A file as JSON: `content` is its base64."""
        volume, path = parse_volume_id(volume_id), path_from_text("path", body.path)
        shown = relative(path)

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            async with (
                cancelled_on_disconnect(receive),
                volume_files.read(control, principal, volume, path) as file,
            ):
                head = {
                    "status": "success",
                    "path": show_path(shown),
                    "filename": show_path(shown.rpartition(b"/")[2]),
                    "size": file.size,
                }
                await send_base64(send, head, file.chunks, None if file.size == 0 else file.size)

        return Streamed(serve)

    _add_content_routes(router, control)


def _add_content_routes(router: APIRouter, control: Control) -> None:
    file_bytes: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": BINARY}}}

    @router.head(f"{FILES}/content", response_class=Response, responses=file_bytes)
    @router.get(f"{FILES}/content", response_class=Response, responses=file_bytes)
    async def read_volume_file(principal: CurrentPrincipal, volume_id: str, path: Path) -> Response:
        """The bytes of a file. Range, If-Range and If-None-Match count."""
        volume, place = parse_volume_id(volume_id), path_from_text("path", path)

        return attachment(
            lambda offset, length: volume_files.read(control, principal, volume, place, offset=offset, length=length)
        )

    @router.put(f"{FILES}/content", openapi_extra=BINARY_BODY)
    async def write_volume_file(
        principal: CurrentPrincipal,
        volume_id: str,
        request: Request,
        path: Path,
        overwrite: Annotated[bool, Query(description="Whether a file that is there is replaced.")] = True,
    ) -> VolumeFileUploaded:
        """Write a file, whole or not at all; missing directories are made, the mode of an existing file is kept."""
        refuse_conditions(request)
        if path.endswith("/"):
            raise InvalidRequestError("path: names a directory")
        chunks = stream_body(request.scope, request.receive, max_bytes=UPLOAD_MAX_BYTES)
        written = await volume_files.write(
            control,
            principal,
            parse_volume_id(volume_id),
            path_from_text("path", path),
            chunks,
            replace=overwrite,
            max_bytes=UPLOAD_MAX_BYTES,
        )
        return VolumeFileUploaded(
            status="success", path=show_path(written.path), size=written.size, created=written.created
        )


def _row(entry: FileEntry) -> VolumeFile:
    return VolumeFile(
        path=entry.name,
        name=show_path(path_from_wire(entry.name).rpartition(b"/")[2]),
        type=entry.type,
        size=entry.size,
        mode=f"{stat.S_IMODE(entry.mode):04o}",
        modified_at=file_time(entry.mtime_ns),
    )
