"""One request to a room endpoint, as its handler sees it."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from starlette.types import Receive, Scope, Send

from innkeeper.api.query import Query
from innkeeper.control.context import Control
from innkeeper.core.token import Principal


@dataclass(frozen=True, slots=True)
class RoomCall:
    """Who asks, for which room; `rest` is the undecoded end of the path."""

    control: Control
    principal: Principal
    profile_id: UUID
    room_id: str
    rest: bytes
    scope: Scope
    receive: Receive
    send: Send

    @property
    def query(self) -> Query:
        """The query parameters."""
        return Query(self.scope)
