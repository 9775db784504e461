"""multipart/form-data as it streams in: one part after another, nothing of a file kept, every number bounded.

Starlette's own form reader puts files into temporary ones on this machine; here they go straight on to the guest.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.types import Scope

from innkeeper.api.body import header_values
from innkeeper.errors import InvalidRequestError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

PARTS_MAX = 32
HEADERS_MAX = 8
HEADER_BYTES_MAX = 4_096
# What may come before the first boundary, and after the last.
AROUND_BYTES_MAX = 65_536
_PLAIN_ENCODINGS = (b"7bit", b"8bit", b"binary")

# It logs what it refuses, which is the client's own text; the client is told.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class PartBegin:
    """A part begins: the field's name, and a file's name as the client gave it."""

    name: str
    filename: str | None


@dataclass(frozen=True, slots=True)
class PartData:
    """Bytes of the part that is being read."""

    data: bytes


@dataclass(frozen=True, slots=True)
class PartEnd:
    """The part is whole."""


PartEvent = PartBegin | PartData | PartEnd


def boundary_of(scope: Scope) -> bytes:
    """The boundary of a request's body. Raises InvalidRequestError where it is no multipart/form-data, or names none."""
    values = header_values(scope["headers"], b"content-type")
    kind, options = parse_options_header(values[0]) if len(values) == 1 else (b"", {})
    if kind != b"multipart/form-data":
        raise InvalidRequestError("Content-Type: must be multipart/form-data")
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:
        raise InvalidRequestError("Content-Type: needs a boundary of 1 to 70 characters")
    return boundary


async def part_events(boundary: bytes, body: AsyncIterator[bytes]) -> AsyncIterator[PartEvent]:
    """The parts of a body, in order; it ends after the last boundary and whatever follows it.

    Raises:
        InvalidRequestError: not well formed, too many parts, too large headers, or an end before the last boundary.
        And what `body` raises.

    """
    reader = _Reader()
    parser = MultipartParser(
        boundary, reader.callbacks(), max_header_count=HEADERS_MAX, max_header_size=HEADER_BYTES_MAX
    )
    around = 0
    async for chunk in body:
        over = reader.ended
        try:
            parser.write(chunk)
        except FormParserError:
            raise InvalidRequestError("The body is not well-formed multipart/form-data.") from None
        if over or reader.parts == 0:
            around += len(chunk)
            if around > AROUND_BYTES_MAX:
                raise InvalidRequestError("The body has too much before its first or after its last boundary.")
        while reader.events:
            yield reader.events.popleft()
    if not reader.ended:
        raise InvalidRequestError("The body ended before its last boundary.")


class _Reader:
    """What the parser calls back: makes events of it."""

    def __init__(self) -> None:
        self.events: deque[PartEvent] = deque()
        self.parts = 0
        self.ended = False
        self._field = b""
        self._value = b""
        self._disposition: bytes | None = None

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._part_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _part_begin(self) -> None:
        self.parts += 1
        if self.parts > PARTS_MAX:
            raise InvalidRequestError(f"The body has more than {PARTS_MAX} parts.")
        self._disposition = None
        self._field = self._value = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        field, value = self._field.lower(), self._value
        self._field = self._value = b""
        if field == b"content-disposition":
            if self._disposition is not None:
                raise InvalidRequestError("A part has two Content-Dispositions.")
            self._disposition = value
        elif field == b"content-transfer-encoding" and value.strip().lower() not in _PLAIN_ENCODINGS:
            raise InvalidRequestError("A part has a Content-Transfer-Encoding, which form data must not have.")

    def _headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition or b"")
        if kind != b"form-data" or b"name" not in options:
            raise InvalidRequestError("A part has no Content-Disposition with a name.")
        filename = options.get(b"filename")
        self.events.append(
            PartBegin(
                options[b"name"].decode("utf-8", "replace"),
                None if filename is None else filename.decode("utf-8", "surrogateescape"),
            )
        )

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if end > start:
            self.events.append(PartData(data[start:end]))

    def _part_end(self) -> None:
        self.events.append(PartEnd())

    def _end(self) -> None:
        self.ended = True
