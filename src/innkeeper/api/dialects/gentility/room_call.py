"""One request to a room endpoint, as its handler sees it."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from starlette.types import Receive, Scope, Send

from innkeeper.api.query import Query
from innkeeper.control import rooms
from innkeeper.control.context import Control
from innkeeper.control.room_entry import RoomEntry
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

    async def ready(self) -> RoomEntry:
        """The room, made where it is missing, and brought up. Raises as `rooms.get_or_create`."""
        return await rooms.ready_entry(self.control, self.principal, self.profile_id, self.room_id)

    async def existing(self) -> RoomEntry:
        """The room in whatever state. Raises InstanceNotFoundError."""
        return await rooms.existing_entry(self.control, self.principal, self.profile_id, self.room_id)

    @property
    def query(self) -> Query:
        """The query parameters."""
        return Query(self.scope)
