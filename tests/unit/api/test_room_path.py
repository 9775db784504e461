import pytest

from innkeeper.api.dialects.gentility.room_path import ROOM, parse_room_path
from innkeeper.errors import InvalidRequestError

P = b"/api/profile/6ba7b810-9dad-11d1-80b4-00c04fd430c8/room/"


@pytest.mark.parametrize(
    ("path", "route", "rest"),
    [
        (b"r", ROOM, b""),
        (b"r/command", f"{ROOM}/command", b""),
        (b"r/command/abc/output", f"{ROOM}/command/{{execution_id}}/output", b"abc"),
        (b"r/command/abc/files_changed", f"{ROOM}/command/{{execution_id}}/files_changed", b"abc"),
        (b"r/file/tmp/a%20b", f"{ROOM}/file/{{path}}", b"tmp/a%20b"),
        (b"r/file//tmp/x", f"{ROOM}/file/{{path}}", b"/tmp/x"),
        (b"r/file/", f"{ROOM}/file/{{path}}", b""),
        (b"r/files", f"{ROOM}/files/{{path}}", b""),
        (b"r/files/tmp", f"{ROOM}/files/{{path}}", b"tmp"),
        (b"r/tools", f"{ROOM}/tools", b""),
    ],
)
def test_routes(path: bytes, route: str, rest: bytes) -> None:
    found = parse_room_path(P + path)
    assert found is not None
    assert (found.route, found.rest, found.room) == (route, rest, b"r")


@pytest.mark.parametrize(
    "path",
    [
        b"r/",
        b"r/Command",
        b"r/%63ommand",
        b"r/command/",
        b"r/command/x",
        b"r/command//output",
        b"r/file",
        b"r/tools/",
        b"r/x",
    ],
)
def test_everything_else_is_no_endpoint(path: bytes) -> None:
    assert parse_room_path(P + path) is None


def test_an_encoded_slash_belongs_to_the_room_id() -> None:
    found = parse_room_path(P + b"a%2Fcommand")
    assert found is not None
    assert found.route == ROOM
    assert found.room_id() == "a/command"


@pytest.mark.parametrize("room", [b"", b"%FF", b"%ED%A0%80", b"%00", b"x" * 256, b"%E2%98%83" * 256])
def test_what_is_no_room_id_is_refused(room: bytes) -> None:
    found = parse_room_path(P + room)
    assert found is not None
    with pytest.raises(InvalidRequestError, match="room_id"):
        found.room_id()


def test_255_characters_of_several_bytes_are_a_room_id() -> None:
    found = parse_room_path(P + b"%F0%9F%92%A9" * 255)
    assert found is not None
    assert len(found.room_id()) == 255


def test_a_profile_id_is_a_uuid() -> None:
    found = parse_room_path(b"/api/profile/base/room/r")
    assert found is not None
    with pytest.raises(InvalidRequestError, match="profile_id"):
        found.profile_id()
