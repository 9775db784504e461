"""What saved memory depends on, of whatever driver: the program that runs the guest, and the processor."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

# What decides whether code that has looked at them can go on elsewhere.
CPU_FIELDS = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")


class ProgramVersion:
    """The version of a program, which is asked again when the program was replaced: an update of the host's packages does not restart the server.

    Args:
        program: its name or path.
        ask: has it say its version. Raises what the caller of `text` is to see.

    """

    def __init__(self, program: str, ask: Callable[[], Awaitable[str]]) -> None:
        self._program = program
        self._ask = ask
        self._known: tuple[tuple[str, int, int], str] | None = None

    async def text(self) -> str:
        """The version. Microseconds, unless it has to be asked. Raises OSError for a program that is not there."""
        path = shutil.which(self._program) or self._program
        status = os.stat(path)  # noqa: PTH116 - follows the link to the real binary
        key = (os.path.realpath(path), status.st_size, status.st_mtime_ns)  # noqa: ASYNC240
        if self._known is None or self._known[0] != key:
            self._known = (key, await self._ask())
        return self._known[1]


def cpu_digest(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """A digest of the processor's kind and features; the same on machines between which memory may move."""
    first = cpuinfo.read_text().partition("\n\n")[0]
    fields = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
    named = {name.strip(): value.split() for name, value in fields.items() if name.strip() in CPU_FIELDS}
    return hashlib.sha256(repr(sorted((name, sorted(value)) for name, value in named.items())).encode()).hexdigest()[
        :16
    ]
