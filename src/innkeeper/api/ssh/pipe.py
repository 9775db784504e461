"""Bytes of a channel, both ways, for a task that waits where the other side is slow."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

import asyncssh
from asyncssh.channel import SSHChannel

from innkeeper.api.ssh.connection import Connection

# What is taken from a channel ahead of the guest.
AHEAD_BYTES = 262_144


class Pipe:
    """The two directions of one channel. asyncssh calls in; a task of ours reads `pieces` and calls `send`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._channel: SSHChannel[bytes] | None = None
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._ended = False
        self._more = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def opened(self, channel: SSHChannel[bytes]) -> None:
        """The channel is there."""
        self._channel = channel

    def push(self, data: bytes) -> None:
        """Bytes came from the client."""
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        self._more.set()
        if self._waiting_bytes >= AHEAD_BYTES and self._channel is not None:
            self._channel.pause_reading()

    def push_end(self) -> None:
        """No more come."""
        self._ended = True
        self._more.set()

    async def pieces(self) -> AsyncIterator[bytes]:
        """What the client sends, until it says that no more comes."""
        while True:
            while self._waiting:
                piece = b"".join(self._waiting)
                self._waiting.clear()
                self._waiting_bytes = 0
                yield piece
                if self._channel is not None:
                    self._channel.resume_reading()
            if self._ended:
                return
            self._more.clear()
            await self._more.wait()

    def pause(self) -> None:
        """The client's window is full."""
        self._room.clear()

    def resume(self) -> None:
        """It is not any more, or the channel is gone."""
        self._room.set()

    async def send(self, data: bytes, *, errors: bool = False) -> None:
        """Send the client bytes, of stderr with `errors`; waits while it takes none. Raises OSError when the channel is closed."""
        await self._connection.writable()
        await self._room.wait()
        if self._channel is None:
            raise BrokenPipeError
        self._channel.write(data, asyncssh.EXTENDED_DATA_STDERR if errors else None)
