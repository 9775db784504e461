"""The embedded bus: the API process and the host daemon joined by a socketpair that the launcher makes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from uuid import UUID

from innkeeper.bus.contract import Handler
from innkeeper.bus.link_bus import BUS_LIMITS, LinkBus, greet, host_link
from innkeeper.wire.link import Link

# Bulk data passes here; the kernel's default of about 200 kB costs a wake-up of both processes for every frame.
SOCKET_BUFFER_BYTES = 4_194_304


def make_socketpair() -> tuple[socket.socket, socket.socket]:
    """A connected pair of stream sockets with room for several frames."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in pair:
        end.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
    return pair


async def _connect(link: Link, end: socket.socket) -> None:
    end.setblocking(False)
    transport, _ = await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=end)
    transport.set_write_buffer_limits(high=2_097_152)


@asynccontextmanager
async def socketpair_bus(end: socket.socket) -> AsyncIterator[LinkBus]:
    """The control side's bus over its end of the pair; entered once the host has greeted."""
    bus, link = LinkBus(), Link(limits=BUS_LIMITS, opens_odd=True)
    await _connect(link, end)
    await bus.attach(link)
    try:
        yield bus
    finally:
        bus.close()


@asynccontextmanager
async def serve_socketpair(end: socket.socket, host_id: UUID, handlers: Mapping[str, Handler]) -> AsyncIterator[Link]:
    """The host daemon's end, serving `handlers` until the context ends or the other side goes away (`link.closed`)."""
    link = host_link(handlers)
    await _connect(link, end)
    greet(link, host_id)
    try:
        yield link
    finally:
        link.close()
        await link.wait_closed()
