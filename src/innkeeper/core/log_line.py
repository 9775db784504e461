"""A line of an instance's log: what its main process said, what became of the instance, and what the platform decided about it."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

# A longer line of a program becomes several.
LINE_CHARACTERS_MAX = 16_384


class LogSource(StrEnum):
    """Who said it: the main process, in one of its outputs, the instance's life, or the platform."""

    STDOUT = "stdout"
    STDERR = "stderr"
    LIFECYCLE = "lifecycle"
    PLATFORM = "platform"


class Severity(StrEnum):
    """How much it matters. Of a program only the output is known that it used: stdout's lines are `info`, stderr's `warning`."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


SEVERITY_OF_OUTPUT: Mapping[LogSource, Severity] = {
    LogSource.STDOUT: Severity.INFO,
    LogSource.STDERR: Severity.WARNING,
}


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line. `sequence` counts an instance's lines from 1 and is the cursor after the line; `at` is Unix time in seconds.

    `message` is what was said, control characters included, without its newline.
    """

    sequence: int
    at: float
    source: LogSource
    level: Severity
    message: str

    def to_wire(self) -> list[Any]:
        """As JSON, as small as it goes."""
        return [self.sequence, self.at, str(self.source), str(self.level), self.message]


def line_from_wire(body: Any) -> LogLine:
    """The line of `LogLine.to_wire`. Raises ValueError."""
    match body:
        case [int(sequence), float() | int() as at, str(source), str(level), str(message)]:
            return LogLine(sequence, float(at), LogSource(source), Severity(level), message)
    raise ValueError("not a line of a log")


class LineSplitter:
    """Makes lines of one output's bytes: UTF-8, with a replacement character for what is none. It keeps less than one line.

    A line ends at a newline, before which one carriage return goes, and where it has grown to LINE_CHARACTERS_MAX.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def feed(self, data: bytes) -> list[str]:
        """The lines that the bytes complete."""
        *lines, self._rest = (self._rest + self._decoder.decode(data)).split("\n")
        found = [piece for line in lines for piece in _pieces(line.removesuffix("\r"))]
        if len(self._rest) > LINE_CHARACTERS_MAX:
            *whole, self._rest = _pieces(self._rest)
            found += whole
        return found

    def end(self) -> list[str]:
        """What is left when the output ends: one line without its newline, or none."""
        rest, self._rest = self._rest + self._decoder.decode(b"", final=True), ""
        return _pieces(rest) if rest else []


def _pieces(line: str) -> list[str]:
    if len(line) <= LINE_CHARACTERS_MAX:
        return [line]
    return [line[at : at + LINE_CHARACTERS_MAX] for at in range(0, len(line), LINE_CHARACTERS_MAX)]
