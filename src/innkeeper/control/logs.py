"""Logs of instances: the newest lines, those after a cursor, and lines as they come.

A host is asked by one task per followed instance, however many follow it. That task keeps the newest lines, up to SHARED_BYTES; a follower takes from these
at its own pace, and asks the host itself for what it was too slow for, or for what was there before. So no follower holds more than one page, and none holds up
another.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from innkeeper.control.guest_calls import host_of
from innkeeper.control.live_table import Entry
from innkeeper.core.host_verbs import to_wire
from innkeeper.core.log_line import LogLine, line_from_wire
from innkeeper.core.log_verbs import LINES_MAX, ReadLog
from innkeeper.errors import InnkeeperError, RateLimitedError

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.stdlib.get_logger(__name__)

# How much of a followed log is kept in memory for all who follow it.
SHARED_BYTES = 262_144
LINE_OVERHEAD_BYTES = 200
# Whoever follows gets so many lines at a time.
FOLLOWED_LINES = 100
FOLLOWERS_MAX = 256
ALL_FOLLOWERS_MAX = 2_048
# How long a host is asked to wait for a line; whether the instance is still there is looked at as often.
WAIT_SECONDS = 5.0
HOST_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class LogGap:
    """Lines that are not kept any more: those from the one sequence up to the other, both included."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class LogPage:
    """Lines in order. `first` and `last` are the sequences of the oldest and newest line that are kept; `last` is 0 of no log."""

    lines: list[LogLine]
    first: int
    last: int


async def newest(control: Control, entry: Entry, count: int) -> LogPage:
    """The newest `count` (at most LINES_MAX) lines of an instance's log, whatever its state. Raises UnavailableError."""
    page = await _read(control, entry, newest=count)
    lines = page.lines
    # A page of long lines ends early.
    while lines and lines[-1].sequence < page.last and len(lines) < count:
        more = await _read(control, entry, after=lines[-1].sequence, limit=count - len(lines))
        if not more.lines:
            break
        lines += more.lines
    return LogPage(lines, page.first, page.last)


async def after(control: Control, entry: Entry, sequence: int, *, limit: int) -> LogPage:
    """At most `limit` (up to LINES_MAX) lines after a sequence, or from the oldest on where those are gone. Raises UnavailableError."""
    return await _read(control, entry, after=sequence, limit=limit)


async def follow(
    control: Control, entry: Entry, *, sequence: int | None, lines: int = 0
) -> AsyncGenerator[list[LogLine] | LogGap, None]:
    """The lines after a sequence, or the newest `lines`, and what comes, until the instance has ended. It is no use of the instance.

    Raises:
        RateLimitedError: too many follow the log already, or any log.
        UnavailableError: the host cannot be asked (any more).

    """
    control.log_followers.check(entry.instance.id)
    if sequence is None:
        last = (await _read(control, entry, newest=0)).last
        sequence = max(0, last - lines)
    return control.log_followers.follow(control, entry, sequence)


async def _read(
    control: Control,
    entry: Entry,
    *,
    after: int = 0,
    newest: int | None = None,
    limit: int = LINES_MAX,
    wait_seconds: float = 0.0,
) -> LogPage:
    request = ReadLog(entry.instance.id, after=after, newest=newest, limit=limit, wait_seconds=wait_seconds)
    answer = await control.bus.request(
        host_of(entry), ReadLog.verb, to_wire(request), timeout_seconds=HOST_SECONDS + wait_seconds
    )
    return LogPage([line_from_wire(line) for line in answer["lines"]], answer["first"], answer["last"])


class LogFollowers:
    """The followed logs of this process."""

    def __init__(self) -> None:
        self._followed: dict[UUID, _Followed] = {}

    def __len__(self) -> int:
        return sum(one.followers for one in self._followed.values())

    def __contains__(self, instance_id: UUID) -> bool:
        """Whether somebody follows the instance's log."""
        return instance_id in self._followed

    def check(self, instance_id: UUID) -> None:
        """Raise RateLimitedError where one more may not follow."""
        one = self._followed.get(instance_id)
        if len(self) >= ALL_FOLLOWERS_MAX or (one is not None and one.followers >= FOLLOWERS_MAX):
            raise RateLimitedError("Too many follow logs already")

    async def follow(
        self, control: Control, entry: Entry, position: int
    ) -> AsyncGenerator[list[LogLine] | LogGap, None]:
        """See `logs.follow`."""
        # Again: it may have been a while since the caller looked.
        self.check(entry.instance.id)
        one = self._followed.get(entry.instance.id)
        if one is None:
            one = self._followed[entry.instance.id] = _Followed(control, entry)
        one.followers += 1
        try:
            async for found in one.after(position):
                yield found
        finally:
            one.followers -= 1
            if not one.followers:
                if self._followed.get(entry.instance.id) is one:
                    del self._followed[entry.instance.id]
                await one.close()


class _Followed:
    """One log, followed by the task of it. `ended` and `error` say why there are no more lines."""

    def __init__(self, control: Control, entry: Entry) -> None:
        self.followers = 0
        self._control = control
        self._entry = entry
        self._lines: deque[LogLine] = deque()
        self._size = 0
        # The newest sequence that the task has seen; None before its first answer.
        self._last: int | None = None
        self._ended = False
        self._error: InnkeeperError | None = None
        self._more: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """End the task."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def after(self, position: int) -> AsyncIterator[list[LogLine] | LogGap]:
        """See `logs.follow`."""
        while self._last is None:
            await self._change()
        # A cursor of a log that was lost since: its lines are counted anew.
        position = min(position, self._last)
        while True:
            if position >= self._last:
                if self._error is not None:
                    raise self._error
                if self._ended:
                    return
                await self._change()
                continue
            lines = self._shared(position) or (await _read(self._control, self._entry, after=position)).lines
            if not lines:
                # Removed, or damaged up to its end.
                position = self._last
                continue
            if lines[0].sequence > position + 1:
                yield LogGap(position + 1, lines[0].sequence - 1)
            position = lines[-1].sequence
            yield lines

    async def _change(self) -> None:
        # Whoever stops waiting must not take the others' future with it.
        await asyncio.shield(self._more)

    def _shared(self, position: int) -> list[LogLine]:
        """The next lines where they are in memory, else none."""
        if not self._lines or self._lines[0].sequence > position + 1:
            return []
        skipped = 0
        for line in self._lines:
            if line.sequence > position:
                break
            skipped += 1
        return [self._lines[at] for at in range(skipped, min(skipped + FOLLOWED_LINES, len(self._lines)))]

    async def _run(self) -> None:
        try:
            last = self._last = (await _read(self._control, self._entry, newest=0)).last
            self._tell()
            while not self._entry.doomed and self._control.live.by_instance(self._entry.instance.id) is self._entry:
                page = await _read(self._control, self._entry, after=last, wait_seconds=WAIT_SECONDS)
                for line in page.lines:
                    self._keep(line)
                # Where the next lines are damaged, none of them comes.
                newest = page.lines[-1].sequence if page.lines else page.last
                if newest > last:
                    last = self._last = newest
                    self._tell()
            self._ended = True
        except InnkeeperError as error:
            self._error = error
        except Exception:
            log.exception("a log cannot be followed", instance_id=str(self._entry.instance.id))
            self._error = InnkeeperError()
        finally:
            self._last = self._last or 0
            self._tell()

    def _keep(self, line: LogLine) -> None:
        self._lines.append(line)
        self._size += _size(line)
        while self._size > SHARED_BYTES and len(self._lines) > 1:
            self._size -= _size(self._lines.popleft())

    def _tell(self) -> None:
        more, self._more = self._more, asyncio.get_running_loop().create_future()
        more.set_result(None)


def _size(line: LogLine) -> int:
    return len(line.message) + LINE_OVERHEAD_BYTES
