"""A WebSocket on a connection that was taken over from HTTP: messages both ways, pings, and bounds for what a client may send.

The library's Sans-I/O layer does handshake and frames; uvicorn's own WebSocket support stands beside the limits of our listener and keeps what a client
sends that nobody reads: pongs for a flood of pings, frames of a few bytes, fragments without end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.types import Scope
from websockets.datastructures import Headers
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import Protocol, Side, State
from websockets.server import ServerProtocol

from innkeeper.api.raw_connection import TAKE_OVER, RawConnection, TakeOver
from innkeeper.api.raw_path import raw_path

MESSAGE_MAX_BYTES = 262_144
MAX_FRAGMENTS = 256
# A client that was silent for so long is asked for a sign of life, and has as long again to give one.
PING_SECONDS = 20.0
CLOSE_SECONDS = 5.0
# Of what is read at once: a frame may have seven bytes, and 64 KiB of those keep everybody else waiting for 50 ms.
SLICE_BYTES = 4_096
# The library logs frames, which hold what a user types.
_SILENT = logging.Logger("websockets", logging.CRITICAL + 1)


class WebSocketClosedError(Exception):
    """The client has closed the WebSocket, or is gone."""


class WebSocket:
    """An open WebSocket. One task reads; any may send."""

    def __init__(self, connection: RawConnection) -> None:
        self._connection = connection
        self._protocol = Protocol(Side.SERVER, state=State.OPEN, max_size=MESSAGE_MAX_BYTES, logger=_SILENT)
        self._fragments: list[bytes] = []
        self._is_text = False
        self._failed = False
        self._is_read = False

    async def messages(self) -> AsyncIterator[bytes | str]:
        """What the client sends, until it closes or breaks the protocol, of which it is told."""
        while data := await self._read():
            for start in range(0, len(data), SLICE_BYTES):
                self._protocol.receive_data(data[start : start + SLICE_BYTES])
                for event in self._protocol.events_received():
                    if self._failed:
                        break
                    if isinstance(event, Frame) and (message := self._joined(event)) is not None:
                        yield message
                # Pongs and the answer to a close; a client that does not read them is not read any further.
                await self._flush()
                if self._protocol.state is not State.OPEN:
                    return
                await asyncio.sleep(0)

    async def send(self, message: bytes | str) -> None:
        """Send a message; waits while the client is slow. Raises WebSocketClosedError."""
        if self._protocol.state is not State.OPEN:
            raise WebSocketClosedError
        if isinstance(message, str):
            self._protocol.send_text(message.encode())
        else:
            self._protocol.send_binary(message)
        await self._flush()

    async def close(self, code: int, reason: str = "") -> None:
        """Say why it ends and wait a moment for the client's answer, so that what was sent before arrives."""
        if self._protocol.state is not State.OPEN:
            return
        # At most 123 bytes fit; never half a character.
        self._protocol.send_close(code, reason.encode()[:123].decode("utf-8", "ignore"))
        with contextlib.suppress(TimeoutError, WebSocketClosedError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._flush()
                while data := await self._connection_read():
                    self._protocol.receive_data(data)
                    self._protocol.events_received()
                    if self._protocol.close_rcvd is not None:
                        return

    async def watch(self) -> None:
        """Ask for signs of life while nobody reads, which would find out that the client is gone. Raises WebSocketClosedError when it is."""
        while True:
            await asyncio.sleep(PING_SECONDS)
            if not self._is_read:
                # The first one to a connection that is gone is refused, and the next one cannot be sent.
                self._protocol.send_ping(b"")
                await self._flush()

    # --- reading -------------------------------------------------------------------------------------------------------

    async def _read(self) -> bytes:
        """The next bytes; none when the client has gone, or gives no sign of life."""
        self._is_read = True
        try:
            try:
                async with asyncio.timeout(PING_SECONDS):
                    return await self._connection_read()
            except TimeoutError:
                self._protocol.send_ping(b"")
                await self._flush()
            async with asyncio.timeout(PING_SECONDS):
                return await self._connection_read()
        except (TimeoutError, WebSocketClosedError):
            return b""
        finally:
            self._is_read = False

    async def _connection_read(self) -> bytes:
        try:
            return await self._connection.read()
        except ConnectionError as error:
            raise WebSocketClosedError from error

    def _joined(self, frame: Frame) -> bytes | str | None:
        """The message that a frame ends, or None."""
        if frame.opcode in (Opcode.TEXT, Opcode.BINARY):
            self._is_text = frame.opcode is Opcode.TEXT
        elif frame.opcode is not Opcode.CONT:
            return None
        self._fragments.append(bytes(frame.data))
        if not frame.fin:
            if len(self._fragments) > MAX_FRAGMENTS:
                self._fail(1009, "too many fragments")
            return None
        data, self._fragments = b"".join(self._fragments), []
        if not self._is_text:
            return data
        try:
            return data.decode()
        except UnicodeDecodeError:
            self._fail(1007, "not UTF-8")
            return None

    def _fail(self, code: int, reason: str) -> None:
        self._failed = True
        self._protocol.fail(code, reason)

    async def _flush(self) -> None:
        data = b"".join(self._protocol.data_to_send())
        if not data:
            return
        try:
            await self._connection.write(data)
        except ConnectionError as error:
            raise WebSocketClosedError from error


@dataclass(frozen=True, slots=True)
class WebSocketOffer:
    """A request that asks for a WebSocket as the protocol wants it."""

    _head: bytes
    _take_over: TakeOver

    @classmethod
    def of(cls, scope: Scope) -> WebSocketOffer | None:
        """What a request offers; None when it asks for no WebSocket, or not as the protocol wants it."""
        take_over = scope.get(TAKE_OVER)
        # Without the query, which may hold a key.
        request = Request(raw_path(scope).decode("latin-1"), Headers(), scope["method"])
        for name, value in scope["headers"]:
            request.headers[name.decode("latin-1")] = value.decode("latin-1")
        response = ServerProtocol(logger=_SILENT).accept(request)
        # A client or front of HTTP/1.0 does not know what an upgrade is.
        if response.status_code != 101 or take_over is None or scope["http_version"] != "1.1":
            return None
        return cls(response.serialize(), take_over)

    @asynccontextmanager
    async def accept(self) -> AsyncIterator[WebSocket]:
        """Open it; leaving the context ends the connection. Raises WebSocketClosedError when the client is gone."""
        try:
            connection = self._take_over(self._head)
        except ConnectionError as error:
            raise WebSocketClosedError from error
        async with connection:
            yield WebSocket(connection)
