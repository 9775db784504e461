"""asyncssh's connection and channels with the bounds that they lack: of what a client may send, and of what it does not take."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import cast

import asyncssh
from asyncssh.channel import SSHServerChannel, SSHTCPChannel

# The exchange of keys and six tries at the largest RSA key take 20 KiB.
STRANGER_BYTES = 131_072
# Read at one go: asyncssh copies what is unread for every packet, and holds up everybody else while it works.
PIECE_BYTES = 16_384
# What a channel may hold for a program that takes nothing.
WINDOW_BYTES = 524_288
# What a client may send ahead in packets of a few bytes is put together into pieces of this size.
JOIN_BYTES = 4_096
VARIABLES_MAX = 64
VARIABLES_BYTES = 16_384


class Connection(asyncssh.SSHServerConnection):
    """A client's connection. What it does not take keeps it from being read, and ends it after `stall_seconds`.

    asyncssh has neither of the two: replies, and data within the window that a client names, would wait in memory without limit.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        options: asyncssh.SSHServerConnectionOptions,
        client: asyncssh.SSHServer,
        *,
        stall_seconds: float,
    ) -> None:
        super().__init__(loop, options)
        # One set of options serves all: to make one costs more than the rest of a connection.
        self._protocol_factory = lambda: client
        self._events = loop
        self._wire: asyncio.Transport | None = None
        self._pieces: deque[bytes] = deque()
        self._stranger_left: int | None = STRANGER_BYTES
        self._full = False
        self._paused = False
        self._stall_seconds = stall_seconds
        self._stalled: asyncio.TimerHandle | None = None
        self._open = asyncio.Event()
        self._open.set()

    def known(self) -> None:
        """The client has shown its key: what it sends is not counted any more."""
        self._stranger_left = None

    @property
    def channel_count(self) -> int:
        """How many channels it has."""
        return len(self._channels)

    async def reload_config(self) -> None:
        """Nothing depends on the user name, and clients may name as many as they like."""

    async def writable(self) -> None:
        """Wait until more data may be sent. Returns at once where the connection is closed."""
        await self._open.wait()

    # --- what the transport tells ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is there."""
        # Not of that class where uvloop made it.
        self._wire = cast(asyncio.Transport, transport)
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None = None) -> None:
        """The connection is gone."""
        self._pieces.clear()
        self._wire = None
        self._look()
        super().connection_lost(exc)

    def data_received(self, data: bytes, datatype: int | None = None) -> None:
        """Take what came, in pieces, others having their turn in between."""
        if self._stranger_left is not None:
            self._stranger_left -= len(data)
            if self._stranger_left < 0:
                self.abort()
                return
        waiting = bool(self._pieces)
        self._pieces.extend(data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES))
        if not waiting:
            self._next_piece()

    def _next_piece(self) -> None:
        if self._pieces and self._wire is not None:
            super().data_received(self._pieces.popleft())
            if self._pieces:
                self._events.call_soon(self._next_piece)
        self._look()

    def pause_writing(self) -> None:
        """The client takes less than it is sent."""
        self._full = True
        self._look()

    def resume_writing(self) -> None:
        """It has caught up."""
        self._full = False
        self._look()

    # --- what a client that exchanges keys anew holds up -------------------------------------------------------------

    def _send_kexinit(self) -> None:
        super()._send_kexinit()
        self._look()

    def _send_deferred_packets(self) -> None:
        super()._send_deferred_packets()
        self._look()

    def _look(self) -> None:
        """See what may go on: both directions, and the clock of a client that holds up its own."""
        wire = self._wire
        if wire is None or wire.is_closing():
            self._open.set()
            self._stop_clock()
            return
        if self._full or not self._kex_complete:
            self._open.clear()
            if self._stalled is None:
                self._stalled = self._events.call_later(self._stall_seconds, self.abort)
        else:
            self._open.set()
            self._stop_clock()
        if (pausing := self._full or bool(self._pieces)) is not self._paused:
            self._paused = pausing
            if pausing:
                wire.pause_reading()
            else:
                wire.resume_reading()

    def _stop_clock(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


class SessionChannel(SSHServerChannel[bytes]):
    """A session's channel. Requests of its client, and the data that it sends ahead, cost what they weigh."""

    def __init__(self, connection: Connection) -> None:
        # No terminal of asyncssh's own: the guest has one.
        super().__init__(
            connection, asyncio.get_running_loop(), True, False, False, 0, 0, None, "strict", WINDOW_BYTES, 32_768
        )

    def _process_env_request(self, packet: asyncssh.packet.SSHPacket) -> bool:
        size = sum(len(name) + len(value) for name, value in self._env.items())
        if len(self._env) >= VARIABLES_MAX or size > VARIABLES_BYTES:
            return False
        return super()._process_env_request(packet)

    def _accept_data(self, data: bytes, datatype: int | None = None) -> None:
        if not _joined(self._recv_paused, self._recv_buf, data, datatype):
            super()._accept_data(data, datatype)
        else:
            self._recv_window -= len(data)


class ForwardChannel(SSHTCPChannel[bytes]):
    """The channel of a forwarded connection."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection, asyncio.get_running_loop(), None, "strict", WINDOW_BYTES, 32_768)

    def _accept_data(self, data: bytes, datatype: int | None = None) -> None:
        if not _joined(self._recv_paused, self._recv_buf, data, datatype):
            super()._accept_data(data, datatype)
        else:
            self._recv_window -= len(data)


def _joined(paused: object, waiting: list[tuple[bytes, int | None]], data: bytes, datatype: int | None) -> bool:
    """Whether the data went to the end of what waits already: one object a byte would be a hundred times the window."""
    if not paused or not waiting or waiting[-1][1] != datatype or len(waiting[-1][0]) + len(data) > JOIN_BYTES:
        return False
    waiting[-1] = (waiting[-1][0] + data, datatype)
    return True
