"""The log of an image build: one JSON object a line, in a file that outlives the build and every reader."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import IO, Any

# What a build may say; a step that says more goes on, and the rest is dropped.
OUTPUT_BYTES_MAX = 16 * 1_048_576
READ_LINES = 500
# A reader asks the file again at the latest after this long: it may be another process that writes.
POLL_SECONDS = 1.0
SILENCE_SECONDS = 10.0


class BuildLog:
    """The writer's end. Every event gets a number, from 1."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("ab")
        self._said = 0
        self._full = False
        self.changed = asyncio.Event()

    def event(self, name: str, **fields: Any) -> None:
        """Write an event down, for readers at once and for good."""
        if name == "output":
            self._said += len(fields["data"])
            if self._full:
                return
            if self._said > OUTPUT_BYTES_MAX:
                self._full = True
                name, fields = "note", {"text": f"more than {OUTPUT_BYTES_MAX} characters: further output is not kept"}
        line = json.dumps({"event": name, **fields}, separators=(",", ":"))
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self.changed.set()

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        self._file.close()
        self.changed.set()


async def follow(path: Path, live: BuildLog | None, *, after: int = 0) -> AsyncGenerator[dict[str, Any] | None, None]:
    """The events after number `after`, each with its `number`, as they come until the `end`; of a build that is over, those that are there.

    None comes after every SILENCE_SECONDS without an event.
    """
    number = 0
    offset = 0
    spoke = time.monotonic()
    while True:
        if live is not None:
            live.changed.clear()
        lines = await asyncio.to_thread(_read, path, offset)
        for line in lines:
            offset += len(line)
            number += 1
            if number <= after:
                continue
            event: dict[str, Any] = json.loads(line)
            yield {"number": number, **event}
            if event["event"] == "end":
                return
        if lines:
            spoke = time.monotonic()
            continue
        if live is None:
            return
        if time.monotonic() - spoke >= SILENCE_SECONDS:
            spoke = time.monotonic()
            yield None
        try:
            async with asyncio.timeout(POLL_SECONDS):
                await live.changed.wait()
        except TimeoutError:
            pass


def append_end(path: Path, **fields: Any) -> None:
    """Write the end of a build whose server did not."""
    log = BuildLog(path)
    log.event("end", **fields)
    log.close()


def _read(path: Path, offset: int) -> list[bytes]:
    """Whole lines from an offset on, some at a time."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            lines = []
            for line in file:
                if not line.endswith(b"\n"):
                    break
                lines.append(line)
                if len(lines) == READ_LINES:
                    break
            return lines
    except FileNotFoundError:
        return []
