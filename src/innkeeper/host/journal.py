"""The kept output of executions and terminals: files on the host, bounded for each of them and per instance.

An execution keeps its first 16 MiB and its last 48 MiB; the bytes between are a marked gap. Offsets count the bytes that the
command wrote, so they never shift. `<execution>.head` holds the first part, `<execution>.tail` is a ring of the last
part, `<execution>.running` the mark of one that runs, which becomes `<execution>.json`, the record of its end. `<execution>.channels` says which bytes
are stderr's, `<execution>.results` holds what a cell displayed.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO
from uuid import UUID

from innkeeper.errors import ExecutionNotFoundError
from innkeeper.host.channels import STDERR, STDOUT, Channels, ChannelWriter
from innkeeper.host.linux.sparse import punch_hole

# What a guest may claim to have dropped while nobody read it: once for each link that broke, and not more than this in all. Each claim costs work on the
# host's disk, and offsets stay far below 2**63.
SKIPS_MAX = 64
SKIPPED_BYTES_MAX = 1 << 40


@dataclass(frozen=True, slots=True)
class Kept:
    """How much of an output is kept: that many bytes from its beginning, and that many from its end."""

    head_bytes: int
    tail_bytes: int


COMMANDS = Kept(16 * 1_048_576, 48 * 1_048_576)


@dataclass(slots=True)
class ExecutionRecord:
    """What is kept of an execution beside its output. `total_bytes` counts everything the command wrote, `stderr_bytes` what of it went to stderr.

    Of a cell also: whether its interpreter was `kernel_fresh` (began with it) and `kernel_lost` (ended with it), both None for other executions, and the
    size of what it displayed.
    """

    execution_id: str
    started_at: float
    total_bytes: int = 0
    ended: bool = False
    exit_code: int | None = None
    signal: int | None = None
    timed_out: bool = False
    duration_ms: float | None = None
    lost: str | None = None
    stderr_bytes: int = 0
    merged_from: int | None = None
    cpu_ms: float | None = None
    kernel_fresh: bool | None = None
    kernel_lost: bool | None = None
    result_bytes: int = 0
    results_truncated: bool = False


_FIELDS = tuple(one.name for one in fields(ExecutionRecord))


@dataclass(frozen=True, slots=True)
class OutputSlice:
    """Bytes of a journal at `offset`. `gap` is the dropped middle, if any."""

    offset: int
    data: bytes
    total_bytes: int
    gap: tuple[int, int] | None


class Journal:
    """Writes one execution's output.

    `<execution>.running` marks one that was begun: a daemon that starts again finds it and goes on. `finish` writes the record into it and gives it its
    last name. So a command costs the host's file system one new inode and no removed one, which is most of what its journal takes.
    """

    def __init__(self, directory: Path, execution_id: UUID, *, kept: Kept | None = None) -> None:
        self._kept = kept or COMMANDS
        # Not a Path: every command comes by here, and pathlib takes longer than the calls that it makes.
        self._stem = f"{directory}/{execution_id}"
        self.record = ExecutionRecord(execution_id=str(execution_id), started_at=time.time())
        self._head: BinaryIO | None = None
        self._tail: BinaryIO | None = None
        self._mark: BinaryIO | None = None
        # Of the record, once it has its name.
        self._recorded_bytes = 0
        self._skips_left = SKIPS_MAX
        self._skip_bytes_left = SKIPPED_BYTES_MAX
        self._channels = ChannelWriter(f"{self._stem}.channels")

    @classmethod
    def resume(cls, directory: Path, execution_id: UUID, *, kept: Kept | None = None) -> Journal:
        """The journal of an execution that an earlier daemon began, ready to be continued at `record.total_bytes`."""
        journal = cls(directory, execution_id, kept=kept)
        journal.record = _marked(directory, str(execution_id), kept)
        journal._channels = ChannelWriter.resume(f"{journal._stem}.channels")
        return journal

    def exists(self) -> bool:
        """Whether there is an execution of that id already."""
        return os.path.exists(f"{self._stem}.json") or os.path.exists(f"{self._stem}.running")  # noqa: PTH110

    def begin(self) -> None:
        """Mark the execution as begun. Raises FileExistsError for an id that runs already."""
        self._mark = _open(f"{self._stem}.running", os.O_EXCL)
        _pwrite_all(self._mark.fileno(), _mark(self.record), 0)

    def write(self, data: bytes, channel: int = STDOUT) -> None:
        """Append output. Raises OSError when the host's disk is full; what was written until then counts."""
        position, record, kept = self.record.total_bytes, self.record, self._kept
        if channel != self._channels.channel:
            # Before the bytes: whoever reads them finds out what they are.
            self._channels.switch(position, channel)
            record.merged_from = self._channels.merged_from
        if self._channels.channel == STDERR:
            record.stderr_bytes += len(data)
        if position < kept.head_bytes:
            first_part = data[: kept.head_bytes - position]
            _pwrite_all(self._opened_head(), first_part, position)
            position, data = position + len(first_part), data[len(first_part) :]
            record.total_bytes = position
        if data:
            end = position + len(data)
            data, position = data[-kept.tail_bytes :], position + max(0, len(data) - kept.tail_bytes)
            tail = self._opened_tail()
            for at, first, size in _ring(kept, position, len(data)):
                _pwrite_all(tail, data[first : first + size], at)
            record.total_bytes = end
            self._note_total()

    def skip_to(self, offset: int) -> None:
        """Go on at a later offset: what the guest wrote in between was dropped there, and reads as zeros.

        The guest names the offset, so a far one costs no more than a near one: nothing is written, there are holes. One that claims too much or too often
        is not believed: what it writes then follows what is there.
        """
        position, record, kept = self.record.total_bytes, self.record, self._kept
        offset = min(offset, position + self._skip_bytes_left)
        if offset <= position or not self._skips_left:
            return
        self._skips_left -= 1
        self._skip_bytes_left -= offset - position
        if position < kept.head_bytes:
            os.ftruncate(self._opened_head(), min(offset, kept.head_bytes))
        if offset > kept.head_bytes:
            tail = self._opened_tail()
            position = max(position, kept.head_bytes, offset - kept.tail_bytes)
            for at, _, size in _ring(kept, position, offset - position):
                if os.fstat(tail).st_size < at + size:
                    os.ftruncate(tail, at + size)
                if not punch_hole(tail, at, size):
                    _pwrite_all(tail, bytes(size), at)
        record.total_bytes = offset
        if offset > kept.head_bytes:
            self._note_total()

    def _opened_head(self) -> int:
        if self._head is None:
            self._head = _open(f"{self._stem}.head")
        return self._head.fileno()

    def _opened_tail(self) -> int:
        if self._tail is None:
            self._tail = _open(f"{self._stem}.tail")
        return self._tail.fileno()

    def _opened_mark(self) -> int:
        if self._mark is None:
            self._mark = _open(f"{self._stem}.running")
        return self._mark.fileno()

    def _note_total(self) -> None:
        if not self._recorded_bytes:
            # The ring's own size does not tell how often it went round.
            _pwrite_all(self._opened_mark(), _mark(self.record), 0)

    def finish(self) -> None:
        """Leave the record; again, when a background child has written more since. It is longer than the mark, so nothing of that one stays."""
        text = json.dumps({name: getattr(self.record, name) for name in _FIELDS}).encode()
        _pwrite_all(self._opened_mark(), text.ljust(self._recorded_bytes), 0)
        if not self._recorded_bytes:
            os.rename(f"{self._stem}.running", f"{self._stem}.json")  # noqa: PTH104
        self._recorded_bytes = max(self._recorded_bytes, len(text))

    def close(self) -> None:
        """Close the files."""
        for file in (self._head, self._tail, self._mark):
            if file is not None:
                file.close()
        self._head = self._tail = self._mark = None
        self._channels.close()


def _open(path: str, flags: int = 0) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600), "r+b", buffering=0)


def _pwrite_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _ring(kept: Kept, position: int, length: int) -> list[tuple[int, int, int]]:
    """Where the tail's ring holds `length` (at most `tail_bytes`) bytes from `position` on: [(offset in the file, offset in the bytes, size)]."""
    at = (position - kept.head_bytes) % kept.tail_bytes
    first = min(length, kept.tail_bytes - at)
    return [(at, 0, first), (0, first, length - first)][: 1 + (length > first)]


def _mark(record: ExecutionRecord) -> bytes:
    return f"{record.started_at:020.6f} {record.total_bytes:020d}\n".encode()


def _marked(directory: Path, execution_id: str, kept: Kept | None = None) -> ExecutionRecord:
    """What the mark of an execution says of it: as far as it has come, or its end, where a daemon was killed before it could name the record."""
    try:
        text = (directory / f"{execution_id}.running").read_text()
        if text.startswith("{"):
            return _recorded(text)
        started_at, total = text.split()
        record = ExecutionRecord(execution_id=execution_id, started_at=float(started_at), total_bytes=int(total))
    except (FileNotFoundError, ValueError):
        # None, or one that a crash of the host left empty.
        raise ExecutionNotFoundError from None
    if record.total_bytes <= (kept or COMMANDS).head_bytes:
        # The mark is brought up to date only once the ring is in use.
        with contextlib.suppress(FileNotFoundError):
            record.total_bytes = (directory / f"{execution_id}.head").stat().st_size
    channels = Channels(f"{directory}/{execution_id}.channels")
    channels.refresh()
    record.stderr_bytes = channels.stderr_bytes(record.total_bytes)
    return record


def _recorded(text: str) -> ExecutionRecord:
    try:
        body = json.loads(text)
        # What a newer version wrote beside is passed over.
        return ExecutionRecord(**{name: value for name, value in body.items() if name in _FIELDS})
    except (ValueError, TypeError, AttributeError):
        # Cut short by a crash of the host: as good as none.
        raise ExecutionNotFoundError from None


def unfinished(directory: Path) -> list[UUID]:
    """Executions that were begun and have no record of their end; a record that has not got its name yet gets it. Damaged marks are passed over."""
    found = []
    for path in directory.glob("*.running"):
        with contextlib.suppress(ValueError, ExecutionNotFoundError):
            execution_id = UUID(path.stem)
            if _marked(directory, path.stem).ended:
                path.rename(path.with_suffix(".json"))
            else:
                found.append(execution_id)
    return found


def read_record(directory: Path, execution_id: UUID) -> ExecutionRecord:
    """The record of an execution, as far as it has come. Raises ExecutionNotFoundError."""
    try:
        text = (directory / f"{execution_id}.json").read_text()
    except FileNotFoundError:
        return _marked(directory, str(execution_id))
    except ValueError:
        raise ExecutionNotFoundError from None
    return _recorded(text)


def read_output(
    directory: Path, record: ExecutionRecord, offset: int, limit: int, *, kept: Kept | None = None
) -> OutputSlice:
    """At most `limit` bytes from `offset` on; an offset inside the gap is moved to its end."""
    total, kept = record.total_bytes, kept or COMMANDS
    tail_start = max(kept.head_bytes, total - kept.tail_bytes)
    gap = (kept.head_bytes, tail_start) if tail_start > kept.head_bytes else None
    stem = directory / record.execution_id
    if gap is not None and gap[0] <= offset < gap[1]:
        offset = gap[1]
    if offset >= total:
        return OutputSlice(total, b"", total, gap)
    data = b""
    with contextlib.suppress(FileNotFoundError):
        if offset < kept.head_bytes:
            with stem.with_suffix(".head").open("rb") as head:
                data = os.pread(head.fileno(), limit, offset)
        else:
            with stem.with_suffix(".tail").open("rb") as tail:
                at = (offset - kept.head_bytes) % kept.tail_bytes
                wanted = min(limit, total - offset)
                data = os.pread(tail.fileno(), min(wanted, kept.tail_bytes - at), at)
                if len(data) < wanted and at + len(data) == kept.tail_bytes:
                    data += os.pread(tail.fileno(), wanted - len(data), 0)
    return OutputSlice(offset, data, total, gap)
