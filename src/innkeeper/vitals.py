"""The vital signs of this process: memory, descriptors, processor time, threads, and how late its event loop runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import threading
from collections.abc import AsyncIterator
from pathlib import Path

from innkeeper.core.metric import Reading

TICK_SECONDS = 0.5


class Vitals:
    """Readings of the process that calls itself `process` (`api` or `host`). While somebody watches, of the event loop too."""

    def __init__(self, process: str) -> None:
        self._labels = {"process": process}
        self._late_seconds = 0.0
        self._worst_seconds = 0.0

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """`watch` for the block."""
        task = asyncio.get_running_loop().create_task(self.watch(), name="event loop lag")
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def watch(self) -> None:
        """Measure without end how much later than asked for the event loop wakes a task."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            await asyncio.sleep(TICK_SECONDS)
            late = max(0.0, loop.time() - began - TICK_SECONDS)
            self._late_seconds += late
            self._worst_seconds = max(self._worst_seconds, late)

    def readings(self) -> list[Reading]:
        """What `/metrics` says of the process. The worst lag is that since the last reading."""
        worst, self._worst_seconds = self._worst_seconds, 0.0
        times = os.times()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        rows: tuple[tuple[str, str, str, float], ...] = (
            ("process_resident_bytes", "gauge", "Resident memory of a process of the server.", resident),
            ("process_open_descriptors", "gauge", "Open file descriptors.", len(os.listdir("/proc/self/fd"))),  # noqa: PTH208 - names alone
            ("process_threads", "gauge", "Threads of the interpreter.", threading.active_count()),
            ("process_cpu_seconds", "counter", "Processor time used.", times.user + times.system),
            (
                "event_loop_late_seconds",
                "counter",
                "Time that a waiting task was woken too late, looked at twice a second.",
                self._late_seconds,
            ),
            ("event_loop_worst_late_seconds", "gauge", "The worst of it since the last scrape.", worst),
        )
        return [
            Reading(name, "counter" if kind == "counter" else "gauge", text, ((self._labels, value),))
            for name, kind, text, value in rows
        ]
