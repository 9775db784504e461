"""Ports of an instance: which ones something listens on, and connections to them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from innkeeper.bus.contract import Call, Data, End, Message, Take
from innkeeper.control import lifecycle
from innkeeper.control.guest_calls import host_of
from innkeeper.control.live_table import Entry
from innkeeper.core.host_verbs import to_wire
from innkeeper.core.port_verbs import SEND_AHEAD_BYTES, DialPort, ListPorts
from innkeeper.core.token import Principal
from innkeeper.errors import (
    InstanceFailedError,
    InstanceNotFoundError,
    NoAnswerError,
    RateLimitedError,
    UnavailableError,
)

if TYPE_CHECKING:
    from innkeeper.control.context import Control

LIST_SECONDS = 15.0
# Thawing, and the agent's own five seconds. An agent that never says anything must not keep strangers' connections, which are counted.
CONNECT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class ListeningPort:
    """A TCP port that something in the guest listens on, as the guest tells it."""

    port: int
    address: str
    pid: int | None
    command: str | None


class PortConnections:
    """How many connections to guest ports are open, by instance: each may hold 1.6 MiB for as long as its client is slow."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: Counter[UUID] = Counter()

    def begin(self, instance_id: UUID) -> None:
        """Count one; `end` must follow. Raises RateLimitedError for one too many."""
        if self._open[instance_id] >= self._limit:
            raise RateLimitedError(f"The instance has {self._limit} connections to its ports open, which is its limit.")
        self._open[instance_id] += 1

    def __len__(self) -> int:
        return self._open.total()

    def end(self, instance_id: UUID) -> None:
        """It is closed."""
        self._open[instance_id] -= 1
        if not self._open[instance_id]:
            del self._open[instance_id]


class PortConnection:
    """A connection to a guest's port. One task may send while another receives."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._events = aiter(call.events())

    async def connected(self) -> None:
        """Wait until the guest's server has taken the connection. Raises PortUnreachableError when nothing listens."""
        if not isinstance(await anext(self._events, None), Message):
            raise UnavailableError("The host answered out of turn")
        self._call.allow(SEND_AHEAD_BYTES)

    async def send(self, data: bytes) -> None:
        """Send bytes; waits while the guest is slow."""
        await self._call.send_data(data)

    def send_now(self, data: memoryview) -> int:
        """Send as many of the bytes as nobody has to be waited for; returns how many. Not while `send` waits."""
        return self._call.send_now(data)

    def shortcut(self, take: Take) -> None:
        """Offer bytes that come while somebody waits in `receive` to `take` first, which returns how many it took."""
        self._call.shortcut(take)

    async def send_end(self) -> None:
        """Close this side; the guest may go on sending."""
        await self._call.send_end()

    async def receive(self) -> bytes:
        """The next bytes; none when the guest has closed its side. Raises GuestError for a reset."""
        async for event in self._events:
            if isinstance(event, Data):
                return event.data
            if isinstance(event, End):
                break
        return b""


@asynccontextmanager
async def connect(control: Control, principal: Principal, entry: Entry, port: int) -> AsyncIterator[PortConnection]:
    """A connection to a port of an instance, which is woken where it sleeps; leaving the context hangs up. It counts as use of the instance.

    Raises:
        PortUnreachableError: nothing listens there.
        RateLimitedError: the instance has as many connections as it may have.
        InstanceNotFoundError, InstanceFailedError, InstanceNotReadyError, NoAnswerError: the guest cannot be asked, or says nothing.

    """
    await lifecycle.usable(control, principal, entry)
    instance_id = entry.instance.id
    control.port_connections.begin(instance_id)
    control.metrics.port_connections += 1
    entry.open_streams += 1
    try:
        for attempt in range(2):
            request = DialPort(instance_id, port)
            async with control.bus.open(host_of(entry), request.verb, to_wire(request)) as call:
                connection = PortConnection(call)
                try:
                    async with asyncio.timeout(CONNECT_SECONDS):
                        await connection.connected()
                except TimeoutError:
                    raise NoAnswerError from None
                except InstanceNotFoundError:
                    if attempt:
                        raise InstanceFailedError("The guest is gone") from None
                else:
                    yield connection
                    return
            await lifecycle.revive(control, principal, entry)
    finally:
        entry.open_streams -= 1
        control.port_connections.end(instance_id)
        control.live.touch(entry)


async def list_listening(control: Control, principal: Principal, entry: Entry) -> list[ListeningPort]:
    """The ports that something in the guest listens on, which is woken where it sleeps."""
    await lifecycle.usable(control, principal, entry)
    request = ListPorts(entry.instance.id)
    answer = await control.bus.request(host_of(entry), request.verb, to_wire(request), timeout_seconds=LIST_SECONDS)
    return [ListeningPort(row["port"], row["address"], row["pid"], row["command"]) for row in answer["ports"]]
