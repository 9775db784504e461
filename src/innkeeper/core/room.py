"""The room: (profile, room id) names one instance; asking again gives the same one."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from innkeeper.errors import InvalidRequestError

ROOM_ID_MAX_CHARACTERS = 255


@dataclass(frozen=True, slots=True)
class Room:
    """The durable mapping from a profile and a room id to an instance."""

    profile_id: UUID
    room_id: str
    instance_id: UUID
    created_at: datetime


def validate_room_id(room_id: str) -> None:
    """Check a decoded room id: any Unicode, 1-255 characters.

    Raises:
        InvalidRequestError: too short, too long, or not encodable as UTF-8 (lone surrogates), or a NUL (PostgreSQL text has none).

    """
    if not 1 <= len(room_id) <= ROOM_ID_MAX_CHARACTERS:
        raise InvalidRequestError(f"room_id: must be 1 to {ROOM_ID_MAX_CHARACTERS} characters")
    try:
        room_id.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError("room_id: must be valid Unicode") from error
    if "\0" in room_id:
        raise InvalidRequestError("room_id: must not contain NUL")
