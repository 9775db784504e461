"""The API process: started by `launch` as an unprivileged user, with its end of the bus and a pipe to say that it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys

import structlog

from innkeeper.api.app import build_app
from innkeeper.api.server import open_sockets, serve
from innkeeper.bus.socketpair import socketpair_bus
from innkeeper.control import organizations
from innkeeper.control.context import build_control
from innkeeper.log_setup import configure_logging
from innkeeper.settings import Settings, load_settings
from innkeeper.store.database import open_database

log = structlog.stdlib.get_logger(__name__)

STOP_SECONDS = 12.0


def main() -> None:
    """Run until SIGTERM or until the daemon goes away. Arguments: the bus's descriptor and the ready pipe's."""
    bus_fd, ready_fd = int(sys.argv[1]), int(sys.argv[2])
    settings = load_settings()
    configure_logging(form=settings.log_format, level=settings.log_level, process="api")
    import uvloop

    uvloop.run(_run(settings, socket.socket(fileno=bus_fd), ready_fd))


async def _run(settings: Settings, bus_end: socket.socket, ready_fd: int) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    work = loop.create_task(_serve(settings, bus_end, ready_fd, stop))
    stopped = loop.create_task(stop.wait())
    await asyncio.wait([work, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    # The server finishes its requests; whatever else is under way when the time is over, a start that hangs included, is cancelled.
    await asyncio.wait([work], timeout=STOP_SECONDS)
    work.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await work


async def _serve(settings: Settings, bus_end: socket.socket, ready_fd: int, stop: asyncio.Event) -> None:
    database = await open_database(settings.database_url or f"sqlite:///{settings.api_dir / 'innkeeper.db'}")
    try:
        async with socketpair_bus(bus_end) as bus:
            control = build_control(settings, database, bus)
            first_token = await organizations.bootstrap(control)
            await control.start()
            try:
                sockets = open_sockets(settings)
                with os.fdopen(ready_fd, "w") as ready:
                    json.dump({"first_token": first_token}, ready)
                del first_token
                await serve(build_app(control), sockets, stop=stop)
            finally:
                await control.close()
    finally:
        await database.close()


if __name__ == "__main__":
    main()
