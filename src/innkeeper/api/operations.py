"""`/healthz`, `/metrics` and `/openapi.json`: what the people who run the server ask."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from innkeeper import __version__
from innkeeper.api.auth import authenticate, bearer_token
from innkeeper.api.edge import ROUTE
from innkeeper.api.errors import MethodNotAllowedError
from innkeeper.api.metrics import CONTENT_TYPE, HttpMetrics
from innkeeper.api.raw_path import raw_path
from innkeeper.control import hosts, readings
from innkeeper.control.context import Control
from innkeeper.errors import NotFoundError

PATHS = ("/healthz", "/metrics", "/openapi.json")


class Operations:
    """The ASGI application of the endpoints that belong to no dialect."""

    def __init__(self, control: Control, metrics: HttpMetrics, document: Callable[[], dict[str, Any]]) -> None:
        self._control = control
        self._metrics = metrics
        # Made when somebody first asks, since it takes longer than everything else that a start of the edge does; and beside what goes on, since
        # everybody would wait for it, and who asks needs no token.
        self._document = document
        self._openapi: asyncio.Task[bytes] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        path = raw_path(scope).decode("latin-1")
        if path not in PATHS:
            raise NotFoundError("There is no such endpoint.")
        scope[ROUTE] = path
        if scope["method"] not in ("GET", "HEAD"):
            raise MethodNotAllowedError(("GET", "HEAD"))
        if path == "/healthz":
            response: Response = JSONResponse(
                {"status": "draining" if hosts.all_draining(self._control) else "ok", "version": __version__}
            )
        elif path == "/openapi.json":
            if self._openapi is None:
                self._openapi = asyncio.create_task(asyncio.to_thread(self._made))
            response = Response(await asyncio.shield(self._openapi), media_type="application/json")
        else:
            response = await self._metrics_page(scope)
        await response(scope, receive, send)

    def _made(self) -> bytes:
        return json.dumps(self._document()).encode()

    async def _metrics_page(self, scope: Scope) -> Response:
        if not (_is_loopback(scope) and bearer_token(scope) is None):
            await authenticate(self._control, scope)
        return Response(self._metrics.render(await readings.read(self._control)), media_type=CONTENT_TYPE)


def _is_loopback(scope: Scope) -> bool:
    client = scope.get("client")
    if not client:
        return False
    try:
        return ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False
