"""Header fields: which ones belong to one connection only, and what may be written at all."""

from __future__ import annotations

import re
from collections.abc import Iterable

from innkeeper.api.body import header_values

Field = tuple[bytes, bytes]
Fields = list[Field]

_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
# RFC 9110 7.6.1, and what clients and servers use in their place. `upgrade` is written anew where an upgrade is passed on.
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authentication-info",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    }
)


def is_field(name: bytes, value: bytes) -> bool:
    """Whether a field can be written without becoming something else."""
    return _NAME.fullmatch(name) is not None and _VALUE.fullmatch(value) is not None


def connection_options(fields: Iterable[Field]) -> frozenset[bytes]:
    """The lower-case words of the Connection fields: names of further fields that belong to one connection only, `close`, `upgrade`."""
    words = (word.strip().lower() for value in header_values(fields, b"connection") for word in value.split(b","))
    return frozenset(word for word in words if word)


def render(first_line: bytes, fields: Iterable[Field]) -> bytes:
    """A head as bytes. Every field must have passed `is_field`."""
    return b"".join((first_line, b"\r\n", *(b"%b: %b\r\n" % field for field in fields), b"\r\n"))
