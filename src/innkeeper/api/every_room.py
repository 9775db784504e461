"""All rooms at once, for the endpoints that answer a bare array."""

from __future__ import annotations

from uuid import UUID

from innkeeper.control import rooms
from innkeeper.control.context import Control
from innkeeper.control.room_entry import RoomView
from innkeeper.core.token import Principal


async def every_room(control: Control, principal: Principal, profile_id: UUID | None = None) -> list[RoomView]:
    """The rooms of the organization, or of one of its profiles, oldest first. Raises ProfileNotFoundError."""
    found: list[RoomView] = []
    after: UUID | None = None
    while True:
        if profile_id is None:
            page = await rooms.list_all(control, principal, after=after)
        else:
            page = await rooms.list_of_profile(control, principal, profile_id, after=after)
        found += page
        # A page leaves out what is being destroyed, so only an empty one is surely the last.
        if not page:
            return found
        after = page[-1].instance.id
