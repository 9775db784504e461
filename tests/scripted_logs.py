"""The logs of a scripted host: lines in memory, waited for as in the daemon. Tests write them, take old ones away, and look who asks."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from uuid import UUID

from innkeeper.bus.contract import ServerCall
from innkeeper.core.log_line import LogLine, LogSource, Severity
from innkeeper.core.log_verbs import ReadLog
from innkeeper.errors import InnkeeperError


class ScriptedLogs:
    def __init__(self) -> None:
        self.lines: dict[UUID, list[LogLine]] = {}
        self.waiting: Counter[UUID] = Counter()
        self.page = 1_000
        self.error: InnkeeperError | None = None
        # How many asked for lines that were to be there already.
        self.paged = 0
        self._written: dict[UUID, asyncio.Event] = {}

    def answers(self) -> Iterator[tuple[type[Any], Any]]:
        yield ReadLog, self._read

    def write(self, instance_id: UUID, *messages: str, source: LogSource = LogSource.STDOUT) -> None:
        lines = self.lines.setdefault(instance_id, [])
        last = lines[-1].sequence if lines else 0
        lines += [
            LogLine(last + number, 1_000.0 + last + number, source, Severity.INFO, message)
            for number, message in enumerate(messages, 1)
        ]
        self._event(instance_id).set()

    def wake(self, instance_id: UUID) -> None:
        """Whoever waits for a line looks again, as at the end of an instance."""
        self._event(instance_id).set()

    def _event(self, instance_id: UUID) -> asyncio.Event:
        return self._written.setdefault(instance_id, asyncio.Event())

    async def _read(self, request: ReadLog, call: ServerCall) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        after = request.after
        self.paged += request.newest is None and not request.wait_seconds
        if request.newest is not None:
            after = max(after, self._last(request.instance_id) - request.newest)
        if request.wait_seconds and self._last(request.instance_id) <= after:
            self._event(request.instance_id).clear()
            self.waiting[request.instance_id] += 1
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(request.wait_seconds):
                        await self._event(request.instance_id).wait()
            finally:
                self.waiting[request.instance_id] -= 1
        lines = self.lines.get(request.instance_id, [])
        last = self._last(request.instance_id)
        found = [line.to_wire() for line in lines if line.sequence > after][: min(self.page, request.limit)]
        return {"lines": found, "first": lines[0].sequence if lines else last + 1, "last": last}

    def _last(self, instance_id: UUID) -> int:
        lines = self.lines.get(instance_id)
        return lines[-1].sequence if lines else 0
