"""The HTTP server: every limit and timeout of it, and its two listeners.

The operator's unix socket is a listener of its own whose application marks the scope; nothing on the wire can make that mark.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import resource
import socket
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from innkeeper.api.auth import OPERATOR
from innkeeper.api.connections import Connections, HttpLimits
from innkeeper.api.http_protocol import BoundedHttpProtocol
from innkeeper.settings import Settings

# Descriptors of the process that are no connections.
OTHER_DESCRIPTORS = 256
BACKLOG = 1_024
SOCKET_NAME = "inn.sock"


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


def server_config(app: ASGIApp, limits: HttpLimits, *, graceful_seconds: float) -> uvicorn.Config:
    """uvicorn's configuration, the one place where its limits stand."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    # Each listener's own: clients must not be able to shut the operator out.
    connections = Connections(max(1, min(limits.max_connections, descriptors - OTHER_DESCRIPTORS)))
    options: dict[str, Any] = {
        "loop": "uvloop",
        "http": functools.partial(BoundedHttpProtocol, limits=limits, open_connections=connections),
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
        "timeout_keep_alive": limits.keep_alive_seconds,
        "timeout_graceful_shutdown": math.ceil(graceful_seconds),
        "root_path": "",
    }
    return uvicorn.Config(app, **options)


async def serve(
    app: ASGIApp,
    sockets: Sequence[socket.socket],
    *,
    stop: asyncio.Event,
    graceful_seconds: float,
    limits: HttpLimits | None = None,
) -> None:
    """Serve until `stop` is set, then finish what runs within `graceful_seconds`. Unix sockets among `sockets` are the operator's. Closes the sockets."""
    groups: list[tuple[ASGIApp, list[socket.socket]]] = [
        (app, [s for s in sockets if s.family != socket.AF_UNIX]),
        (UnixSocketOperator(app), [s for s in sockets if s.family == socket.AF_UNIX]),
    ]
    limits = limits or HttpLimits()
    servers = [
        (_Server(server_config(wrapped, limits, graceful_seconds=graceful_seconds)), group)
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
