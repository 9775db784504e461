"""What a path under `/api/profile/{profile_id}/room/{room_id}` means. Only the room id may hold encoded slashes, so the path is split undecoded."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from innkeeper.api.raw_path import decode_text
from innkeeper.core.room import validate_room_id
from innkeeper.errors import InvalidRequestError
from innkeeper.ids import parse_uuid

PREFIX = b"/api/profile/"
ROOM = "/api/profile/{profile_id}/room/{room_id}"


@dataclass(frozen=True, slots=True)
class RoomPath:
    """A path split but not decoded: `rest` is what followed a route's last literal (a file's path, an execution's id)."""

    route: str
    profile: bytes
    room: bytes
    rest: bytes = b""

    def profile_id(self) -> UUID:
        """The profile's id. Raises InvalidRequestError when it is not a UUID."""
        value = parse_uuid(decode_text(self.profile, "profile_id"))
        if value is None:
            raise InvalidRequestError("profile_id: must be a UUID")
        return value

    def room_id(self) -> str:
        """The room id. Raises InvalidRequestError: not UTF-8, empty, or too long."""
        room_id = decode_text(self.room, "room_id")
        validate_room_id(room_id)
        return room_id


def parse_room_path(raw: bytes) -> RoomPath | None:
    """The route of a raw path, or None when it is no room endpoint."""
    parts = raw.split(b"/", 6)
    if len(parts) < 6 or parts[1] != b"api" or parts[2] != b"profile" or parts[4] != b"room":
        return None
    profile, room = parts[3], parts[5]
    if len(parts) == 6:
        return RoomPath(ROOM, profile, room)
    verb, slash, rest = parts[6].partition(b"/")
    if verb == b"command":
        if not slash:
            return RoomPath(f"{ROOM}/command", profile, room)
        execution_id, _, leaf = rest.partition(b"/")
        if execution_id and leaf in (b"output", b"files_changed"):
            return RoomPath(f"{ROOM}/command/{{execution_id}}/{leaf.decode()}", profile, room, execution_id)
    elif verb == b"file" and slash:
        return RoomPath(f"{ROOM}/file/{{path}}", profile, room, rest)
    elif verb == b"files":
        return RoomPath(f"{ROOM}/files/{{path}}", profile, room, rest)
    elif verb == b"tools" and not slash:
        return RoomPath(f"{ROOM}/tools", profile, room)
    return None
