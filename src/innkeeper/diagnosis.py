"""Looking into this very process while it runs, for its operator: where its time goes, what its tasks wait for, what takes its memory.

Nothing here runs until it is asked for, each for a bounded time and one at a time. No values of variables are read, so no secret is shown.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from innkeeper.errors import ConflictError, InvalidRequestError

SAMPLES_PER_SECOND = 100
MAX_SECONDS = 60.0
MAX_DEPTH = 100
# Of different stacks; what comes beyond is counted under one name.
MAX_STACKS = 2_000
OTHERS = "(more stacks than are kept)"
TOP = 40
TRACE_FRAMES = 8
KINDS = ("stacks", "tasks", "memory")
PACKAGE = Path(__file__).resolve().parent


class Diagnosis:
    """Answers one question at a time about this process."""

    def __init__(self) -> None:
        self._asked: str | None = None

    async def ask(self, kind: str, *, seconds: float = 0.0) -> dict[str, Any]:
        """`stacks` and `memory` look for `seconds`; `tasks` at this moment.

        Answers: `{"seconds", "samples", "stacks": {"thread;module:function;…": samples}}`;
        `{"tasks": [{"name", "count", "stack": [str]}]}`; `{"seconds", "resident_kib", "peak_kib", "allocated": [{"where", "bytes", "blocks"}],
        "objects": [{"type", "count"}]}`.

        Raises:
            InvalidRequestError: another kind, or too long.
            ConflictError: a question is being answered.

        """
        if kind not in KINDS or not 0 <= seconds <= MAX_SECONDS:
            raise InvalidRequestError(f"kind: one of {', '.join(KINDS)}; seconds: from 0 to {MAX_SECONDS:.0f}")
        if self._asked is not None:
            raise ConflictError(f"This process is being looked into already ({self._asked})")
        self._asked = kind
        try:
            if kind == "stacks":
                return await _sample_stacks(seconds)
            if kind == "memory":
                return await _trace_memory(seconds)
            return {"tasks": task_stacks(asyncio.all_tasks())}
        finally:
            self._asked = None


async def _sample_stacks(seconds: float) -> dict[str, Any]:
    stop = threading.Event()
    try:
        return await asyncio.to_thread(_sample, seconds, stop)
    finally:
        stop.set()


def _sample(seconds: float, stop: threading.Event) -> dict[str, Any]:
    own = threading.get_ident()
    found: Counter[str] = Counter()
    began = time.monotonic()
    samples = 0
    while not stop.wait(1 / SAMPLES_PER_SECOND) and time.monotonic() - began < seconds:
        samples += 1
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            if ident != own:
                stack = ";".join([names.get(ident, "(thread)"), *_names(frame)])
                found[stack if stack in found or len(found) < MAX_STACKS else OTHERS] += 1
    return {"seconds": round(time.monotonic() - began, 3), "samples": samples, "stacks": dict(found)}


def _names(frame: FrameType | None) -> list[str]:
    """The functions of a stack, outermost first."""
    names: list[str] = []
    while frame is not None and len(names) < MAX_DEPTH:
        names.append(f"{frame.f_globals.get('__name__', '?')}:{frame.f_code.co_qualname}")
        frame = frame.f_back
    return names[::-1]


def task_stacks(tasks: set[asyncio.Task[Any]]) -> list[dict[str, Any]]:
    """Where tasks wait, those at one place counted together, the most first."""
    counted: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for task in tasks:
        name = task.get_name()
        # A name that the library made up tells nothing and would keep equal tasks apart.
        counted["" if name.startswith("Task-") else name, tuple(_waits(task.get_coro()))] += 1
    return [{"name": name, "count": count, "stack": list(stack)} for (name, stack), count in counted.most_common()]


def _waits(awaited: Any) -> Iterator[str]:
    """The chain of what awaits what, outermost first. A task's own stack ends at its first coroutine."""
    for _ in range(MAX_DEPTH):
        kind = next((kind for kind in ("cr", "ag", "gi") if hasattr(awaited, f"{kind}_code")), None)
        if kind is None:
            if awaited is not None:
                yield f"({type(awaited).__name__})"
            return
        frame: FrameType | None = getattr(awaited, f"{kind}_frame")
        code: CodeType = getattr(awaited, f"{kind}_code")
        yield f"{code.co_qualname} ({_short(code.co_filename)}:{frame.f_lineno if frame else code.co_firstlineno})"
        awaited = getattr(awaited, "gi_yieldfrom" if kind == "gi" else f"{kind}_await")


def _short(path: str) -> str:
    for root in (PACKAGE.parent, *map(Path, sys.path)):
        if root.is_absolute() and Path(path).is_relative_to(root):
            return str(Path(path).relative_to(root))
    return path


async def _trace_memory(seconds: float) -> dict[str, Any]:
    """What was allocated in `seconds` and is still held. The tracing costs time while it goes on, so it ends with the question."""
    if tracemalloc.is_tracing():
        raise ConflictError("Memory is being traced already")
    tracemalloc.start(TRACE_FRAMES)
    try:
        await asyncio.sleep(seconds)
        snapshot = await asyncio.to_thread(tracemalloc.take_snapshot)
    finally:
        tracemalloc.stop()
    return await asyncio.to_thread(_memory, seconds, snapshot)


def _memory(seconds: float, snapshot: tracemalloc.Snapshot) -> dict[str, Any]:
    kept = snapshot.filter_traces([tracemalloc.Filter(inclusive=False, filename_pattern=tracemalloc.__file__)])
    allocated = [
        {
            "where": f"{_short(one.traceback[0].filename)}:{one.traceback[0].lineno}",
            "bytes": one.size,
            "blocks": one.count,
        }
        for one in kept.statistics("lineno")[:TOP]
    ]
    types = Counter(type(thing).__qualname__ for thing in gc.get_objects())
    return {
        "seconds": seconds,
        "resident_kib": _resident_kib(),
        "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "allocated": allocated,
        "objects": [{"type": name, "count": count} for name, count in types.most_common(TOP)],
    }


def _resident_kib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1024
