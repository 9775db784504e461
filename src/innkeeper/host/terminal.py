"""One terminal: a program on a pseudo terminal of a guest, what is kept of its output, and those who look at it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from innkeeper.bus.contract import ServerCall
from innkeeper.core.terminal_verbs import SIZE_RANGE
from innkeeper.errors import InnkeeperError, InstanceFailedError
from innkeeper.host.guest_program import GuestProgram
from innkeeper.host.journal import ExecutionRecord, Journal, Kept, read_output
from innkeeper.host.machine import Machine
from innkeeper.wire.stream import Data, Message

# Of a terminal's output the end is kept, for those who look again; on disk, so that idle terminals cost no memory.
SCROLLBACK = Kept(0, 1_048_576)
SUFFIX = ".terminal"
READ_STEP = 65_536
# A program is made to wait while whoever reads fastest is this far behind: what is lost in between is lost for all. The others skip.
WINDOW = 262_144
# It waits for someone who takes next to nothing no longer than this.
PATIENCE_SECONDS = 1.0
LEAST_PROGRESS = 16_384
# The agent looks through the guest's processes for each change of size, and a window that is dragged changes dozens of times a second.
RESIZE_PAUSE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Size:
    """Of a window, in characters."""

    cols: int
    rows: int


@dataclass(slots=True, eq=False)
class Viewer:
    """Someone who looks at a terminal: how far they have come, and a flag that says when there is more."""

    offset: int
    more: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True, eq=False)
class Terminal:
    """A terminal that runs, or ended not long ago."""

    id: UUID
    name: str
    label: str
    size: Size
    machine: Machine
    directory: Path
    program: GuestProgram
    viewers: set[Viewer] = field(default_factory=set)
    failure: InnkeeperError | None = None
    # The size that the guest knows of.
    told: Size | None = None
    # Nothing from before it is there: the guest dropped it while nobody listened.
    floor: int = 0
    over: asyncio.Event = field(default_factory=asyncio.Event)
    _taken: asyncio.Event = field(default_factory=asyncio.Event)
    _taken_bytes: int = 0
    # What had been taken when the program stopped to wait for its viewers; None while it does wait.
    _gave_up_at: int | None = None
    _typing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _resizing: asyncio.Task[None] | None = None

    @property
    def journal(self) -> Journal:
        """What is kept of its output."""
        return self.program.journal

    @property
    def record(self) -> ExecutionRecord:
        """What is kept beside the output."""
        return self.journal.record

    @property
    def alive(self) -> bool:
        """Whether its program runs."""
        return not self.record.ended

    def row(self) -> dict[str, Any]:
        """What a client sees of it."""
        return {
            "id": self.name,
            "alive": self.alive,
            "exit_code": self.record.exit_code,
            "cols": self.size.cols,
            "rows": self.size.rows,
            "label": self.label,
            "started_at": self.record.started_at,
            "viewers": len(self.viewers),
            "offset": self.record.total_bytes,
        }

    # --- its files -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write what a later daemon needs to know beside the journal."""
        # Always of the same length, so that it can be written over in place: a file that takes the place of another one may wait for the disk.
        size = f'"cols": {self.size.cols:5}, "rows": {self.size.rows:5}'
        body = f'{{"name": {json.dumps(self.name)}, {size}, "label": {json.dumps(self.label)}}}'
        descriptor = os.open(self.directory / f"{self.id}{SUFFIX}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, body.encode())
        finally:
            os.close(descriptor)

    @classmethod
    def load(cls, path: Path, machine: Machine) -> Terminal | None:
        """The terminal that an earlier daemon left, or None where its files make no sense."""
        try:
            body = json.loads(path.read_text())
            terminal_id = UUID(path.stem)
            size = Size(int(body["cols"]), int(body["rows"]))
            name, label = str(body["name"]), str(body["label"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        program = GuestProgram(machine, str(terminal_id), Journal(path.parent, terminal_id, kept=SCROLLBACK))
        return cls(terminal_id, name, label, size, machine, path.parent, program)

    def remove(self) -> None:
        """Drop its files."""
        self.journal.close()
        for path in self.directory.glob(f"{self.id}.*"):
            path.unlink(missing_ok=True)

    # --- what the program says --------------------------------------------------------------------------------------

    def heard(self, data: Data) -> None:
        """Keep output and let the viewers know. Raises OSError when the host's disk is full."""
        self.journal.write(data.data)
        for viewer in self.viewers:
            viewer.more.set()

    def skip_to(self, offset: int) -> None:
        """Go on at a later offset: the guest dropped what was in between."""
        before = self.record.total_bytes
        self.journal.skip_to(offset)
        # As far as the journal believed it.
        if self.record.total_bytes > before:
            self.floor = self.record.total_bytes

    def lag(self) -> int:
        """How far whoever reads fastest is behind; 0 without viewers."""
        return min((self.record.total_bytes - viewer.offset for viewer in self.viewers), default=0)

    def has_patience(self) -> bool:
        """Whether the program is to wait now until a viewer has caught up."""
        if self.lag() < WINDOW:
            self._gave_up_at = None
            return False
        if self._gave_up_at is not None and self._taken_bytes - self._gave_up_at >= WINDOW:
            # Somebody reads again.
            self._gave_up_at = None
        return self._gave_up_at is None

    async def wait_for_viewers(self) -> None:
        """Let the fastest viewer catch up, as long as it takes something."""
        before = self._taken_bytes
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while self.lag() >= WINDOW:
                    self._taken.clear()
                    await self._taken.wait()
        except TimeoutError:
            if self._taken_bytes - before < LEAST_PROGRESS:
                self._gave_up_at = self._taken_bytes

    def ended(self, failure: InnkeeperError | None = None) -> None:
        """No more comes: the record is left, and everybody who looks is told."""
        self.failure = failure
        self.record.ended = True
        if failure is not None:
            self.record.lost = failure.message
        with contextlib.suppress(OSError):
            self.journal.finish()
        self.journal.close()
        self.over.set()
        for viewer in self.viewers:
            viewer.more.set()

    def put_off(self, failure: InnkeeperError) -> None:
        """It goes on with the instance's next machine: everybody who looks is told, and nothing of it is over."""
        self.failure = failure
        for viewer in self.viewers:
            viewer.more.set()

    # --- those who look ----------------------------------------------------------------------------------------------

    async def show(self, viewer: Viewer, call: ServerCall) -> dict[str, Any]:
        """Send output as it comes until the program has ended; see AttachTerminal. What a viewer is too slow for it does not get."""
        announced = False
        while True:
            viewer.more.clear()
            ended = not self.alive or self.failure is not None
            offset = min(max(viewer.offset, self.floor), self.record.total_bytes)
            piece = read_output(self.directory, self.record, offset, READ_STEP, kept=SCROLLBACK)
            if not announced or piece.offset != viewer.offset:
                announced = True
                viewer.offset = piece.offset
                await call.send_message({"offset": piece.offset})
            if piece.data:
                await call.send_data(piece.data)
                viewer.offset += len(piece.data)
                self.took(len(piece.data))
            elif ended:
                return {"exit_code": self._exit_code()}
            else:
                await viewer.more.wait()

    def _exit_code(self) -> int:
        if self.failure is not None:
            raise self.failure
        if self.record.exit_code is None:
            raise InstanceFailedError(self.record.lost)
        return self.record.exit_code

    def took(self, size: int) -> None:
        """A viewer has taken bytes, or is gone."""
        self._taken_bytes += size
        self._taken.set()

    async def obey(self, call: ServerCall) -> None:
        """Pass on what a viewer types and how large its window is, until it says no more."""
        async for event in call.events():
            if isinstance(event, Data):
                await self._type(event.data)
            elif isinstance(event, Message) and (size := size_of(event.body.get("resize"))) is not None:
                self.resize(size)

    async def _type(self, data: bytes) -> None:
        # One at a time: what two type at once may mix, but never within what one of them sent as a piece.
        async with self._typing:
            await self.program.write(data)

    def resize(self, size: Size) -> None:
        """Tell the program its new size: at once, or after a pause the last one of those that came meanwhile."""
        self.size = size
        if self.alive and self._resizing is None:
            self._resizing = self.machine.start_task(self._send_size())

    def relinked(self) -> None:
        """A new link carries it: whether the guest heard over the one before what was said last is not known."""
        self.told = None
        self.resize(self.size)

    async def _send_size(self) -> None:
        try:
            while self.alive and self.told != self.size and self.program.linked:
                self.told = self.size
                await self.program.tell({"resize": {"rows": self.size.rows, "cols": self.size.cols}})
                with contextlib.suppress(OSError):
                    self.save()
                await asyncio.sleep(RESIZE_PAUSE_SECONDS)
        finally:
            self._resizing = None


def size_of(body: object) -> Size | None:
    """The size that came as JSON, or None where it is none."""
    low, high = SIZE_RANGE
    cols, rows = (body.get("cols"), body.get("rows")) if isinstance(body, dict) else (None, None)
    if type(cols) is int and type(rows) is int and low <= cols <= high and low <= rows <= high:
        return Size(cols, rows)
    return None
