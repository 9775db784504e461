"""How fast one guest's output is taken: the daemon writes all of it to disk, on the one thread that serves every guest."""

from __future__ import annotations

import asyncio
import time

# `yes` writes hundreds of MB a second, and eight of them made a neighbour's commands ten times as long. Of an execution 64 MiB are kept, so what
# is of any use comes at once.
BYTES_PER_SECOND = 16_777_216
BYTES_AT_ONCE = 67_108_864


class OutputPace:
    """Bytes that may be taken at once, refilled evenly. One a guest."""

    def __init__(self, *, bytes_per_second: int = BYTES_PER_SECOND, bytes_at_once: int = BYTES_AT_ONCE) -> None:
        self._rate = bytes_per_second
        self._most = bytes_at_once
        self._left = float(bytes_at_once)
        self._at = time.monotonic()

    async def take(self, size: int) -> None:
        """Count bytes that came; returns when more may be read. The guest's writers wait meanwhile, for want of credit."""
        self._left -= size
        if self._left >= 0:
            return
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 0:
            await asyncio.sleep(-self._left / self._rate)
