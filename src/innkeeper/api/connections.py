"""The connections that a listener has: how many it may have, and which one goes for a new one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from innkeeper.settings import Settings


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What a client may make the server hold for it, and for how long; see the settings of these names."""

    max_connections: int = 4_096
    head_seconds: float = 20.0
    client_seconds: float = 60.0
    keep_alive_seconds: float = 75.0

    @classmethod
    def of(cls, settings: Settings) -> HttpLimits:
        """The limits that an operator set."""
        return cls(
            settings.max_connections,
            settings.head_timeout_seconds,
            settings.client_timeout_seconds,
            settings.keep_alive_seconds,
        )


class Connection(Protocol):
    """What can be dropped."""

    def drop(self) -> None:
        """End the connection at once; `Connections.closed` follows."""
        ...


class Connections:
    """The open connections of one listener, at most `limit`.

    Where there are as many, a new one replaces the one that has had no request for the longest time: whoever opens thousands and leaves them idle, or
    begins requests and does not go on, crowds out nobody but itself. Behind a front all clients have one address, so a limit by address would be none.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: set[Connection] = set()
        # In the order in which they became idle.
        self._idle: dict[Connection, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def opened(self, connection: Connection) -> bool:
        """Take a connection in; False where every one that is open is being served."""
        if len(self._open) >= self._limit:
            oldest = next(iter(self._idle), None)
            if oldest is None:
                return False
            self.closed(oldest)
            oldest.drop()
        self._open.add(connection)
        self._idle[connection] = None
        return True

    def busy(self, connection: Connection) -> None:
        """It has a request: it stays until that is answered."""
        self._idle.pop(connection, None)

    def idle(self, connection: Connection) -> None:
        """Its request was answered."""
        if connection in self._open:
            self._idle[connection] = None

    def closed(self, connection: Connection) -> None:
        """It is gone. Safe to repeat."""
        self._open.discard(connection)
        self._idle.pop(connection, None)
