"""One stream of a link, seen from either end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from innkeeper.errors import LinkLostError, PayloadTooLargeError
from innkeeper.wire.frames import CREDIT, HEADER, MAX_SEND_PAYLOAD, Kind, ProtocolError, frame, json_frame, parse_object

if TYPE_CHECKING:
    from innkeeper.wire.link import Link


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes of a stream. Channel 1 is the main one; 2 is a second one (stderr)."""

    data: bytes
    channel: int = 1


@dataclass(frozen=True, slots=True)
class Message:
    """A JSON message within a stream."""

    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class End:
    """The other side sends no more data."""


Event = Data | Message | End
# Takes as many of some bytes, from their beginning, as nobody has to be waited for; returns how many. The bytes do not change afterwards.
Take = Callable[[memoryview], int]
MAX_CREDIT = 1 << 31
# A peer that sends its bytes one by one must not cost an object for each: small neighbours are joined, and what cannot be joined is counted.
JOIN_BYTES = 1_024
BYTES_PER_PIECE = 64
# Smaller pieces are joined and counted, so that they cost a peer as much as they cost us.
SHORTCUT_BYTES = 1_024


class Stream:
    """Sends and receives on one stream. `params` are the OPEN's parameters."""

    def __init__(self, link: Link, stream_id: int, params: dict[str, Any]) -> None:
        self.id = stream_id
        self.params = params
        self.link = link
        self._events: deque[Event] = deque()
        self._unread_messages: deque[int] = deque()
        self._unread_message_bytes = 0
        self._max_pieces = link.limits.max_unread_messages + max(64, link.limits.window // BYTES_PER_PIECE)
        self._peer_ended = False
        self._waiter: asyncio.Future[None] | None = None
        self._receive_window = link.limits.window
        self._grant_step = link.limits.grant_step
        self._consumed = 0
        self._send_credit = link.limits.window
        self._credit_waiter: asyncio.Future[None] | None = None
        self._result: dict[str, Any] | None = None
        self._failure: BaseException | None = None
        self._take: Take | None = None

    # --- sending ---------------------------------------------------------------------------------------------------

    async def send_data(self, data: bytes | memoryview, *, channel: int = 1) -> None:
        """Send bytes in frames of at most 256 KiB; waits for the peer's credit and for the socket."""
        view = memoryview(data)
        kind = Kind.DATA if channel == 1 else Kind.DATA2
        while view:
            while self._send_credit <= 0:
                self._raise_if_over()
                self._credit_waiter = asyncio.get_running_loop().create_future()
                await self._credit_waiter
            self._raise_if_over()
            size = min(len(view), self._send_credit, MAX_SEND_PAYLOAD)
            self._send_credit -= size
            self.link.write(HEADER.pack(size, self.id, kind), view[:size])
            view = view[size:]
            await self.link.writable()

    def send_now(self, data: memoryview) -> int:
        """Send as many of the bytes as neither credit nor socket have to be waited for; returns how many. Not while `send_data` waits."""
        size = 0 if self.over or self.link.paused else min(len(data), self._send_credit, MAX_SEND_PAYLOAD)
        if size > 0:
            self._send_credit -= size
            self.link.write(HEADER.pack(size, self.id, Kind.DATA), data[:size])
        return max(0, size)

    async def send_message(self, body: dict[str, Any]) -> None:
        """Send a JSON message. Raises PayloadTooLargeError when it does not fit a frame."""
        self._raise_if_over()
        message = json_frame(Kind.MESSAGE, self.id, body)
        if len(message) - HEADER.size > self.link.limits.max_payload:
            raise PayloadTooLargeError
        self.link.write(message)
        await self.link.writable()

    async def send_end(self) -> None:
        """Say that no more data comes from this side."""
        if not self.over:
            self.link.write(frame(Kind.END, self.id))

    def cancel(self) -> None:
        """Give the stream up (the opener's right): the peer stops, and what it still sends is ignored."""
        if not self.over:
            self.link.forget(self)
            self.link.write(frame(Kind.CANCEL, self.id))
            self.finish(failure=asyncio.CancelledError())

    # --- receiving -------------------------------------------------------------------------------------------------

    async def next_event(self) -> Event | None:
        """The next event, or None after the RESULT. Raises the typed error when the stream failed."""
        while not self._events:
            if self._failure is not None:
                raise self._failure
            if self._result is not None:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        event = self._events.popleft()
        if isinstance(event, Data):
            self._grant(len(event.data))
        elif isinstance(event, Message):
            self._unread_message_bytes -= self._unread_messages.popleft()
        return event

    def shortcut(self, take: Take | None) -> None:
        """Offer data to `take` before it is queued: while the reader waits for an event and none is there, so that the order stays.

        For whoever only passes bytes on: waking a task for each piece would be most of the work.
        """
        self._take = take

    def allow(self, size: int) -> None:
        """Let the peer send that many more bytes before they are read. Once."""
        if not self.over:
            self._receive_window += size
            # Every word of credit wakes the other process: half of what may be under way is soon enough.
            self._grant_step = (self.link.limits.window + size) // 2
            self.link.write(frame(Kind.CREDIT, self.id, CREDIT.pack(size)))

    async def events(self) -> AsyncIterator[Event]:
        """Events in order until the RESULT (or, on the serving side, until the opener's END). Raises the typed error when the stream failed."""
        while (event := await self.next_event()) is not None:
            yield event
            if isinstance(event, End) and self.link.serves(self):
                return

    async def result(self) -> dict[str, Any]:
        """The RESULT; drops events that were not read."""
        while await self.next_event() is not None:
            pass
        if self._result is None:
            raise ProtocolError("the stream has no result")
        return self._result

    @property
    def over(self) -> bool:
        """Whether the stream has ended, well or not."""
        return self._result is not None or self._failure is not None

    # --- called by the link ----------------------------------------------------------------------------------------

    def reserve(self, size: int) -> None:
        """Account for an arriving DATA frame before its bytes come. Raises ProtocolError beyond the granted credit and after END."""
        if self._peer_ended:
            raise ProtocolError("data after the end")
        self._receive_window -= size
        if self._receive_window < 0:
            raise ProtocolError("data beyond the credit")

    def push_data(self, data: bytes | memoryview, channel: int) -> bool:
        """Queue bytes that were reserved; whether as a piece of their own. Raises ProtocolError when too many pieces of too few bytes are unread."""
        if self._take is not None and channel == 1 and len(data) >= SHORTCUT_BYTES and self._reader_waits():
            taken = self._take(memoryview(data))
            self._grant(taken)
            if taken == len(data):
                return False
            data = data[taken:]
        # Its own copy: a view would keep all that was read with it.
        data = bytes(data)
        last = self._events[-1] if self._events else None
        if isinstance(last, Data) and last.channel == channel and len(last.data) + len(data) <= JOIN_BYTES:
            self._events[-1] = Data(last.data + data, channel)
            return False
        if len(self._events) >= self._max_pieces:
            raise ProtocolError("too many unread pieces of data")
        self._push(Data(data, channel))
        return True

    def push_message(self, payload: bytes) -> None:
        """Queue a message. Raises ProtocolError when it is not an object, or too many or too large ones are unread."""
        self._unread_messages.append(len(payload))
        self._unread_message_bytes += len(payload)
        limits = self.link.limits
        if len(self._unread_messages) > limits.max_unread_messages or self._unread_message_bytes > limits.max_payload:
            raise ProtocolError("too many unread messages")
        self._push(Message(parse_object(payload)))

    def push_end(self) -> None:
        """Queue the peer's END; a repeated one says nothing new."""
        if not self._peer_ended:
            self._peer_ended = True
            self._push(End())

    def _reader_waits(self) -> bool:
        return not self._events and self._waiter is not None and not self._waiter.done()

    def _push(self, event: Event) -> None:
        self._events.append(event)
        self._wake()

    def add_credit(self, size: int) -> None:
        """The peer accepts `size` more bytes."""
        self._send_credit += size
        if self._send_credit > MAX_CREDIT:
            raise ProtocolError("credit overflow")
        self._wake_sender()

    def finish(self, *, result: dict[str, Any] | None = None, failure: BaseException | None = None) -> None:
        """Record the end of the stream and wake whoever waits."""
        if self.over:
            return
        self._result, self._failure = result, failure
        self._wake()
        self._wake_sender()

    def _raise_if_over(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._result is not None:
            # Nobody's fault: the peer may end a stream before it has read all of it.
            raise LinkLostError("The other side has ended the call")

    def _grant(self, size: int) -> None:
        self._consumed += size
        if self._consumed >= self._grant_step and not self.over:
            self._receive_window += self._consumed
            self.link.write(frame(Kind.CREDIT, self.id, CREDIT.pack(self._consumed)))
            self._consumed = 0

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _wake_sender(self) -> None:
        if self._credit_waiter is not None and not self._credit_waiter.done():
            self._credit_waiter.set_result(None)
