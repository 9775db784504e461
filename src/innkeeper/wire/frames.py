"""Frames as bytes: kinds, limits, encoding. Pure."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

HEADER = struct.Struct(">IIB")
CREDIT = struct.Struct(">I")
MAX_SEND_PAYLOAD = 262_144


class Kind(IntEnum):
    """What a frame is (docs/guest-protocol.md section 2)."""

    OPEN = 1
    DATA = 2
    DATA2 = 3
    MESSAGE = 4
    END = 5
    RESULT = 6
    ERROR = 7
    CREDIT = 8
    CANCEL = 9
    PING = 10
    PONG = 11
    HELLO = 12


@dataclass(frozen=True, slots=True)
class Limits:
    """What an end accepts from its peer. The defaults are the guest protocol's; a bus, whose ends trust each other more, has wider ones."""

    max_payload: int = 262_144
    window: int = 1_048_576
    grant_step: int = 262_144
    max_streams: int = 1_024
    # Those of one stream; together they hold at most `max_payload` bytes, since as objects they take many times their size.
    max_unread_messages: int = 64
    # What may wait in the socket's send buffer: a peer that never reads must not make this process grow.
    max_send_buffer: int = 8_388_608
    # What a peer may make this end's event loop do. Large frames of JSON count as many, by the time that they take. Beyond it the connection is
    # read no further until the allowance has grown again, which slows that peer and nobody else. None: no limit.
    frames_per_second: int | None = None
    frames_at_once: int = 1_000


class ProtocolError(Exception):
    """The peer broke the protocol; the link is closed."""


_OF_LINK = frozenset({Kind.PING, Kind.PONG, Kind.HELLO})
_EXACT = {Kind.END: 0, Kind.CANCEL: 0, Kind.CREDIT: 4, Kind.PING: 8, Kind.PONG: 8}
_KINDS = {int(kind): (kind, _EXACT.get(kind), kind in _OF_LINK) for kind in Kind}


def check_header(length: int, stream_id: int, kind_number: int, *, max_payload: int) -> Kind:
    """The kind of a frame, after everything that its header alone tells.

    Raises:
        ProtocolError: an unknown kind, a length or a stream that the kind does not allow.

    """
    kind, exact, of_link = _KINDS.get(kind_number, (None, None, False))
    if kind is None:
        raise ProtocolError("an unknown kind of frame")
    if length > max_payload:
        raise ProtocolError("a frame is too long")
    if exact is not None and length != exact:
        raise ProtocolError(f"a malformed {kind.name.lower()}")
    if of_link != (stream_id == 0):
        raise ProtocolError("a frame of the link on a stream" if of_link else "a frame of a stream on the link")
    return kind


def frame(kind: Kind, stream_id: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return HEADER.pack(len(payload), stream_id, kind) + payload


def json_frame(kind: Kind, stream_id: int, body: dict[str, Any]) -> bytes:
    """One frame with a JSON object."""
    return frame(kind, stream_id, _ENCODER.encode(body).encode("utf-8", "surrogatepass"))


def parse_object(payload: bytes | bytearray) -> dict[str, Any]:
    """The JSON object of a payload.

    Raises:
        ProtocolError: not UTF-8, not JSON, nested too deep, a number that is none or too large, or not an object.

    """
    try:
        body = _DECODER.decode(payload.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a payload is not JSON") from error
    if not isinstance(body, dict):
        raise ProtocolError("a payload is not a JSON object")
    return body


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number


_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)
# Python's own decoder takes NaN and Infinity, and makes infinity of 1e999: int() of those raises what nobody expects of a number.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
