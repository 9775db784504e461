"""A program somewhere else, as commands that run one share it: their options, its input, and its outputs as they come."""

from __future__ import annotations

import json as jsonlib
import os
import stat
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from innkeeper.cli.printing import USAGE, fail
from innkeeper.cli.terminal_filter import TerminalFilter

if TYPE_CHECKING:
    import httpx2

INTERRUPTED = 130
# A stream carries a comment at least every 10 seconds.
SILENCE_SECONDS = 60.0

Line = Annotated[str | None, typer.Option("--command", "-c", metavar="LINE", help="A shell line instead of a program.")]
Cwd = Annotated[str | None, typer.Option(help="Working directory.")]
Env = Annotated[
    list[str] | None,
    typer.Option(
        metavar="K=V", help="Environment variable, repeatable; 'K' alone takes the value from your own environment."
    ),
]
Stdin = Annotated[
    bool | None,
    typer.Option("--stdin/--no-stdin", help="Pass standard input on.", show_default="when it is a pipe or a file"),
]
Raw = Annotated[bool, typer.Option("--raw", help="Let control sequences through to a terminal; colours always pass.")]


def stdin_is_input() -> bool:
    """Whether somebody put something into standard input: it is a pipe, a file or a socket."""
    try:
        mode = stat.S_IFMT(os.fstat(sys.stdin.fileno()).st_mode)
    except (OSError, ValueError):
        return False  # closed
    return mode in (stat.S_IFIFO, stat.S_IFREG, stat.S_IFSOCK)


def read_stdin() -> str:
    """All of standard input as text. Ends the command where it is none."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        fail("standard input is not UTF-8 text: copy it in with 'inn cp' and read it from there", status=USAGE)


class Outputs:
    """Standard output and error of ours, to which a program's are written; where one is a terminal, what could harm it is left out unless `raw`."""

    def __init__(self, *, raw: bool) -> None:
        self._files = {"stdout": sys.stdout, "stderr": sys.stderr}
        self._filters = {stream: TerminalFilter() for stream, file in self._files.items() if not raw and file.isatty()}

    def write(self, text: str, stream: str = "stdout") -> None:
        """Write a piece at once. `stream` is `stdout` or `stderr`."""
        found = self._filters.get(stream)
        self._put(text if found is None else found.feed(text), stream)

    def end(self) -> None:
        """Write what was held back, as it might have become a control sequence."""
        for stream, found in self._filters.items():
            self._put(found.end(), stream)

    def _put(self, text: str, stream: str) -> None:
        file = self._files[stream]
        file.buffer.write(text.encode("utf-8", "replace"))
        file.flush()


def events(response: httpx2.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """(event, data) of a server-sent event stream."""
    for _, name, data in numbered_events(response):
        yield name, data


def numbered_events(response: httpx2.Response) -> Iterator[tuple[str | None, str, dict[str, Any]]]:
    """(id, event, data) of a server-sent event stream. Split at LF bytes only: the JSON may hold other line separators as they are."""
    rest = b""
    number: str | None = None
    name, data = "", b""
    for chunk in response.iter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not line:
                if name:
                    yield number, name, jsonlib.loads(data)
                number, name, data = None, "", b""
            elif line.startswith(b"id: "):
                number = line[4:].decode("ascii", "replace")
            elif line.startswith(b"event: "):
                name = line[7:].decode("ascii", "replace")
            elif line.startswith(b"data: "):
                data = line[6:]
