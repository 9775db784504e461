"""The bus: how the control side reaches hosts. Everything that touches a host goes through here.

A *call* is one verb with JSON parameters. It may stream in both directions (bytes with back-pressure, and JSON messages)
and ends with one JSON result or a typed error. Implementations: `in_process`, `socketpair`; the contract suite runs on each.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol
from uuid import UUID

from innkeeper.wire.stream import Data, End, Message, Take

__all__ = ["Bus", "Call", "Data", "End", "Handler", "Message", "ServerCall", "Take"]


class Call(Protocol):
    """The opener's end of a call."""

    async def send_data(self, data: bytes) -> None:
        """Send bytes; waits while the receiver is slow."""
        ...

    def send_now(self, data: memoryview) -> int:
        """Send as many of the bytes as can be sent without waiting; returns how many. Not while `send_data` waits."""
        ...

    async def send_message(self, body: dict[str, Any]) -> None:
        """Send a JSON message."""
        ...

    async def send_end(self) -> None:
        """Say that no more data comes."""
        ...

    def allow(self, size: int) -> None:
        """Let the host send that many more bytes before they are read."""
        ...

    def shortcut(self, take: Take | None) -> None:
        """Offer data that comes while the reader of `events` waits to `take` first."""
        ...

    def events(self) -> AsyncIterator[Data | Message | End]:
        """What the host sends, in order, until its result. Raises the typed error when the call failed."""
        ...

    def cancel(self) -> None:
        """Give the call up."""
        ...

    async def result(self) -> dict[str, Any]:
        """The result; drops events that were not read. Raises the typed error when the call failed."""
        ...


class ServerCall(Protocol):
    """The host's end of a call, given to its handler. The handler returns the result or raises an InnkeeperError."""

    @property
    def params(self) -> dict[str, Any]:
        """The parameters as they came: not validated yet."""
        ...

    async def send_data(self, data: bytes, *, channel: int = 1) -> None:
        """Send bytes of a channel (2 is stderr); waits while the opener is slow. Raises asyncio.CancelledError in the handler when the opener gave up."""
        ...

    def send_now(self, data: memoryview) -> int:
        """Send as many of the bytes as can be sent without waiting; returns how many. Not while `send_data` waits."""
        ...

    async def send_message(self, body: dict[str, Any]) -> None:
        """Send a JSON message."""
        ...

    def allow(self, size: int) -> None:
        """Let the opener send that many more bytes before they are read."""
        ...

    def shortcut(self, take: Take | None) -> None:
        """Offer data that comes while the reader of `events` waits to `take` first."""
        ...

    async def send_end(self) -> None:
        """Say that no more data comes, although the result is still to come."""
        ...

    def events(self) -> AsyncIterator[Data | Message | End]:
        """What the opener sends, in order; ends after END or when the opener is gone."""
        ...


Handler = Callable[[ServerCall], Awaitable[dict[str, Any]]]


class Bus(Protocol):
    """The control side's end."""

    def hosts(self) -> list[UUID]:
        """Ids of the hosts that can be reached now."""
        ...

    def in_flight(self) -> int:
        """Calls that have not ended, those that stream for as long as a host is there included."""
        ...

    def open(self, host_id: UUID, verb: str, params: dict[str, Any]) -> AbstractAsyncContextManager[Call]:
        """Open a call; leaving the context before the result cancels it. Raises UnavailableError when the host is not reachable."""
        ...

    async def request(
        self, host_id: UUID, verb: str, params: dict[str, Any], *, timeout_seconds: float
    ) -> dict[str, Any]:
        """A call without streams. Raises UnavailableError on a lost host or a timeout, else the host's typed error."""
        ...
