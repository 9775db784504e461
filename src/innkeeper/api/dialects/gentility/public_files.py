"""`GET /vm/{instance_id}/file/{path}`: files that need no token, because the instance's id is the key.

These bytes come from a guest and are shown on the API's own origin, so the answer takes every power from them: sandboxed, no scripts, no sniffing,
no referrer. Whatever is wrong, the answer is the same 404, so that nothing can be learned by asking.
"""

from __future__ import annotations

import posixpath
from typing import Any
from urllib.parse import quote

from starlette.types import Receive, Scope, Send

from innkeeper.api.disconnect import cancelled_on_disconnect
from innkeeper.api.edge import ROUTE
from innkeeper.api.errors import MethodNotAllowedError
from innkeeper.api.file_stream import FileAnswer, byte_range, send_file
from innkeeper.api.rate_limit import AddressRateLimit
from innkeeper.api.raw_path import guest_path, raw_path
from innkeeper.control import files as control_files
from innkeeper.control.context import Control
from innkeeper.errors import (
    FileMissingError,
    ForbiddenError,
    GuestError,
    InvalidRequestError,
    LinkLostError,
    NotFoundError,
)
from innkeeper.ids import parse_uuid

PREFIX = b"/vm/"
TEMPLATE = "/vm/{instance_id}/file/{path}"
HEADERS = {
    "Cache-Control": "private, no-store",
    "Content-Security-Policy": (
        "sandbox; default-src 'none'; img-src 'self' data:; media-src 'self' data:; style-src 'unsafe-inline'; "
        "font-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    # The addresses are made to be embedded, as pictures in a chat for example; who knows one may fetch it anyway.
    "Cross-Origin-Resource-Policy": "cross-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex, nofollow",
}


class PublicFiles:
    """The ASGI application of `/vm/...`."""

    def __init__(self, control: Control, limit: AddressRateLimit) -> None:
        self._control = control
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Cookies, tokens and bodies are not looked at."""
        scope[ROUTE] = TEMPLATE
        if scope["method"] not in ("GET", "HEAD"):
            raise MethodNotAllowedError(("GET", "HEAD"))
        client = scope.get("client")
        self._limit.check(client[0] if client else "")
        try:
            await self._send(scope, receive, send)
        except LinkLostError:
            raise
        except (NotFoundError, ForbiddenError, InvalidRequestError, GuestError):
            raise FileMissingError from None

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts = raw_path(scope).split(b"/", 4)
        if len(parts) < 5 or parts[3] != b"file":
            raise FileMissingError
        instance_id = parse_uuid(parts[2].decode("ascii", "replace"))
        if instance_id is None:
            raise FileMissingError
        path = guest_path(parts[4])

        def opened(offset: int, length: int | None) -> Any:
            return control_files.read_public(self._control, instance_id, path, offset=offset, length=length)

        name = quote(posixpath.basename(path), safe="")
        headers = {**HEADERS, "Content-Disposition": f"inline; filename*=UTF-8''{name}"}
        async with cancelled_on_disconnect(receive):
            await send_file(opened, FileAnswer(wanted=byte_range(scope), headers=headers), scope["method"], send)
