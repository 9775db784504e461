"""The API process: started by `launch` as an unprivileged user, with its end of the bus and a pipe to say that it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
from contextlib import AbstractAsyncContextManager

import structlog

from innkeeper.api.app import build_app
from innkeeper.api.connections import HttpLimits
from innkeeper.api.server import open_sockets
from innkeeper.api.server import serve as serve_http
from innkeeper.bus.socketpair import socketpair_bus
from innkeeper.control import organizations
from innkeeper.control.context import Control, build_control
from innkeeper.errors import InnkeeperError
from innkeeper.log_setup import LogLevel, configure_logging, log_file
from innkeeper.settings import Settings
from innkeeper.settings_sources import load_settings
from innkeeper.store import server
from innkeeper.store.database import open_database

log = structlog.stdlib.get_logger(__name__)

# After its requests: what is written behind, and the database.
CLOSE_SECONDS = 2.0
LAST_RESORT_SECONDS = 3.0


def main() -> None:
    """Run until SIGTERM or until the daemon goes away.

    Arguments: the bus's descriptor, the ready pipe's, the UUID of the database that the host's guests belong to (empty: any), and the descriptor of the
    SSH gateway's listening socket where there is one.
    """
    bus_fd, ready_fd, known_database = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    ssh = socket.socket(fileno=int(sys.argv[4])) if len(sys.argv) > 4 else None
    settings = load_settings()
    level = configure_logging(
        form=settings.log_format,
        level=settings.log_level,
        process="api",
        file=log_file(settings, settings.api_dir / "log" / "api.log"),
    )
    import uvloop

    uvloop.run(_run(settings, socket.socket(fileno=bus_fd), ready_fd, known_database, level, ssh))


async def _run(
    settings: Settings,
    bus_end: socket.socket,
    ready_fd: int,
    known_database: str,
    level: LogLevel,
    ssh: socket.socket | None,
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    for number, name in ((signal.SIGUSR1, "debug"), (signal.SIGUSR2, settings.log_level)):
        loop.add_signal_handler(number, level.set, name)
    work = loop.create_task(_serve(settings, bus_end, ready_fd, known_database, level, stop, ssh))
    stopped = loop.create_task(stop.wait())
    await asyncio.wait([work, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    stop_seconds = settings.stop_seconds + CLOSE_SECONDS
    # Whatever holds us up, a thread included, the next server needs the port and the database: everything acknowledged is committed by now.
    last_resort = threading.Timer(stop_seconds + LAST_RESORT_SECONDS, os._exit, (1,))
    last_resort.daemon = True
    last_resort.start()
    # The server finishes its requests; whatever else is under way when the time is over, a start that hangs included, is cancelled.
    await asyncio.wait([work], timeout=stop_seconds)
    work.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await work


async def _serve(
    settings: Settings,
    bus_end: socket.socket,
    ready_fd: int,
    known_database: str,
    level: LogLevel,
    stop: asyncio.Event,
    ssh: socket.socket | None,
) -> None:
    try:
        database = await open_database(
            settings.database_url or f"sqlite:///{settings.api_dir / 'innkeeper.db'}",
            on_migration=lambda revision: _tell(ready_fd, {"migrating": revision}),
        )
    except (InnkeeperError, ValueError) as error:
        _tell(ready_fd, {"refused": str(error)})
        return
    try:
        if known_database not in ("", await database.read(server.get, organizations.SERVER_UUID)):
            # To adopt would be to destroy every guest and disk that this other database knows nothing of.
            refusal = f"the guests and disks in this state directory belong to another database ({known_database}); give that one back"
            _tell(ready_fd, {"refused": refusal})
            return
        # The daemon waits for this: what refuses a start leaves guests and disks as they are.
        _tell(ready_fd, {"opened": True})
        async with socketpair_bus(bus_end) as bus:
            control = build_control(settings, database, bus, level=level)
            first_token = await organizations.bootstrap(control)
            server_uuid = await database.read(server.get, organizations.SERVER_UUID)
            await control.start()
            try:
                sockets = open_sockets(settings)
                async with _gateway(control, ssh):
                    _tell(ready_fd, {"first_token": first_token, "server_uuid": server_uuid})
                    os.close(ready_fd)
                    del first_token
                    await serve_http(
                        build_app(control),
                        sockets,
                        stop=stop,
                        graceful_seconds=settings.stop_seconds,
                        limits=HttpLimits.of(settings),
                    )
            finally:
                await control.close()
    finally:
        await database.close()


def _gateway(control: Control, ssh: socket.socket | None) -> AbstractAsyncContextManager[None]:
    if ssh is None:
        return contextlib.nullcontext()
    # A third of a second, and 15 MiB: for those who have it.
    from innkeeper.api.ssh.gateway import ssh_gateway

    return ssh_gateway(control, ssh)


def _tell(ready_fd: int, what: dict[str, str | bool | None]) -> None:
    os.write(ready_fd, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    main()
