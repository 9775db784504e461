"""The bus over links: what `in_process` and `socketpair` share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import structlog

from innkeeper.bus.contract import Call, Handler
from innkeeper.errors import LinkLostError, UnavailableError
from innkeeper.ids import parse_uuid
from innkeeper.wire.frames import Limits, ProtocolError
from innkeeper.wire.link import Link

# Beside a verb's own parameters; the daemon takes it out before it validates them.
REQUEST_ID = "request_id"
# Both ends are ours: pages of file changes and batches of settings travel as one object, and a watcher may lag by thousands of events.
# The window is what a client that reads slowly, or not at all, keeps here for as long as it may: there can be thousands.
BUS_LIMITS = Limits(
    window=262_144,
    grant_step=65_536,
    max_payload=16_777_216,
    max_streams=16_384,
    max_unread_messages=100_000,
    max_send_buffer=268_435_456,
)


def host_link(handlers: Mapping[str, Handler]) -> Link:
    """The host daemon's end; call `greet` once it is connected."""
    return Link(limits=BUS_LIMITS, handlers=dict(handlers), opens_odd=False)


def greet(link: Link, host_id: UUID) -> None:
    """Tell the control side which host this is."""
    link.send_hello({"host_id": str(host_id)})


def _marked(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters with the id of the request that they are for, so that both processes' log lines can be laid side by side."""
    request_id = structlog.contextvars.get_contextvars().get(REQUEST_ID)
    return params if request_id is None else {**params, REQUEST_ID: request_id}


class LinkBus:
    """The control side's end: one link per host."""

    def __init__(self) -> None:
        self._links: dict[UUID, Link] = {}

    async def attach(self, link: Link) -> UUID:
        """Wait for the host's greeting and make it reachable.

        Raises:
            ProtocolError: the greeting names no host.

        """
        host_id = parse_uuid(str((await link.hello).get("host_id")))
        if host_id is None:
            raise ProtocolError("the greeting names no host")
        self._links[host_id] = link
        link.closed.add_done_callback(lambda _: self._detach(host_id, link))
        return host_id

    def _detach(self, host_id: UUID, link: Link) -> None:
        if self._links.get(host_id) is link:
            del self._links[host_id]

    def hosts(self) -> list[UUID]:
        """Ids of the hosts that can be reached now."""
        return list(self._links)

    def in_flight(self) -> int:
        """See `Bus.in_flight`."""
        return sum(link.open_streams for link in self._links.values())

    def _link(self, host_id: UUID) -> Link:
        try:
            return self._links[host_id]
        except KeyError:
            raise UnavailableError("The host is not reachable") from None

    @asynccontextmanager
    async def open(self, host_id: UUID, verb: str, params: dict[str, Any]) -> AsyncIterator[Call]:
        """Open a call; leaving the context before the result cancels it."""
        try:
            stream = self._link(host_id).open(verb, _marked(params))
        except LinkLostError as error:
            raise UnavailableError("The host is not reachable") from error
        try:
            yield stream
        except LinkLostError as error:
            if self._links.get(host_id) is not stream.link:
                raise UnavailableError("The connection to the host was lost") from error
            raise
        finally:
            stream.cancel()

    async def request(
        self, host_id: UUID, verb: str, params: dict[str, Any], *, timeout_seconds: float
    ) -> dict[str, Any]:
        """A call without streams."""
        link = self._link(host_id)
        try:
            return await link.request(verb, _marked(params), timeout_seconds=timeout_seconds)
        except TimeoutError as error:
            raise UnavailableError("The host did not answer in time") from error
        except LinkLostError as error:
            if link.closed.done():
                raise UnavailableError("The connection to the host was lost") from error
            raise

    def close(self) -> None:
        """Close every link."""
        for link in list(self._links.values()):
            link.close()
