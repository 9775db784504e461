"""The WebSocket of a terminal: binary messages are what is typed and shown, text messages are JSON about it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Coroutine, Sequence
from typing import Any
from urllib.parse import parse_qsl

from starlette.types import ASGIApp, Receive, Scope, Send

from innkeeper.api.auth import QUERY_KEY
from innkeeper.api.edge import ROUTE
from innkeeper.api.errors import MethodNotAllowedError, NoUpgradeError, describe
from innkeeper.api.json_app import Authenticate
from innkeeper.api.raw_path import decode_text, raw_path
from innkeeper.api.revocations import until_revoked
from innkeeper.api.v1.terminals import TerminalBase
from innkeeper.api.websocket import WebSocket, WebSocketClosedError, WebSocketOffer
from innkeeper.control import terminals
from innkeeper.control.context import Control
from innkeeper.control.terminals import Attachment
from innkeeper.errors import (
    ForbiddenError,
    GuestError,
    InnkeeperError,
    InstanceNotReadyError,
    InvalidRequestError,
    NotFoundError,
    RateLimitedError,
    TerminalNotFoundError,
    UnauthorizedError,
    UnavailableError,
)

CONNECT = "/pty/{pid}/connect"
API_KEY = "api_key"

NORMAL = 1000
BAD_MESSAGE = 4400
# InstaVM's clients take the three of the last line for the moment's trouble, and come again.
CLOSE_CODES: tuple[tuple[type[InnkeeperError], int], ...] = (
    (UnauthorizedError, 4401),
    (ForbiddenError, 4403),
    (NotFoundError, 4404),
    (RateLimitedError, 4429),
    (InvalidRequestError, BAD_MESSAGE),
    (InstanceNotReadyError, 4504),
    (InnkeeperError, 4502),
)
INTERNAL = 4500
TOLD_BY_CODE = (UnauthorizedError, RateLimitedError, UnavailableError, GuestError)


class TerminalSockets:
    """Serves `<base>/pty/{pid}/connect` for each base, and hands everything else on."""

    def __init__(
        self, control: Control, bases: Sequence[TerminalBase], authenticate: Authenticate, other: ASGIApp
    ) -> None:
        self._control = control
        self._authenticate = authenticate
        self._other = other
        self._routes = [
            (f"{base.path}{CONNECT}", re.compile(re.sub("{.*?}", "([^/]+)", base.path + CONNECT).encode()), base)
            for base in bases
        ]

    @property
    def routes(self) -> frozenset[tuple[str, str]]:
        """What it serves: (method, path template)."""
        return frozenset(("GET", template) for template, _, _ in self._routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; errors from before the WebSocket is open are raised."""
        for template, pattern, base in self._routes:
            match = pattern.fullmatch(raw_path(scope))
            if match is not None:
                scope[ROUTE] = template
                await self._connect(scope, base, decode_text(match[1], "path"), decode_text(match[2], "path"))
                return
        await self._other(scope, receive, send)

    async def _connect(self, scope: Scope, base: TerminalBase, handle: str, name: str) -> None:
        query = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        # Nothing that comes after this can log the key.
        scope["query_string"] = b""
        scope[QUERY_KEY] = query.get(API_KEY)
        offer = WebSocketOffer.of(scope)
        try:
            principal = await self._authenticate(scope)
            if scope["method"] != "GET":
                raise MethodNotAllowedError(["GET"])
            offset = _offset(query.get("offset"))
            found = await base.existing(self._control, principal, handle)
            if found is None:
                raise TerminalNotFoundError
            # One that sleeps is woken: what ran in its terminals may have slept along.
            entry = found if found.ready else await base.ready(self._control, principal, handle)
            await terminals.find(self._control, entry, name)
        except InnkeeperError as error:
            # Who connects reads the status of an answer, which browsers keep from their pages: so what a page can do something about is told by a code.
            if offer is None or not isinstance(error, TOLD_BY_CODE):
                raise
            with contextlib.suppress(WebSocketClosedError):
                async with offer.accept() as socket:
                    await _close_for(socket, error)
            return
        if offer is None:
            raise NoUpgradeError
        # Who has gone, by now or later, is no error.
        with contextlib.suppress(WebSocketClosedError):
            async with offer.accept() as socket:
                try:
                    async with terminals.attach(
                        self._control, principal, entry, name, offset=offset or 0
                    ) as attachment:
                        session = _Session(socket, attachment, tells_offsets=offset is not None)
                        await session.run(ends=until_revoked(scope))
                except InnkeeperError as error:
                    await _close_for(socket, error)


class _Session:
    """One client at one terminal."""

    def __init__(self, socket: WebSocket, attachment: Attachment, *, tells_offsets: bool) -> None:
        self._socket = socket
        self._attachment = attachment
        self._tells_offsets = tells_offsets

    async def run(self, *, ends: Coroutine[Any, Any, None]) -> None:
        """Both ways until the program has ended or the client has gone, or `ends` raises. Raises the host's typed error."""
        showing = asyncio.create_task(self._show())
        # A program that takes nothing more of what is typed keeps the client from being read.
        others = (self._obey(), self._socket.watch(), ends)
        tasks = (showing, *(asyncio.create_task(other) for other in others))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        if not showing.cancelled():
            await self._socket.send(json.dumps({"type": "exit", "exit_code": self._attachment.exit_code}))
            await self._socket.close(NORMAL)

    async def _show(self) -> None:
        async for piece in self._attachment.output():
            if isinstance(piece, bytes):
                await self._socket.send(piece)
            elif self._tells_offsets:
                await self._socket.send(json.dumps({"type": "offset", "offset": piece.offset}))

    async def _obey(self) -> None:
        async for message in self._socket.messages():
            if isinstance(message, bytes):
                if message:
                    await self._attachment.type(message)
            else:
                await self._order(message)

    async def _order(self, text: str) -> None:
        try:
            order = json.loads(text)
        except (ValueError, RecursionError):
            raise InvalidRequestError("a text message is not JSON") from None
        if not isinstance(order, dict):
            raise InvalidRequestError("a text message is no JSON object")
        # Others are of a newer client, and change nothing.
        if order.get("type") == "resize":
            cols, rows = order.get("cols"), order.get("rows")
            if type(cols) is not int or type(rows) is not int:
                raise InvalidRequestError("cols and rows must be whole numbers")
            await self._attachment.resize(cols, rows)


async def _close_for(socket: WebSocket, error: InnkeeperError) -> None:
    code = next((number for kind, number in CLOSE_CODES if isinstance(error, kind)), INTERNAL)
    _, stable, message, _ = describe(error)
    await socket.close(INTERNAL if stable == "internal_error" else code, message)


def _offset(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise InvalidRequestError("offset: a whole number")
    return int(text)
