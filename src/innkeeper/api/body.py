"""Request bodies: content type checked, size counted while they stream, a deadline on small ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from starlette.types import Receive, Scope

from innkeeper.api.errors import ClientDisconnectedError
from innkeeper.errors import InvalidRequestError, PayloadTooLargeError

JSON_BODY_MAX_BYTES = 1 << 20
# What the listener leaves in the scope: how long its clients may take (INNKEEPER_CLIENT_TIMEOUT_SECONDS).
CLIENT_SECONDS = "innkeeper.client_seconds"
CLIENT_SECONDS_DEFAULT = 60.0


def header_values(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    """All values of a header, in order; `name` in lower case."""
    return [value for key, value in headers if key == name]


def _check_length(scope: Scope, max_bytes: int, hint: str) -> None:
    for value in header_values(scope["headers"], b"content-length"):
        if value.isdigit() and int(value) > max_bytes:
            raise PayloadTooLargeError(f"The body may have at most {max_bytes} bytes.{hint}")


async def read_body(scope: Scope, receive: Receive, *, max_bytes: int = JSON_BODY_MAX_BYTES, hint: str = "") -> bytes:
    """The whole body.

    Raises:
        PayloadTooLargeError: by its declared length at once, else while it is counted.
        InvalidRequestError: it did not arrive in the time that clients have (60 seconds).
        ClientDisconnectedError: the client went away.

    """
    _check_length(scope, max_bytes, hint)
    # The usual case, one message that is there already, needs no timer.
    seconds = scope.get(CLIENT_SECONDS, CLIENT_SECONDS_DEFAULT)
    message = await _receive(receive, seconds)
    if not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        _check_size(len(body), max_bytes, hint)
        return body
    chunks = [message.get("body", b"")]
    size = len(chunks[0])
    try:
        async with asyncio.timeout(seconds):
            while message.get("more_body", False):
                _check_size(size, max_bytes, hint)
                message = await _receive(receive, None)
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
    except TimeoutError:
        raise InvalidRequestError("The body did not arrive in time.") from None
    _check_size(size, max_bytes, hint)
    return b"".join(chunks)


async def stream_body(scope: Scope, receive: Receive, *, max_bytes: int) -> AsyncIterator[bytes]:
    """The body in pieces as they arrive; not asking for the next one slows the client down.

    Raises:
        PayloadTooLargeError, InvalidRequestError (as many seconds of silence as clients have), ClientDisconnectedError.

    """
    _check_length(scope, max_bytes, "")
    size = 0
    more = True
    while more:
        message = await _receive(receive, scope.get(CLIENT_SECONDS, CLIENT_SECONDS_DEFAULT))
        more = message.get("more_body", False)
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        _check_size(size, max_bytes, "")
        if chunk:
            yield chunk


async def _receive(receive: Receive, seconds: float | None) -> dict[str, Any]:
    try:
        async with asyncio.timeout(seconds):
            message = await receive()
    except TimeoutError:
        raise InvalidRequestError("The body did not arrive in time.") from None
    if message["type"] == "http.disconnect":
        raise ClientDisconnectedError
    return dict(message)


def _check_size(size: int, max_bytes: int, hint: str) -> None:
    if size > max_bytes:
        raise PayloadTooLargeError(f"The body may have at most {max_bytes} bytes.{hint}")


def check_json_content_type(scope: Scope) -> None:
    """Refuse a body whose Content-Type is missing, repeated, or not JSON in UTF-8. Raises InvalidRequestError."""
    values = header_values(scope["headers"], b"content-type")
    if len(values) == 1 and values[0] == b"application/json":
        return
    if not values:
        raise InvalidRequestError("Content-Type: application/json is required with a body.")
    if len(values) > 1:
        raise InvalidRequestError("Content-Type: given more than once")
    media_type, _, parameters = values[0].decode("latin-1").partition(";")
    if media_type.strip().lower() != "application/json":
        raise InvalidRequestError("Content-Type: must be application/json")
    for parameter in filter(None, (p.strip().lower() for p in parameters.split(";"))):
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip().strip('"') not in ("utf-8", "utf8"):
            raise InvalidRequestError("Content-Type: JSON must be UTF-8")


async def read_json_body(scope: Scope, receive: Receive, *, max_bytes: int = JSON_BODY_MAX_BYTES) -> bytes:
    """The body of a request that may carry JSON: its content type is checked unless it is empty."""
    body = await read_body(scope, receive, max_bytes=max_bytes)
    if body:
        check_json_content_type(scope)
    return body
