"""Paths as they came over the wire: split before they are decoded, so that an encoded slash stays part of its segment.

Segments after the room id (`command`, `file`, ...) are compared undecoded: they are literals of the API.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from innkeeper.errors import InvalidRequestError

MAX_PATH_BYTES = 4_096
_ESCAPE = re.compile(rb"%(?:([0-9A-Fa-f]{2})|)")


def raw_path(scope: Mapping[str, Any]) -> bytes:
    """The path of a request as sent, without its query."""
    raw = scope.get("raw_path")
    if raw is None:
        return quote(scope["path"]).encode()
    path: bytes = raw
    return path.partition(b"?")[0]


def decode_bytes(encoded: bytes) -> bytes:
    """Percent-decoded bytes. Raises InvalidRequestError for a `%` that two hex digits do not follow."""

    def one(match: re.Match[bytes]) -> bytes:
        if match[1] is None:
            raise InvalidRequestError("The path is not valid percent-encoding.")
        return bytes.fromhex(match[1].decode())

    return _ESCAPE.sub(one, encoded) if b"%" in encoded else encoded


def decode_text(encoded: bytes, name: str) -> str:
    """Percent-decoded UTF-8 text. Raises InvalidRequestError, naming the part, when it is not."""
    try:
        return decode_bytes(encoded).decode()
    except UnicodeDecodeError:
        raise InvalidRequestError(f"{name}: not valid UTF-8 after percent-decoding") from None


def guest_path(encoded: bytes) -> bytes:
    """The absolute path inside a guest for what followed `/file/`: any bytes but NUL; `.`, `..` and double slashes resolved lexically, never above `/`.

    Raises:
        InvalidRequestError: a NUL, or too long.

    """
    decoded = decode_bytes(encoded)
    if b"\0" in decoded:
        raise InvalidRequestError("path: must not contain NUL")
    if len(decoded) > MAX_PATH_BYTES:
        raise InvalidRequestError(f"path: at most {MAX_PATH_BYTES} bytes")
    return posixpath.normpath(b"/" + decoded.lstrip(b"/"))


def show_path(path: bytes) -> str:
    """A path for people and JSON: bytes that are not UTF-8 become U+FFFD."""
    return path.decode("utf-8", "replace")


def encode_path(path: bytes) -> str:
    """A path percent-encoded per segment, byte by byte, so that any name survives; slashes stay."""
    return quote(path, safe="/")
