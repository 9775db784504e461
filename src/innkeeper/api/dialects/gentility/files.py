"""Files of a room: read as JSON or raw, written as a stream, directories listed."""

from __future__ import annotations

import base64
import codecs
import json
import stat
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from starlette.responses import JSONResponse

from innkeeper.api.body import stream_body
from innkeeper.api.dialects.gentility.room_call import RoomCall
from innkeeper.api.disconnect import cancelled_on_disconnect
from innkeeper.api.file_stream import UPLOAD_MAX_BYTES, FileAnswer, byte_range, send_file
from innkeeper.api.raw_path import encode_path, guest_path, show_path
from innkeeper.control import files as control_files
from innkeeper.control.files import FileEntry
from innkeeper.core.host_verbs import path_from_wire
from innkeeper.errors import FileMissingError, InvalidRequestError, PayloadTooLargeError

JSON_FILE_MAX_BYTES = 16 << 20
LIST_MAX = 1_000
# JSON text is made and sent in pieces of this size, so that one large file does not hold up every other request.
# A multiple of 3, because base64 is made of groups of 3 bytes.
PIECE_BYTES = 3 << 16


def missing(path: bytes) -> FileMissingError:
    """The documented sentence for a file that is not there."""
    return FileMissingError(f"File '{show_path(path)}' not found")


async def read_file(call: RoomCall) -> None:
    """GET .../file/{path}: JSON, or the bytes themselves with `?raw=1`."""
    path = guest_path(call.rest)
    if call.query.flag("raw"):
        await _read_raw(call, path)
    else:
        await _read_json(call, path)


async def _read_raw(call: RoomCall, path: bytes) -> None:
    wanted = byte_range(call.scope)
    room = await call.existing()

    def opened(offset: int, length: int | None) -> Any:
        return control_files.read(call.control, call.principal, room, path, offset=offset, length=length)

    headers = {"Content-Disposition": "attachment", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    try:
        async with cancelled_on_disconnect(call.receive):
            await send_file(opened, FileAnswer(wanted=wanted, headers=headers), call.scope["method"], call.send)
    except FileMissingError:
        raise missing(path) from None


async def _read_json(call: RoomCall, path: bytes) -> None:
    data = bytearray()
    decoder = codecs.getincrementaldecoder("utf-8")()
    text: list[str] | None = []
    try:
        async with (
            cancelled_on_disconnect(call.receive),
            control_files.read(
                call.control, call.principal, await call.existing(), path, max_bytes=JSON_FILE_MAX_BYTES
            ) as file,
        ):
            public_id = file.instance.public_id
            async for chunk in file.chunks:
                data += chunk
                if len(data) > JSON_FILE_MAX_BYTES:
                    raise PayloadTooLargeError
                if text is not None:
                    try:
                        text.append(decoder.decode(chunk))
                    except UnicodeDecodeError:
                        text = None
            if text is not None:
                try:
                    text.append(decoder.decode(b"", final=True))
                except UnicodeDecodeError:
                    text = None
    except FileMissingError:
        raise missing(path) from None
    except PayloadTooLargeError:
        raise PayloadTooLargeError(
            f"The file is larger than {JSON_FILE_MAX_BYTES} bytes; read it with '?raw=1' instead."
        ) from None
    head = {
        "file_path": show_path(path),
        "instance_id": str(public_id),
        "encoding": "base64" if text is None else "utf-8",
    }
    pieces = _base64_pieces(data) if text is None else iter(text)
    await _send_content(call, head, pieces)


def _base64_pieces(data: bytearray) -> Any:
    for start in range(0, len(data), PIECE_BYTES):
        yield base64.b64encode(data[start : start + PIECE_BYTES]).decode()


async def _send_content(call: RoomCall, head: dict[str, str], pieces: Any) -> None:
    """`{..., "content": "..."}` in pieces: escaping 16 MiB in one go would stop the event loop for a tenth of a second."""
    await call.send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    start = json.dumps(head, ensure_ascii=False)[:-1] + ', "content": "'
    buffer = [start.encode()]
    size = 0
    for piece in pieces:
        encoded = json.dumps(piece, ensure_ascii=False)[1:-1].encode()
        buffer.append(encoded)
        size += len(encoded)
        if size >= PIECE_BYTES:
            await call.send({"type": "http.response.body", "body": b"".join(buffer), "more_body": True})
            buffer, size = [], 0
    buffer.append(b'"}')
    await call.send({"type": "http.response.body", "body": b"".join(buffer), "more_body": False})


async def write_file(call: RoomCall) -> None:
    """PUT .../file/{path}: the body becomes the file, atomically."""
    path = guest_path(call.rest)
    if path == b"/" or call.rest.endswith(b"/"):
        raise InvalidRequestError("path: names a directory")
    chunks: AsyncIterator[bytes] = stream_body(call.scope, call.receive, max_bytes=UPLOAD_MAX_BYTES)
    written = await control_files.write(
        call.control, call.principal, await call.existing(), path, chunks, max_bytes=UPLOAD_MAX_BYTES
    )
    answer = {
        "file_path": show_path(path),
        "instance_id": str(written.instance.public_id),
        "size": written.size,
        "created": written.created,
    }
    await JSONResponse(answer, 201 if written.created else 200)(call.scope, call.receive, call.send)


async def list_files(call: RoomCall) -> None:
    """GET .../files/{path}: a page of a directory."""
    path = guest_path(call.rest)
    limit = call.query.integer("limit", default=LIST_MAX, minimum=1, maximum=LIST_MAX)
    try:
        page = await control_files.list_directory(
            call.control,
            call.principal,
            await call.existing(),
            path,
            cursor=call.query.text("cursor"),
            limit=limit,
        )
    except FileMissingError:
        raise missing(path) from None
    answer = {
        "file_path": show_path(path),
        "instance_id": str(page.instance.public_id),
        "entries": [_entry(path, entry) for entry in page.entries],
        "next_cursor": page.next_cursor,
    }
    await JSONResponse(answer)(call.scope, call.receive, call.send)


def _entry(directory: bytes, entry: FileEntry) -> dict[str, Any]:
    name = path_from_wire(entry.name)
    return {
        "name": show_path(name),
        "path": encode_path(directory.rstrip(b"/") + b"/" + name),
        "type": entry.type,
        "size": entry.size,
        "mode": f"{stat.S_IMODE(entry.mode):04o}",
        "modified_at": datetime.fromtimestamp(entry.mtime_ns / 1e9, UTC).isoformat().replace("+00:00", "Z"),
    }
