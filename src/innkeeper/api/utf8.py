"""Output of commands as text: bounded, decoded piece by piece, never cut within a character."""

from __future__ import annotations

import codecs

OUTPUT_MAX_BYTES = 1 << 20


def whole_characters(data: bytes) -> bytes:
    """The data without a UTF-8 character that its end cuts in two; bytes that are not UTF-8 at all stay."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte < 0x80:
            return data
        if byte >= 0xC0:
            need = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return data[:-back] if back < need else data
    return data


def output_text(data: bytes, *, truncated: bool) -> str:
    """The `output` of an answer: invalid UTF-8 replaced, exactly one trailing newline removed unless the output goes on."""
    if truncated:
        return whole_characters(data[:OUTPUT_MAX_BYTES]).decode("utf-8", "replace")
    text = data.decode("utf-8", "replace")
    return text.removesuffix("\n")


class Utf8Pieces:
    """An incremental decoder: a character that arrives in two pieces comes out whole; invalid bytes become U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> str:
        """The text that is complete so far."""
        return self._decoder.decode(data)

    @property
    def unfinished(self) -> int:
        """The bytes of a character that has begun and not ended."""
        return len(self._decoder.getstate()[0])

    def end(self) -> str:
        """What was left of an unfinished character."""
        return self._decoder.decode(b"", final=True)
