import pytest
from hypothesis import given
from hypothesis import strategies as st

from innkeeper.api.raw_path import decode_text, encode_path, guest_path, raw_path, show_path
from innkeeper.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("encoded", "path"),
    [
        (b"tmp/chart.png", b"/tmp/chart.png"),
        (b"", b"/"),
        (b"/tmp//x/", b"/tmp/x"),
        (b"a/../../../etc/passwd", b"/etc/passwd"),
        (b"%2e%2e/%2E%2E/etc", b"/etc"),
        (b"a%2Fb", b"/a/b"),
        (b"caf%C3%A9", "/café".encode()),
        (b"bad%FFname", b"/bad\xffname"),
        (b"%2F%2Fserver%2Fshare", b"/server/share"),
        (b"a%25b", b"/a%b"),
    ],
)
def test_guest_paths_are_absolute_and_stay_below_the_root(encoded: bytes, path: bytes) -> None:
    assert guest_path(encoded) == path


@pytest.mark.parametrize("encoded", [b"%00", b"a%", b"a%4", b"a%zz", b"x" * 4097])
def test_what_is_no_path_is_refused(encoded: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        guest_path(encoded)


def test_text_must_be_utf8() -> None:
    assert decode_text(b"a%2Fb%20%E2%98%83", "room_id") == "a/b ☃"
    with pytest.raises(InvalidRequestError, match="room_id"):
        decode_text(b"%FF", "room_id")


@given(st.binary(min_size=1, max_size=200).filter(lambda b: b"\0" not in b))
def test_any_name_survives_its_public_address(name: bytes) -> None:
    path = guest_path(name.replace(b"%", b"%25"))
    encoded = encode_path(path)
    assert encoded.isascii()
    assert guest_path(encoded.encode()) == path
    show_path(path).encode()


def test_the_query_is_no_part_of_the_path() -> None:
    assert raw_path({"raw_path": b"/a%2Fb?x=1"}) == b"/a%2Fb"
    assert raw_path({"raw_path": None, "path": "/a b"}) == b"/a%20b"
