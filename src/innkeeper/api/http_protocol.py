"""HTTP/1.1 of one connection: uvicorn's protocol with what it lacks against clients that are slow, silent, endless or no clients at all."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import json
import struct
import termios
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from innkeeper.api.body import CLIENT_SECONDS
from innkeeper.api.body_shortcuts import OFFER_BODY, SEND_NOW
from innkeeper.api.connections import Connections, HttpLimits
from innkeeper.api.raw_connection import TAKE_OVER, TAKEN_OVER, RawConnection

HEAD_MAX_BYTES = 64 << 10
# Requests that wait on one connection for the answer to an earlier one. One read of 256 KiB can hold 14,000, and each is an object.
MAX_PIPELINED = 32
LINGER_SECONDS = 1.0
LINGER_BYTES = 4 << 20


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. Each of its limits ends the connection, after an answer where one can still be given.

    - a request's head: 64 KiB and `head_seconds`;
    - bytes that bring no request on (chunk extensions, trailers, empty lines): 64 KiB;
    - pipelined requests: 32;
    - a body that nobody wants, because the answer is given already: 4 MiB;
    - an answer of which the client takes nothing: `client_seconds`.
    """

    def __init__(self, *args: Any, limits: HttpLimits, open_connections: Connections, **more: Any) -> None:
        super().__init__(*args, **more)
        self._limits = limits
        self._open_connections = open_connections
        # Since the parser last had something to say.
        self._fruitless_bytes = 0
        self._in_head = True
        self._deadline: asyncio.TimerHandle | None = None
        self._refused = False
        self._discarded = 0
        self._stall: asyncio.TimerHandle | None = None
        self._untaken = 0
        # What came after a request for an upgrade that the application has not decided on yet.
        self._early: bytearray | None = None
        self._raw: RawConnection | None = None
        # Who takes the body that is coming before it is collected.
        self._take_body: Callable[[memoryview], int] | None = None

    # --- the connection --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection in, or refuse it, and start the deadline of the first request's head."""
        super().connection_made(transport)
        if not self._open_connections.opened(self):
            self._refuse(503, "Service Unavailable", "service_unavailable", "The server has too many connections.")
            return
        self._deadline = self.loop.call_later(self._limits.head_seconds, self.drop)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._stop_deadline()
        self.resume_writing()
        self._open_connections.closed(self)
        super().connection_lost(exc)
        if self._raw is not None:
            self._raw.lost(exc)

    def drop(self) -> None:
        """End the connection at once, with what is still to be sent."""
        self._deadline = None
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Feed the parser, counting what leads to nothing; after an upgrade, whoever took the connection over."""
        if self._raw is not None:
            self._raw.feed(data)
            return
        if self._early is not None:
            self._early += data
            if len(self._early) > HEAD_MAX_BYTES:
                self.flow.pause_reading()
            return
        if self._refused or self._nobody_wants():
            self._discarded += len(data)
            if self._discarded > LINGER_BYTES:
                self.drop()
                return
            if self._refused:
                return
        if self._in_head and self._deadline is None:
            self._deadline = self.loop.call_later(self._limits.head_seconds, self.drop)
        self._fruitless_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        except httptools.HttpParserUpgrade as upgrade:
            self._after_upgrade(data[upgrade.args[0] :])
        if self._fruitless_bytes > HEAD_MAX_BYTES and not self._refused:
            self._refuse(
                431, "Request Header Fields Too Large", "invalid_request", "The request's header is too large."
            )

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The client has closed its side. Where it speaks HTTP, that ends the connection, else whoever took it over decides."""
        if self._raw is None:
            return None
        self._raw.feed_end()
        return True

    def _nobody_wants(self) -> bool:
        """Whether the body that is coming belongs to a request that was answered without it."""
        return not self._in_head and self.cycle is not None and self.cycle.response_complete

    # --- upgrades --------------------------------------------------------------------------------------------------

    def _after_upgrade(self, rest: bytes) -> None:
        """What came after a request that asks for an upgrade: it waits for the application, or is the next request."""
        if self._refused:
            return
        if TAKE_OVER in self.scope and self.cycle is not None and not self.cycle.response_complete:
            self._early = bytearray(rest)
        elif rest:
            self.data_received(rest)

    def _has_body(self) -> bool:
        return any(
            name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0"))
            for name, value in self.headers
        )

    def _take_over(self, head: bytes) -> RawConnection:
        """End the connection's HTTP with the head of an answer. Raises ConnectionResetError when the client has gone."""
        if self.cycle is None or self.cycle.disconnected or self.transport.is_closing():
            raise ConnectionResetError
        # So that nothing is answered any more, and the server's end closes the connection.
        self.cycle.response_started = self.cycle.response_complete = True
        self.scope[TAKEN_OVER] = int(head[9:12])  # type: ignore[literal-required]
        self._raw = RawConnection(self.transport, self.flow.drain)
        early, self._early = self._early, None
        self.flow.resume_reading()
        self.transport.write(head)
        if early:
            self._raw.feed(bytes(early))
        return self._raw

    # --- the parser ------------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of a head. Those behind a body are no fields of the request: whoever looked at its head has not seen them."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is over: its deadline and its count end."""
        if self._refused:
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            # In the middle of a read that may hold thousands more. An answer now would be taken for that of an earlier request.
            self._refused = True
            self.drop()
            return
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEAD_MAX_BYTES:
            # It came in one read, so that the count of what leads to nothing did not see it on its way.
            self._refuse(
                431, "Request Header Fields Too Large", "invalid_request", "The request's header is too large."
            )
            return
        if self.parser.should_upgrade() and self._has_body():
            # The parser leaves the body of such a request to be read as the next request: a way to smuggle one.
            self._refuse(400, "Bad Request", "invalid_request", "A request with a body cannot ask for an upgrade.")
            return
        self._in_head = False
        self._fruitless_bytes = 0
        self._stop_deadline()
        self._open_connections.busy(self)
        self.scope[CLIENT_SECONDS] = self._limits.client_seconds  # type: ignore[literal-required]
        # Pipelined behind another request, its answer would not be the next one on the connection.
        if self.parser.should_upgrade() and (self.cycle is None or self.cycle.response_complete):
            self.scope[TAKE_OVER] = self._take_over  # type: ignore[literal-required]
        self._take_body = None
        super().on_headers_complete()
        self.scope[SEND_NOW] = functools.partial(self._send_now, self.cycle)  # type: ignore[literal-required]
        self.scope[OFFER_BODY] = functools.partial(self._offer_body, self.cycle)  # type: ignore[literal-required]

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if not self._refused:
            self._fruitless_bytes = 0
            if self._take_body is not None and not self.cycle.body and not self.cycle.response_complete:
                body = body[self._take_body(memoryview(body)) :]
            if body:
                super().on_body(body)

    def on_message_complete(self) -> None:
        """The next byte begins a head."""
        if not self._refused:
            self._in_head = True
            self._stop_deadline()
            self._fruitless_bytes = 0
            self._discarded = 0
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer was handed over."""
        super().on_response_complete()
        if not self._in_head and self._deadline is None:
            # The rest of the body is read so that the answer arrives, but not for as long as it pleases the client.
            self._deadline = self.loop.call_later(self._limits.client_seconds, self.drop)
        if self.cycle is None or self.cycle.response_complete:
            self._open_connections.idle(self)
        early, self._early = self._early, None
        if early and not self.transport.is_closing():
            # The upgrade was declined: these are requests.
            self.data_received(bytes(early))

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        if not self._refused:
            self._refuse(400, "Bad Request", "invalid_request", msg)

    # --- bodies past the application ----------------------------------------------------------------------------------

    def _send_now(self, cycle: RequestResponseCycle, data: memoryview) -> bool:
        if (
            cycle.disconnected
            or cycle.response_complete
            or cycle.chunked_encoding is not False
            or len(data) > cycle.expected_content_length
            or self.flow.write_paused
            or self.transport.is_closing()
        ):
            return False
        cycle.expected_content_length -= len(data)
        self.transport.write(data)
        return True

    def _offer_body(self, cycle: RequestResponseCycle, take: Callable[[memoryview], int]) -> None:
        # A body that is all there, or another request's, is not to be taken any more.
        if cycle is self.cycle and cycle.more_body:
            self._take_body = take

    # --- clients that do not take their answer -----------------------------------------------------------------------

    def pause_writing(self) -> None:
        """The send buffer is full: from now on the client has to take something, again and again."""
        super().pause_writing()
        self._untaken = self._to_be_taken()
        self._stall = self.loop.call_later(self._limits.client_seconds, self._check_stall)

    def resume_writing(self) -> None:
        """The send buffer has room."""
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
            super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing came after the last answer. One that was not even taken by now is given up."""
        if self.transport.get_write_buffer_size():
            self.drop()
        else:
            super().timeout_keep_alive_handler()

    def _check_stall(self) -> None:
        untaken = self._to_be_taken()
        if untaken >= self._untaken:
            self._stall = None
            self.drop()
            return
        self._untaken = untaken
        self._stall = self.loop.call_later(self._limits.client_seconds, self._check_stall)

    def _to_be_taken(self) -> int:
        """Bytes that the client has not acknowledged, in our buffer and in the kernel's."""
        waiting = bytearray(4)
        with contextlib.suppress(OSError):
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, waiting)
        return self.transport.get_write_buffer_size() + int(struct.unpack("i", waiting)[0])

    # --- refusing --------------------------------------------------------------------------------------------------

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: int, reason: str, code: str, message: str) -> None:
        body = json.dumps({"error": code, "message": message}).encode()
        head = (
            f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        # Closing with unread input makes the kernel send a reset, which would overtake the answer: so what still comes is read and dropped for a while.
        self._refused = True
        self.transport.write_eof()
        self._stop_deadline()
        self._deadline = self.loop.call_later(LINGER_SECONDS, self.drop)
