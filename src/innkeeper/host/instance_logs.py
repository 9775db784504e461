"""The logs of instances: files on the host, bounded in size and rate, read by cursor and waited for.

An instance has a folder of segments, `<sequence of its first line>.jsonl`, with one JSON array per line: time, source, level, message. A line's sequence is
its segment's and its place in it. Lines are written whole, by one call, and are there when it returns, also for the daemon after one that was killed; a last
line that a crash of the host tore is dropped. The oldest segment goes when all together are too large.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import structlog

from innkeeper.core.log_line import LINE_CHARACTERS_MAX, SEVERITY_OF_OUTPUT, LogLine, LogSource, Severity
from innkeeper.host.exhaustion import unavailable

log = structlog.stdlib.get_logger(__name__)

SEGMENTS = 16
# What a main process may say in the long run, and at once: beyond, its lines are counted and dropped, and the log says so.
RATE_BYTES_PER_SECOND = 262_144
BURST_BYTES = 4 * 1_048_576
# An empty line costs this much too.
LINE_OVERHEAD_BYTES = 64
# Of a page of lines, as they lie on the disk; one line always comes.
PAGE_BYTES = 131_072
COMPLAINT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class LogPage:
    """Lines after a cursor, in order; `first` and `last` are the sequences of the oldest and newest line that are kept (of none: `last` + 1 and `last`)."""

    lines: list[LogLine]
    first: int
    last: int


@dataclass(slots=True)
class _Log:
    """One instance's log. `segments` has (first sequence, bytes) of each, oldest first."""

    folder: Path
    segments: list[tuple[int, int]]
    next: int
    tokens: float = BURST_BYTES
    refilled_at: float = 0.0
    dropped_lines: int = 0
    unwritten_lines: int = 0
    # Where the page before ended: (first sequence of its segment, sequence, offset in bytes).
    hint: tuple[int, int, int] = (0, 0, 0)

    def path(self, first: int) -> Path:
        return self.folder / f"{first:020d}.jsonl"


class InstanceLogs:
    """Owns the folder of all logs. What cannot be written is counted and told, and never fails what it is about."""

    def __init__(
        self,
        directory: Path,
        *,
        limit_bytes: int,
        now: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._segment_bytes = max(1, limit_bytes // SEGMENTS)
        self._now = now
        self._ticks = ticks
        self._logs: dict[UUID, _Log] = {}
        self._waiting: dict[UUID, set[asyncio.Future[None]]] = {}
        self._complained_at = -COMPLAINT_SECONDS

    # --- writing ---------------------------------------------------------------------------------------------------

    def begin(self, instance_id: UUID) -> None:
        """Have a log of the instance: until then, and after its removal, lines about it are dropped."""
        try:
            (self._directory / str(instance_id)).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            self._complain(instance_id, error)

    def note(
        self,
        instance_id: UUID,
        message: str,
        *,
        level: Severity = Severity.INFO,
        source: LogSource = LogSource.LIFECYCLE,
    ) -> None:
        """Write a line of our own; it has no limit of rate."""
        found = self._find(instance_id)
        if found is not None:
            self._write(instance_id, found, [self._line(source, level, message[:LINE_CHARACTERS_MAX])])

    def append(self, instance_id: UUID, source: LogSource, messages: Sequence[str]) -> None:
        """Write lines of the instance's main process, as far as it has not said too much. Each is at most LINE_CHARACTERS_MAX long."""
        found = self._find(instance_id)
        if found is None:
            return
        taken: list[bytes] = []
        size = 0
        self._refill(found)
        for message in messages:
            # After a drop it goes on when there is room for a while, not for a line now and then.
            if found.dropped_lines and found.tokens < BURST_BYTES / 4:
                found.dropped_lines += 1
                continue
            line = self._line(source, SEVERITY_OF_OUTPUT[source], message)
            cost = len(line) + LINE_OVERHEAD_BYTES
            if found.tokens < cost:
                said = f"More than {RATE_BYTES_PER_SECOND // 1024} KiB of output a second: lines are dropped"
                taken.append(self._warning(said))
                found.dropped_lines = 1
                continue
            if found.dropped_lines:
                taken.append(self._warning(f"{found.dropped_lines} lines were dropped here"))
                found.dropped_lines = 0
            found.tokens -= cost
            taken.append(line)
            size += len(line)
            if size > PAGE_BYTES:
                self._write(instance_id, found, taken)
                taken, size = [], 0
        self._write(instance_id, found, taken)

    def _line(self, source: LogSource, level: Severity, message: str) -> bytes:
        return json.dumps([round(self._now(), 3), source, level, message], separators=(",", ":")).encode() + b"\n"

    def _warning(self, message: str) -> bytes:
        return self._line(LogSource.PLATFORM, Severity.WARNING, message)

    def _refill(self, one: _Log) -> None:
        now = self._ticks()
        if one.refilled_at:
            one.tokens = min(BURST_BYTES, one.tokens + (now - one.refilled_at) * RATE_BYTES_PER_SECOND)
        one.refilled_at = now

    def _write(self, instance_id: UUID, one: _Log, lines: list[bytes]) -> None:
        if not lines:
            return
        gap = [self._warning(f"{one.unwritten_lines} lines could not be written here")] if one.unwritten_lines else []
        data = b"".join((*gap, *lines))
        try:
            if not one.segments or one.segments[-1][1] >= self._segment_bytes:
                self._rotate(one)
            first, size = one.segments[-1]
            _append(one.path(first), data, size)
        except OSError as error:
            one.unwritten_lines += len(lines)
            self._complain(instance_id, error)
            return
        one.unwritten_lines = 0
        one.segments[-1] = (first, size + len(data))
        one.next += len(gap) + len(lines)
        self._wake(instance_id)

    def _rotate(self, one: _Log) -> None:
        one.path(one.next).touch(mode=0o600)
        one.segments.append((one.next, 0))
        total = sum(size for _, size in one.segments)
        while len(one.segments) > 1 and total > self._limit_bytes - self._segment_bytes:
            first, size = one.segments[0]
            one.path(first).unlink(missing_ok=True)
            del one.segments[0]
            total -= size

    def _complain(self, instance_id: UUID, error: OSError) -> None:
        if self._ticks() - self._complained_at > COMPLAINT_SECONDS:
            self._complained_at = self._ticks()
            reason = unavailable(error)
            said = str(error) if reason is None else reason.message
            log.error("a log cannot be written", instance_id=str(instance_id), error=said)

    # --- reading ---------------------------------------------------------------------------------------------------

    def read(self, instance_id: UUID, *, after: int, limit: int) -> LogPage:
        """At most `limit` lines after the sequence `after`, or from the oldest on where those after it are gone; fewer where they are long. Raises OSError."""
        one = self._find(instance_id)
        if one is None or not one.segments:
            following = 1 if one is None else one.next
            return LogPage([], following, following - 1)
        found: list[LogLine] = []
        page = LogPage(found, one.segments[0][0], one.next - 1)
        size = 0
        ends = [first for first, _ in one.segments[1:]] + [one.next]
        for (first, _), end in zip(list(one.segments), ends, strict=True):
            if end <= after + 1:
                continue
            for sequence, raw in _lines(one, first, end, after):
                size += len(raw)
                if len(found) >= limit or (found and size > PAGE_BYTES):
                    return page
                line = _parsed(sequence, raw)
                # Damaged on the disk: the others are what there is.
                if line is not None:
                    found.append(line)
        return page

    async def wait(self, instance_id: UUID, after: int) -> None:
        """Wait until there is a line after the sequence `after`, or the log is removed."""
        one = self._find(instance_id)
        if one is not None and one.next - 1 > after:
            return
        more = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(instance_id, set())
        waiting.add(more)
        try:
            await more
        finally:
            waiting.discard(more)
            if not waiting and self._waiting.get(instance_id) is waiting:
                del self._waiting[instance_id]

    def _wake(self, instance_id: UUID) -> None:
        for one in self._waiting.get(instance_id, ()):
            if not one.done():
                one.set_result(None)

    # --- its life --------------------------------------------------------------------------------------------------

    def forget(self, instance_id: UUID) -> None:
        """The log's folder was moved away: write nothing more, and let nobody wait for it."""
        self._logs.pop(instance_id, None)
        self._wake(instance_id)

    def expire(self, older_than: float, *, living: Callable[[UUID], bool]) -> int:
        """Drop segments that were written last before `older_than` (Unix time), and logs of those alone whose instance is not `living`; how many segments."""
        gone = 0
        for folder in sorted(self._directory.iterdir()):
            with contextlib.suppress(ValueError, OSError):
                instance_id = UUID(folder.name)
                one = self._find(instance_id)
                if one is None:
                    continue
                old = [(first, size) for first, size in one.segments if one.path(first).stat().st_mtime < older_than]
                if len(old) == len(one.segments):
                    if not living(instance_id):
                        shutil.rmtree(folder, ignore_errors=True)
                        self.forget(instance_id)
                        gone += len(old)
                        continue
                    if old and old[-1][1]:
                        # The next line's sequence must not be lost with the last segment.
                        one.path(one.next).touch(mode=0o600)
                        one.segments.append((one.next, 0))
                    else:
                        old = old[:-1]
                for first, size in old:
                    one.path(first).unlink(missing_ok=True)
                    one.segments.remove((first, size))
                    gone += 1
        return gone

    def _find(self, instance_id: UUID) -> _Log | None:
        one = self._logs.get(instance_id)
        if one is None:
            try:
                one = _opened(self._directory / str(instance_id))
            except FileNotFoundError:
                return None
            except OSError as error:
                self._complain(instance_id, error)
                return None
            self._logs[instance_id] = one
        return one


def _opened(folder: Path) -> _Log:
    """What an earlier daemon left. Raises OSError."""
    firsts = sorted(int(path.stem) for path in folder.iterdir() if path.suffix == ".jsonl" and path.stem.isdecimal())
    one = _Log(folder, [], 1)
    for first in firsts:
        path = one.path(first)
        size = path.stat().st_size
        if first == firsts[-1]:
            data = path.read_bytes()
            size = data.rfind(b"\n") + 1
            if size < len(data):
                os.truncate(path, size)
            one.next = first + data.count(b"\n")
        one.segments.append((first, size))
    return one


def _append(path: Path, data: bytes, size: int) -> None:
    """Add bytes at the end of a file of that size, all of them or none."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        written = 0
        while written < len(data):
            written += os.pwrite(descriptor, memoryview(data)[written:], size + written)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
        raise
    finally:
        os.close(descriptor)


def _lines(one: _Log, first: int, end: int, after: int) -> Iterable[tuple[int, bytes]]:
    """The lines of a segment after a sequence, and before `end`."""
    sequence, offset = first - 1, 0
    if one.hint[0] == first and one.hint[1] <= after:
        _, sequence, offset = one.hint
    try:
        file = one.path(first).open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for raw in file:
            if sequence + 1 >= end or not raw.endswith(b"\n"):
                return
            sequence += 1
            if sequence > after:
                # Whoever takes this line no more begins with it the next time.
                one.hint = (first, sequence - 1, offset)
                yield sequence, raw
            offset += len(raw)


def _parsed(sequence: int, raw: bytes) -> LogLine | None:
    try:
        at, source, level, message = json.loads(raw)
        return LogLine(sequence, float(at), LogSource(source), Severity(level), str(message))
    except (ValueError, TypeError):
        return None
