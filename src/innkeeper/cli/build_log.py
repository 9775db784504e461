"""The log of something that a server makes, followed from its beginning to its end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from innkeeper.cli.connection import refused
from innkeeper.cli.printing import fail, note, say
from innkeeper.cli.program import events
from innkeeper.cli.terminal_filter import TerminalFilter

if TYPE_CHECKING:
    from innkeeper.cli.connection import Server

INTERRUPTED = 130
# A large image says nothing for a while but a comment every ten seconds.
SILENCE_SECONDS = 120.0


def follow(
    server: Server, path: str, *, show: Callable[[str, dict[str, Any]], None] | None, goes_on: str, cut_short: str
) -> dict[str, Any]:
    """What the log's `end` says; everything before is handed to `show`.

    Ends the command where the reader interrupts it (saying `goes_on`), or the server ends the log before that (saying `cut_short`).
    """
    import httpx2

    timeout = httpx2.Timeout(SILENCE_SECONDS, connect=5.0)
    headers = {"Accept": "text/event-stream"}
    try:
        with server.stream("GET", path, headers=headers, timeout=timeout) as response:
            if response.is_error:
                refused(response)
            for event, data in events(response):
                if event == "end":
                    return data
                if show is not None:
                    show(event, data)
    except KeyboardInterrupt:
        note(f"inn: {goes_on}")
        raise SystemExit(INTERRUPTED) from None
    fail(cut_short)


class BuildPrinter:
    """Shows what a build says on standard output; where that is a terminal, nothing that could harm it."""

    def __init__(self) -> None:
        self._filter = TerminalFilter() if sys.stdout.isatty() else None

    def __call__(self, event: str, data: dict[str, Any]) -> None:
        """Print one event."""
        if event == "step":
            say(_step(data))
        elif event == "note":
            say(f"  {data['text']}")
        elif event == "output":
            text = data["data"] if self._filter is None else self._filter.feed(data["data"])
            sys.stdout.flush()
            sys.stdout.buffer.write(text.encode("utf-8", "replace"))
            sys.stdout.buffer.flush()


def _step(data: dict[str, Any]) -> str:
    """A step of a build, with its number and its line where it has them."""
    if "stage" not in data:
        return str(data["text"])
    line = f"line {data['line']}: " if data["line"] else ""
    kept = " (kept)" if data["kept"] else ""
    return f"[{data['stage']} {data['step']}/{data['steps']}] {line}{data['text']}{kept}"
