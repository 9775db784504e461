"""A bus within one event loop: both ends are real links, joined by memory instead of a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from uuid import UUID

from innkeeper.bus.contract import Handler
from innkeeper.bus.link_bus import BUS_LIMITS, LinkBus, greet, host_link
from innkeeper.wire.link import Link


class _MemoryTransport(asyncio.WriteTransport):
    """Hands what one end writes to the other end on the next turn of the loop."""

    def __init__(self, peer: Link) -> None:
        super().__init__()
        self._peer = peer
        self._loop = asyncio.get_running_loop()
        self._open = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._open:
            self._loop.call_soon(self._peer.data_received, bytes(data))

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        if self._open:
            self._open = False
            self._loop.call_soon(self._peer.connection_lost, None)


@asynccontextmanager
async def in_process_bus(host_id: UUID, handlers: Mapping[str, Handler]) -> AsyncIterator[LinkBus]:
    """A bus with one host whose verbs are `handlers`."""
    host, control = host_link(handlers), Link(limits=BUS_LIMITS, opens_odd=True)
    host.connection_made(_MemoryTransport(control))
    control.connection_made(_MemoryTransport(host))
    greet(host, host_id)
    bus = LinkBus()
    await bus.attach(control)
    try:
        yield bus
    finally:
        bus.close()
        host.close()
        await host.wait_closed()
