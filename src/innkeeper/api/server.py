"""The HTTP server: every limit and timeout of it, and its two listeners.

The operator's unix socket is a listener of its own whose application marks the scope; nothing on the wire can make that mark.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from innkeeper.api.auth import OPERATOR
from innkeeper.settings import Settings

HEAD_MAX_BYTES = 64 << 10
HEAD_DEADLINE_SECONDS = 20.0
LINGER_SECONDS = 1.0
LINGER_BYTES = 4 << 20
KEEP_ALIVE_SECONDS = 75
BACKLOG = 1_024
SOCKET_NAME = "inn.sock"


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with what it lacks: a limit and a deadline for request heads, and bad requests answered as JSON."""

    _head_bytes = 0
    _in_head = True
    _deadline: asyncio.TimerHandle | None = None
    _refused = False
    _discarded = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first request's head."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEAD_DEADLINE_SECONDS, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the deadline."""
        self._stop_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, counting what belongs to a head that is not complete."""
        if self._refused:
            self._discarded += len(data)
            if self._discarded > LINGER_BYTES:
                self.transport.abort()
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._deadline is None:
                self._deadline = self.loop.call_later(HEAD_DEADLINE_SECONDS, self._too_slow)
        super().data_received(data)
        if self._in_head and self._head_bytes > HEAD_MAX_BYTES and not self._refused:
            self._refuse(431, "Request Header Fields Too Large", "The request's header is too large.")

    def on_headers_complete(self) -> None:
        """The head is over: its deadline and its count end."""
        self._in_head = False
        self._head_bytes = 0
        self._stop_deadline()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next byte begins a head."""
        self._in_head = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        self._refuse(400, "Bad Request", msg)

    def _too_slow(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: int, reason: str, message: str) -> None:
        body = json.dumps({"error": "invalid_request", "message": message}).encode()
        head = (
            f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        # Closing with unread input makes the kernel send a reset, which would overtake the answer: so what still comes is read and dropped for a while.
        self._refused = True
        self.transport.write_eof()
        self._stop_deadline()
        self._deadline = self.loop.call_later(LINGER_SECONDS, self._too_slow)


class UnixSocketOperator:
    """Marks every request as the operator's: the socket's file mode is the authentication."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, marked."""
        scope[OPERATOR] = True
        await self._app(scope, receive, send)


class _Server(uvicorn.Server):
    """Signals are the launcher's, which stops both listeners together."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def open_sockets(settings: Settings) -> list[socket.socket]:
    """The listening sockets of a server: TCP, and the operator's unix socket (mode 0600) in `settings.api_dir`.

    Raises:
        OSError: an address is in use.

    """
    family = socket.AF_INET6 if ":" in settings.listen else socket.AF_INET
    tcp = socket.socket(family, socket.SOCK_STREAM)
    try:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tcp.bind((settings.listen, settings.port))
        tcp.listen(BACKLOG)
        tcp.setblocking(False)
        return [tcp, open_operator_socket(settings.api_dir / SOCKET_NAME)]
    except BaseException:
        tcp.close()
        raise


def open_operator_socket(path: Path) -> socket.socket:
    """A listening unix socket that only its owner (and root) can use; a socket that a former server left there is replaced."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # bind() makes the file with the umask's mode: no moment at which it is open to others.
        before = os.umask(0o177)
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(before)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def server_config(app: ASGIApp, *, graceful_seconds: float) -> uvicorn.Config:
    """uvicorn's configuration, the one place where its limits stand."""
    options: dict[str, Any] = {
        "loop": "uvloop",
        "http": BoundedHttpProtocol,
        "ws": "none",
        "lifespan": "off",
        # The edge writes the access log, structlog everything else.
        "access_log": False,
        "log_config": None,
        "log_level": "warning",
        "server_header": False,
        # A TLS front on this machine says who the client is; nobody else is believed.
        "proxy_headers": True,
        "forwarded_allow_ips": "127.0.0.1,::1",
        "backlog": BACKLOG,
        "timeout_keep_alive": KEEP_ALIVE_SECONDS,
        "timeout_graceful_shutdown": math.ceil(graceful_seconds),
        "root_path": "",
    }
    return uvicorn.Config(app, **options)


async def serve(
    app: ASGIApp, sockets: Sequence[socket.socket], *, stop: asyncio.Event, graceful_seconds: float
) -> None:
    """Serve until `stop` is set, then finish what runs within `graceful_seconds`. Unix sockets among `sockets` are the operator's. Closes the sockets."""
    groups: list[tuple[ASGIApp, list[socket.socket]]] = [
        (app, [s for s in sockets if s.family != socket.AF_UNIX]),
        (UnixSocketOperator(app), [s for s in sockets if s.family == socket.AF_UNIX]),
    ]
    servers = [
        (_Server(server_config(wrapped, graceful_seconds=graceful_seconds)), group)
        for wrapped, group in groups
        if group
    ]

    async def watch() -> None:
        await stop.wait()
        for server, _ in servers:
            server.should_exit = True

    async with asyncio.TaskGroup() as tasks:
        watcher = tasks.create_task(watch())
        running = [tasks.create_task(server.serve(sockets=group)) for server, group in servers]
        await asyncio.wait(running)
        watcher.cancel()
