"""Sending a guest's file: whole, one byte range, or only its headers."""

from __future__ import annotations

import re
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from innkeeper.api.body import header_values
from innkeeper.api.disconnect import cancelled_on_disconnect
from innkeeper.api.errors import RangeNotSatisfiableError
from innkeeper.control.files import FileReader

Opener = Callable[[int, int | None], AbstractAsyncContextManager[FileReader]]
"""(offset, length) -> the open file."""

UPLOAD_MAX_BYTES = 64 << 30
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_CHARSET_TYPES = ("application/json", "application/javascript", "application/xml", "image/svg+xml")


@dataclass(frozen=True, slots=True)
class ByteRange:
    """`first` to `last`, both included; no `first`: the last `last` bytes; no `last`: to the end."""

    first: int | None
    last: int | None


@dataclass(frozen=True, slots=True)
class FileAnswer:
    """What goes with the bytes. With `tagged` they have an ETag, and the request's If-None-Match and If-Range count."""

    wanted: ByteRange | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    tagged: bool = False
    known: frozenset[str] = frozenset()
    if_range: str | None = None


class Streamed(Response):
    """An answer that a function sends by itself; what it raises before it began is answered as an error."""

    def __init__(self, serve: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        super().__init__()
        self._serve = serve

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await self._serve(scope, receive, send)


def attachment(opener: Opener) -> Streamed:
    """A file to be saved, never shown: what is in it is a guest's. The request's range and conditions count."""
    headers = {
        "Content-Disposition": "attachment",
        "Cache-Control": "private, no-cache",
        "X-Content-Type-Options": "nosniff",
    }

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        async with cancelled_on_disconnect(receive):
            await send_file(opener, _tagged_answer(scope, headers), scope["method"], send)

    return Streamed(serve)


def _tagged_answer(scope: Scope, headers: Mapping[str, str]) -> FileAnswer:
    """What a request's conditions ask for, with an ETag."""
    known = b",".join(header_values(scope["headers"], b"if-none-match")).decode("latin-1")
    if_range = header_values(scope["headers"], b"if-range")
    return FileAnswer(
        wanted=byte_range(scope),
        headers=headers,
        tagged=True,
        known=frozenset(tag.strip().removeprefix("W/") for tag in known.split(",") if tag.strip()),
        if_range=if_range[0].decode("latin-1").strip() if if_range else None,
    )


def byte_range(scope: Scope) -> ByteRange | None:
    """The single range that a request asks for. Several, other units and malformed ones are ignored, as HTTP allows."""
    values = header_values(scope["headers"], b"range")
    if len(values) != 1:
        return None
    match = _RANGE.fullmatch(values[0].decode("latin-1").replace(" ", ""))
    if match is None or not (match[1] or match[2]):
        return None
    first = int(match[1]) if match[1] else None
    last = int(match[2]) if match[2] else None
    if first is not None and last is not None and last < first:
        return None
    return ByteRange(first, last)


def content_type(mime: str) -> str:
    """The Content-Type of a mime type that a guest named: text is UTF-8, and nothing but a mime type gets through."""
    if not re.fullmatch(r"[A-Za-z0-9!#$&^_.+-]{1,100}/[A-Za-z0-9!#$&^_.+-]{1,100}", mime):
        return "application/octet-stream"
    if mime.startswith("text/") or mime in _CHARSET_TYPES:
        return f"{mime}; charset=utf-8"
    return mime


async def send_file(opener: Opener, answer: FileAnswer, method: str, send: Send) -> None:
    """Send the file, a bounded number of bytes in memory at any time.

    Raises:
        RangeNotSatisfiableError: with the size of the file.

    """
    wanted = answer.wanted
    if method == "HEAD":
        wanted = None
        offset, length = 0, 0
    elif wanted is None:
        offset, length = 0, None
    elif wanted.first is None:
        # "The last n bytes" needs the size first.
        async with opener(0, 0) as file:
            size = file.size
        suffix = min(wanted.last or 0, size)
        if suffix == 0:
            raise RangeNotSatisfiableError(size)
        offset, length = size - suffix, suffix
    else:
        offset = wanted.first
        length = None if wanted.last is None else wanted.last - wanted.first + 1
    async with opener(offset, length) as file:
        tag = f'"{file.version}"'
        if answer.tagged and answer.known & {tag, "*"}:
            head = [(b"etag", tag.encode())]
            await send({"type": "http.response.start", "status": 304, "headers": head})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        if wanted is None or not answer.tagged or answer.if_range in (None, tag):
            await _send_open(file, wanted, offset, length, answer, method, send)
            return
    # The part that is wanted is one of another content: the whole of this one.
    async with opener(0, None) as file:
        await _send_open(file, None, 0, None, answer, method, send)


async def _send_open(
    file: FileReader,
    wanted: ByteRange | None,
    offset: int,
    length: int | None,
    answer: FileAnswer,
    method: str,
    send: Send,
) -> None:
    if wanted is not None and offset >= file.size:
        raise RangeNotSatisfiableError(file.size)
    count = file.size if wanted is None else min(file.size - offset, length if length is not None else file.size)
    headers = {
        "Content-Type": content_type(file.mime),
        "Accept-Ranges": "bytes",
        **answer.headers,
    }
    if answer.tagged:
        headers["ETag"] = f'"{file.version}"'
    if file.size or method == "HEAD":
        headers["Content-Length"] = str(count)
    else:
        # Kernel files say 0 and have content all the same.
        count = sys.maxsize
    if wanted is not None:
        headers["Content-Range"] = f"bytes {offset}-{offset + count - 1}/{file.size}"
    encoded = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200 if wanted is None else 206, "headers": encoded})
    if method == "HEAD":
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return
    left = count
    async for chunk in file.chunks:
        # A file that grows while it is read ends where its announced length ended.
        piece = chunk[:left]
        left -= len(piece)
        if piece:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if left == 0:
            break
    if left == 0 or file.size == 0:
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    # Else it shrank: no end is sent, so the connection is cut and the client sees that bytes are missing.
