"""A client's connection after its HTTP has ended: bytes both ways, as upgrades (WebSocket among them) want it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

# What the listener leaves in the scope of a request that asks for an upgrade: a function that ends the connection's HTTP with the head of an answer
# and gives the connection. Without the call the request is answered like any other.
TAKE_OVER = "innkeeper.take_over"
# The status that was sent so, for whoever logs the request.
TAKEN_OVER = "innkeeper.taken_over"
TakeOver = Callable[[bytes], "RawConnection"]
BUFFER_BYTES = 65_536


class RawConnection:
    """Reading stops the client once 128 KiB are unread; writing waits for it. Leaving the `async with` closes the connection."""

    def __init__(self, transport: asyncio.Transport, drain: Callable[[], Awaitable[None]]) -> None:
        self._transport = transport
        self._drain = drain
        self._reader = asyncio.StreamReader(limit=BUFFER_BYTES)
        self._reader.set_transport(transport)
        self._reading = False
        self._unread = 0
        self._take: Callable[[memoryview], int] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        if kind is None:
            self._transport.close()
        else:
            self._transport.abort()

    async def read(self) -> bytes:
        """The next bytes, at most 64 KiB; none when the client has closed its side. Raises ConnectionError when the connection is lost."""
        self._reading = True
        try:
            data = await self._reader.read(BUFFER_BYTES)
        finally:
            self._reading = False
        self._unread -= len(data)
        return data

    def shortcut(self, take: Callable[[memoryview], int]) -> None:
        """Offer bytes that come while somebody waits in `read` to `take` first, which returns how many it took."""
        self._take = take

    async def write(self, data: bytes) -> None:
        """Send bytes; waits while the client is slow. Raises ConnectionError when the connection is lost."""
        if self._transport.is_closing():
            raise ConnectionResetError
        self._transport.write(data)
        await self._drain()

    def write_now(self, data: memoryview) -> bool:
        """Send bytes that nobody has to be waited for; whether it did. Not while `write` waits."""
        if self._transport.is_closing() or self._transport.get_write_buffer_size():
            return False
        self._transport.write(data)
        return True

    def write_end(self) -> None:
        """Close this side; the client may go on sending."""
        if self._transport.can_write_eof() and not self._transport.is_closing():
            self._transport.write_eof()

    # --- called by the listener --------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Bytes of the client."""
        if self._take is not None and self._reading and not self._unread:
            data = data[self._take(memoryview(data)) :]
        if data:
            self._unread += len(data)
            self._reader.feed_data(data)

    def feed_end(self) -> None:
        """The client has closed its side."""
        self._reader.feed_eof()

    def lost(self, error: Exception | None) -> None:
        """The connection is gone."""
        self._reader.set_exception(error or ConnectionResetError())
