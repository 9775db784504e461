"""Frames as bytes: kinds, limits, encoding. Pure."""

from __future__ import annotations

import json
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
    max_unread_messages: int = 64
    # What may wait in the socket's send buffer: a peer that never reads must not make this process grow.
    max_send_buffer: int = 8_388_608


class ProtocolError(Exception):
    """The peer broke the protocol; the link is closed."""


def frame(kind: Kind, stream_id: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return HEADER.pack(len(payload), stream_id, kind) + payload


def json_frame(kind: Kind, stream_id: int, body: dict[str, Any]) -> bytes:
    """One frame with a JSON object."""
    return frame(
        kind, stream_id, json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
    )


def parse_object(payload: bytes | bytearray) -> dict[str, Any]:
    """The JSON object of a payload.

    Raises:
        ProtocolError: not UTF-8, not JSON, nested too deep, or not an object.

    """
    try:
        body = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a payload is not JSON") from error
    if not isinstance(body, dict):
        raise ProtocolError("a payload is not a JSON object")
    return body
