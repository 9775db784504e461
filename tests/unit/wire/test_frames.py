import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from innkeeper.wire.frames import HEADER, Kind, ProtocolError, check_header, frame, json_frame, parse_object

LINK = {Kind.PING, Kind.PONG, Kind.HELLO}
EXACT = {Kind.END: 0, Kind.CANCEL: 0, Kind.CREDIT: 4, Kind.PING: 8, Kind.PONG: 8}


def test_a_frame_is_length_stream_kind_payload():
    assert frame(Kind.DATA, 258, b"abc") == b"\0\0\0\3\0\0\1\2\2abc"
    assert json_frame(Kind.OPEN, 1, {"a": "é"}) == b"\0\0\0\x0a\0\0\0\1\1" + '{"a":"é"}'.encode()
    assert [kind.value for kind in Kind] == list(range(1, 13))


@given(st.integers(0, 255), st.integers(0, 600), st.integers(0, 2**32 - 1) | st.just(0))
def test_a_header_is_right_or_a_protocol_error(kind, length, stream_id):
    right = (
        1 <= kind <= 12 and length <= 512 and EXACT.get(kind, length) == length and (kind in LINK) == (stream_id == 0)
    )
    if right:
        assert check_header(length, stream_id, kind, max_payload=512) == kind
    else:
        with pytest.raises(ProtocolError):
            check_header(length, stream_id, kind, max_payload=512)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_an_object_survives(body):
    assert parse_object(json_frame(Kind.MESSAGE, 1, body)[HEADER.size :]) == body


def test_a_lone_surrogate_survives():
    body = {"path": "a\udcffb"}
    assert parse_object(json_frame(Kind.MESSAGE, 1, body)[HEADER.size :]) == body


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"{}{}",
        b'{"a":\xff}',
        b'{"a":"\xff"}',
        b"\xef\xbb\xbf{}",
        '{"a":1}'.encode("utf-16"),
        '{"a":1}'.encode("utf-32-le"),
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":1e999}',
        b'{"a":' + b"9" * 5_000 + b"}",
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 50_000,
    ],
    ids=lambda payload: f"{payload[:12]!r}{len(payload)}",
)
def test_what_is_no_object_is_refused(payload):
    with pytest.raises(ProtocolError):
        parse_object(payload)


def _refuse(name):
    raise ValueError(name)


@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:0123456789eE.-+ntrufalsNI\\', max_size=60).map(str.encode))
def test_no_payload_raises_anything_else(payload):
    try:
        assert isinstance(parse_object(payload), dict)
    except ProtocolError:
        with pytest.raises((ValueError, AssertionError)):
            # The reason was a good one: nobody else takes it for an object of finite numbers either.
            found = json.loads(payload.decode(), parse_constant=_refuse)
            assert isinstance(found, dict)
            json.dumps(found, allow_nan=False)


def test_the_header_is_nine_bytes():
    assert HEADER.size == 9 == struct.calcsize(">IIB")
