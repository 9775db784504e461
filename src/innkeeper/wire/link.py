"""A link: many streams over one connection. The peer is hostile: every length is bounded before memory is spent on it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

import structlog

from innkeeper.errors import InnkeeperError, LinkLostError, PayloadTooLargeError, from_code
from innkeeper.wire.frames import (
    CREDIT,
    HEADER,
    Kind,
    Limits,
    ProtocolError,
    check_header,
    frame,
    json_frame,
    parse_object,
)
from innkeeper.wire.stream import Stream

log = structlog.get_logger(__name__)

Handler = Callable[[Stream], Awaitable[dict[str, Any]]]
MESSAGE_CHARACTERS = 2_000
# The part of the event loop's time that `frames_per_second` small frames take (3 to 4 µs each). Larger ones are charged for what they took: 256 KiB
# of a hostile guest's JSON can cost 15 ms.
LOOP_SHARE = 0.08
SMALL_BYTES = 1_024
# A few bytes that could not be joined to others, on two channels by turns above all, wake their reader as a large piece does: 30 µs.
PIECE_COST = 8
BYTES_PER_FRAME = 2_048


class Link(asyncio.Protocol):
    """One end of a link.

    Args:
        limits: what this end accepts.
        handlers: verbs that this end serves; an OPEN from the peer of a link without handlers is a protocol error.
        opens_odd: whether this end's stream ids are odd (the two ends differ).
        make_error: the exception for a peer's ERROR (code, message).

    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        handlers: Mapping[str, Handler] | None = None,
        opens_odd: bool = True,
        make_error: Callable[[str, str], Exception] = from_code,
    ) -> None:
        self.limits = limits or Limits()
        self._handlers = handlers
        self._next_id = 1 if opens_odd else 2
        self._make_error = make_error
        self._streams: dict[int, Stream] = {}
        self._served: dict[int, asyncio.Task[None]] = {}
        self._highest_served = 0
        self._transport: asyncio.Transport | None = None
        self._fd = -1
        self._writable: asyncio.Future[None] | None = None
        self._buffer = bytearray()
        self._data_left = 0
        self._data_stream: Stream | None = None
        self._data_channel = 1
        self._pings: list[asyncio.Future[None]] = []
        loop = asyncio.get_running_loop()
        self._allowance = float(self.limits.frames_at_once)
        self._allowed_at = loop.time()
        # Bytes that wait for the allowance, at most what was read at once.
        self._held = b""
        self._waiting: asyncio.TimerHandle | None = None
        self.hello: asyncio.Future[dict[str, Any]] = loop.create_future()
        self.closed: asyncio.Future[BaseException | None] = loop.create_future()

    # --- opening and sending ---------------------------------------------------------------------------------------

    def open(self, verb: str, params: Mapping[str, Any] | None = None) -> Stream:
        """Open a stream. Raises LinkLostError when the link is closed, PayloadTooLargeError when the parameters do not fit a frame."""
        if self.closed.done():
            raise LinkLostError
        body = {"verb": verb, **(params or {})}
        opening = json_frame(Kind.OPEN, self._next_id, body)
        if len(opening) - HEADER.size > self.limits.max_payload:
            raise PayloadTooLargeError
        stream = Stream(self, self._next_id, body)
        self._next_id += 2
        self._streams[stream.id] = stream
        self.write(opening)
        return stream

    async def request(
        self, verb: str, params: Mapping[str, Any] | None = None, *, timeout_seconds: float
    ) -> dict[str, Any]:
        """A stream without data: its RESULT. Cancelled on the peer when it takes too long (TimeoutError)."""
        stream = self.open(verb, params)
        try:
            async with asyncio.timeout(timeout_seconds):
                return await stream.result()
        finally:
            stream.cancel()

    async def ping(self) -> None:
        """Wait for the peer's answer to a ping. Raises LinkLostError when the link is, or gets, closed."""
        if self.closed.done():
            raise LinkLostError
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pings.append(answer)
        self.write(frame(Kind.PING, 0, bytes(8)))
        await answer

    def send_hello(self, body: dict[str, Any]) -> None:
        """Send this end's HELLO."""
        self.write(json_frame(Kind.HELLO, 0, body))

    def write(self, data: bytes, payload: memoryview | None = None) -> None:
        """Hand bytes to the socket, with a payload behind them that is not kept. A peer that does not read is cut off once the send buffer is full."""
        if self._transport is None or self.closed.done():
            return
        if payload is not None:
            data = self._write_now(self._transport, data, payload)
        if data:
            self._transport.write(data)
        if self._transport.get_write_buffer_size() > self.limits.max_send_buffer:
            self.close(ProtocolError("the peer does not read"))

    def _write_now(self, transport: asyncio.Transport, header: bytes, payload: memoryview) -> bytes:
        """Give both to the kernel without putting them together first; what it does not take is returned."""
        sent = 0
        # A transport that is closing may have closed its descriptor, whose number is another's then.
        if self._fd >= 0 and not transport.get_write_buffer_size() and not transport.is_closing():
            # An error is the transport's to find.
            with contextlib.suppress(OSError):
                sent = os.writev(self._fd, (header, payload))
        if sent >= len(header):
            return bytes(payload[sent - len(header) :])
        return b"".join((header[sent:], payload))

    @property
    def paused(self) -> bool:
        """Whether the socket's send buffer is above its high-water mark."""
        return self._writable is not None

    async def writable(self) -> None:
        """Wait while the socket's send buffer is above its high-water mark."""
        if self._writable is not None:
            # Many senders wait for one future: without the shield, one that is cancelled would cancel them all.
            await asyncio.shield(self._writable)

    @property
    def open_streams(self) -> int:
        """Streams in both directions that have not ended."""
        return len(self._streams)

    def serves(self, stream: Stream) -> bool:
        """Whether this end serves the stream (the peer opened it)."""
        return stream.id in self._served

    def forget(self, stream: Stream) -> None:
        """Drop a stream: what still arrives for it is ignored."""
        self._streams.pop(stream.id, None)

    def close(self, reason: BaseException | None = None) -> None:
        """Close the link; every open stream fails with LinkLostError."""
        if self.closed.done():
            return
        self.closed.set_result(reason)
        if isinstance(reason, ProtocolError):
            log.warning("link closed", reason=str(reason))
        if self._transport is not None:
            self._transport.abort()
        self._held = b""
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        if not self.hello.done():
            self.hello.cancel()
        for stream in list(self._streams.values()):
            stream.finish(failure=LinkLostError())
        self._streams.clear()
        for task in self._served.values():
            task.cancel()
        for waiter in self._pings:
            if not waiter.done():
                waiter.set_exception(LinkLostError())
        self.resume_writing()

    async def wait_closed(self) -> None:
        """Wait until the link is closed and no handler of it runs any more."""
        await asyncio.shield(self.closed)
        if self._served:
            await asyncio.wait(list(self._served.values()))

    # --- asyncio.Protocol ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        # Sockets always are; uvloop's transports do not say so by their class.
        self._transport = cast(asyncio.Transport, transport)
        connection = transport.get_extra_info("socket")
        if connection is not None:
            self._fd = connection.fileno()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self.close(exc)

    def pause_writing(self) -> None:
        """The send buffer is full."""
        if self._writable is None:
            self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        """The send buffer has room."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    def data_received(self, data: bytes) -> None:
        """Take bytes off the connection; a protocol error closes the link."""
        if self._waiting is not None:
            # Read before the pause took effect.
            self._held += data
            return
        try:
            self.feed(data)
        except ProtocolError as error:
            self.close(error)

    # --- a peer that sends more frames than this end has time for -----------------------------------------------------

    def _spend(self, seconds: float = 0.0) -> bool:
        """Count a frame, and the time that it took if it was not small; whether the allowance is used up."""
        rate = self.limits.frames_per_second
        if rate is None:
            return False
        self._allowance -= 1 + seconds * rate / LOOP_SHARE
        if self._allowance > 0:
            return False
        now = asyncio.get_running_loop().time()
        self._allowance += min(self.limits.frames_at_once - self._allowance, (now - self._allowed_at) * rate)
        self._allowed_at = now
        return self._allowance <= 0

    def _hold(self, rest: bytes) -> None:
        """Read on when a tenth of a second's worth of frames, or as many as may come at once, is allowed again."""
        rate = self.limits.frames_per_second or 1
        if self._transport is not None:
            self._transport.pause_reading()
        self._held = rest
        wanted = min(self.limits.frames_at_once, rate / 10) - self._allowance
        self._waiting = asyncio.get_running_loop().call_later(wanted / rate, self._go_on)

    def _go_on(self) -> None:
        self._waiting = None
        rest, self._held = self._held, b""
        self.data_received(rest)
        if self._waiting is None and self._transport is not None and not self.closed.done():
            self._transport.resume_reading()

    # --- receiving -------------------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Parse bytes and hand frames to their streams. DATA is handed on as it comes, never collected.

        Raises:
            ProtocolError: the peer broke the protocol.

        """
        position, size, buffer = 0, len(data), self._buffer
        view = memoryview(data)
        while position < size and not self.closed.done():
            if self._data_left:
                taken = min(self._data_left, size - position)
                self._data_left -= taken
                if self._data_stream is not None:
                    alone = self._data_stream.push_data(view[position : position + taken], self._data_channel)
                    if alone and taken < SMALL_BYTES:
                        self._allowance -= PIECE_COST
                position += taken
                continue
            if len(buffer) < HEADER.size:
                taken = min(HEADER.size - len(buffer), size - position)
                buffer += data[position : position + taken]
                position += taken
                if len(buffer) < HEADER.size:
                    return
            length, stream_id, kind_number = HEADER.unpack_from(buffer)
            kind = check_header(length, stream_id, kind_number, max_payload=self.limits.max_payload)
            if kind is Kind.DATA or kind is Kind.DATA2:
                del buffer[:]
                stream = self._streams.get(stream_id)
                if stream is not None:
                    if kind is Kind.DATA2 and stream_id in self._served:
                        raise ProtocolError("a second channel from the opener")
                    stream.reserve(length)
                self._data_stream, self._data_left, self._data_channel = stream, length, 1 if kind is Kind.DATA else 2
                if self._spend():
                    self._hold(data[position:])
                    return
                continue
            missing = HEADER.size + length - len(buffer)
            taken = min(missing, size - position)
            buffer += data[position : position + taken]
            position += taken
            if taken == missing:
                payload = bytes(buffer[HEADER.size :])
                del buffer[:]
                # Of this thread: that the machine is busy with something else is not the peer's doing.
                began = time.thread_time() if length > SMALL_BYTES else 0.0
                self._frame(kind, stream_id, payload)
                took = time.thread_time() - began if began else 0.0
                # Copied on its way here.
                self._allowance -= length / BYTES_PER_FRAME
                if self._spend(took) and not self.closed.done():
                    self._hold(data[position:])
                    return

    def _frame(self, kind: Kind, stream_id: int, payload: bytes) -> None:
        if stream_id == 0:
            self._link_frame(kind, payload)
            return
        if kind is Kind.OPEN:
            self._serve(stream_id, parse_object(payload))
            return
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if kind is Kind.MESSAGE:
            stream.push_message(payload)
        elif kind is Kind.END:
            stream.push_end()
        elif kind is Kind.CREDIT:
            stream.add_credit(CREDIT.unpack(payload)[0])
        elif kind is Kind.CANCEL:
            task = self._served.get(stream_id)
            if task is None:
                raise ProtocolError("the peer cancelled a stream that it did not open")
            self.forget(stream)
            stream.finish(failure=asyncio.CancelledError())
            task.cancel()
        else:
            if stream_id in self._served:
                raise ProtocolError("a result for a stream that the peer opened")
            # Parsed first: a stream that was forgotten would not hear of the link's end, and its reader wait for ever.
            body = parse_object(payload)
            self.forget(stream)
            if kind is Kind.RESULT:
                stream.finish(result=body)
            else:
                code, message = _text(body.get("code"))[:64], _text(body.get("message"))[:MESSAGE_CHARACTERS]
                stream.finish(failure=self._make_error(code, message))

    def _link_frame(self, kind: Kind, payload: bytes) -> None:
        if kind is Kind.PING:
            self.write(frame(Kind.PONG, 0, payload))
        elif kind is Kind.PONG:
            if self._pings:
                waiter = self._pings.pop(0)
                if not waiter.done():
                    waiter.set_result(None)
        elif self.hello.done():
            raise ProtocolError("a second hello")
        else:
            self.hello.set_result(parse_object(payload))

    def _serve(self, stream_id: int, body: dict[str, Any]) -> None:
        own_parity = self._next_id % 2
        if self._handlers is None or stream_id % 2 == own_parity or stream_id <= self._highest_served:
            raise ProtocolError("an unexpected open")
        self._highest_served = stream_id
        if len(self._served) >= self.limits.max_streams:
            self.write(_error(stream_id, "too_many_streams", "Too many streams are open"))
            return
        handler = self._handlers.get(_text(body.get("verb")))
        stream = Stream(self, stream_id, body)
        self._streams[stream_id] = stream
        task = asyncio.get_running_loop().create_task(self._run(handler, stream))
        self._served[stream_id] = task
        # Not in _run's finally: a task that is cancelled before its first step never enters its body.
        task.add_done_callback(lambda _: self._served.pop(stream_id, None))

    async def _run(self, handler: Handler | None, stream: Stream) -> None:
        try:
            answer = await self._answer(handler, stream)
            # Whoever cancelled hears nothing more on the stream.
            if not stream.over:
                self.write(answer)
        finally:
            self.forget(stream)
            stream.finish(result={})

    async def _answer(self, handler: Handler | None, stream: Stream) -> bytes:
        if handler is None:
            return _error(stream.id, "unknown_verb", "Unknown verb")
        try:
            answer = json_frame(Kind.RESULT, stream.id, await handler(stream))
        except asyncio.CancelledError:
            # Not always the peer's doing: a stream that the handler used may have been cancelled, and the peer still waits.
            return _error(stream.id, LinkLostError.code, "The call was broken off")
        except InnkeeperError as error:
            return _error(stream.id, error.code, error.message)
        except Exception:
            # The peer learns no internals; the log has them.
            log.exception("handler failed", verb=stream.params.get("verb"))
            return _error(stream.id, "internal_error", "Internal error")
        if len(answer) - HEADER.size > self.limits.max_payload:
            return _error(stream.id, PayloadTooLargeError.code, "The answer is too large")
        return answer


def _error(stream_id: int, code: str, message: str) -> bytes:
    return json_frame(Kind.ERROR, stream_id, {"code": code, "message": message[:MESSAGE_CHARACTERS]})


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
