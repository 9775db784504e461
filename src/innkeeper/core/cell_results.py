"""What a cell displayed, as the interpreter in the guest packs it.

Not JSON: a guest could pack millions of empty lists into it, each of which costs memory here. A result is one byte for its kind, one for the number of
its forms, and for each form the sizes of its media type (2 bytes) and content (4 bytes), one byte that says whether the content follows, and both. The content
is UTF-8 text; of images base64, of JSON its text.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from innkeeper.errors import GuestError

RESULTS_BYTES_MAX = 5 * 1_048_576
RESULTS_MAX = 100
_KINDS = {1: "display", 2: "result"}
_RESULT = struct.Struct("!BB")
_FORM = struct.Struct("!HIB")
_MEDIA_TYPE = re.compile(
    r"[a-z0-9][a-z0-9!#$&^_.+-]{0,99}/[a-z0-9][a-z0-9!#$&^_.+-]{0,99}(;[ a-z0-9=._-]{1,100})?", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class CellResult:
    """One thing that a cell displayed: `kind` `result` (the value of its last expression) or `display`. `omitted` are sizes of forms that did not fit."""

    kind: str
    data: dict[str, str]
    omitted: dict[str, int]


def parse_results(packed: bytes) -> tuple[CellResult, ...]:
    """The results of a cell, in order. Raises GuestError for what is not packed as it should be."""
    if len(packed) > RESULTS_BYTES_MAX:
        raise GuestError("The guest sent more results than a cell may have")
    found: list[CellResult] = []
    at = 0
    try:
        while at < len(packed):
            result, at = _one(packed, at)
            found.append(result)
            if len(found) > RESULTS_MAX:
                raise GuestError("The guest sent more results than a cell may have")
    except (struct.error, KeyError, UnicodeDecodeError):
        raise GuestError("The guest sent results that make no sense") from None
    return tuple(found)


def _one(packed: bytes, at: int) -> tuple[CellResult, int]:
    kind, forms = _RESULT.unpack_from(packed, at)
    result = CellResult(_KINDS[kind], {}, {})
    at += _RESULT.size
    for _ in range(forms):
        name_size, size, follows = _FORM.unpack_from(packed, at)
        at += _FORM.size
        name = packed[at : at + name_size].decode("ascii")
        at += name_size
        if not _MEDIA_TYPE.fullmatch(name):
            raise GuestError("The guest sent a result of no media type")
        if not follows:
            result.omitted[name] = size
            continue
        if at + size > len(packed):
            raise GuestError("The guest sent results that are cut short")
        result.data[name] = packed[at : at + size].decode()
        at += size
    return result, at
