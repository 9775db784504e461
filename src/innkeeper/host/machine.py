"""A machine as the daemon holds it: its records on disk, its link, and the freezing of idle ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import structlog

from innkeeper.core.host_verbs import MachineShape
from innkeeper.core.instance import BootStep
from innkeeper.errors import ConflictError, InnkeeperError, InstanceFailedError, UnavailableError
from innkeeper.host.disks.disk_health import has_stopped
from innkeeper.host.drivers.contract import Driver, RunningMachine
from innkeeper.host.guest_link import GuestEndpoint
from innkeeper.host.journal import Journal
from innkeeper.host.kept_executions import Headroom
from innkeeper.host.output_pace import OutputPace
from innkeeper.host.volume_attachment import Attachment

if TYPE_CHECKING:
    from innkeeper.host.terminal import Terminal

log = structlog.stdlib.get_logger(__name__)

# Of the records on disk. Raised when a field changes its meaning; a new field has a default, and one that is not known is passed over, so neither needs
# it. Records from before the number was written mean what format 1 means.
FORMAT = 1
RECORD = "machine.json"
CLAIM = "claim.json"
CONFIGURED = "configured"
PRIMED = "primed"
# There while the guest is held still for a checkpoint: a daemon that finds it lets the guest go on.
HELD_STILL = "held-still"
# How often an idle guest that still runs user processes is asked whether they have ended.
RECHECK_SECONDS = 5.0
# How long a guest's own clock is relied on: processors' counters differ from the time by up to 0.1 ms in each second.
CLOCK_SECONDS = 60.0
CLOCK_TIMEOUT_SECONDS = 5.0
# Files of one guest that are read and written at the same time: each holds up to 1 MiB here while its client, or its guest, takes its time.
TRANSFERS = 16
TRANSFER_WAIT_SECONDS = 30.0


@dataclass(slots=True)
class MachineRecord:
    """What survives a restart of the daemon: enough to adopt the machine or to clean it away.

    One file each, since a claim must not wait for the disk: ext4 flushes a file that is renamed over another one (up to 20 ms measured), but not one that
    takes a new name.
    """

    machine_id: str
    shape: MachineShape
    driver: str
    disk: str
    slot_index: int
    hostname: str
    # The folder of the agent that it runs; "" of a machine from before it was written down.
    agent: str = ""
    # What its memory depends on, as of its start: the host's programs may be others by the time that it is saved.
    memory_needs: dict[str, str] = field(default_factory=dict)
    instance_id: UUID | None = None
    # When the instance got it, in Unix seconds: what it holds is the instance's from then on.
    claimed_at: float | None = None
    configured: bool = False
    primed: bool = False
    boot_trace: list[BootStep] = field(default_factory=list)
    # What it used is on record: whatever is read of its control group from here on is of a group that goes.
    ended: bool = False

    def save(self, state_dir: Path) -> None:
        """Write what is known when the machine is built."""
        body = {name: value for name, value in asdict(self).items() if name in _BUILT}
        write_json(state_dir / RECORD, {"format": FORMAT, **body})

    def save_claim(self, state_dir: Path) -> None:
        """Write whose machine it is from now on."""
        self.claimed_at = time.time()
        write_json(state_dir / CLAIM, {"instance_id": str(self.instance_id), "at": self.claimed_at})

    def save_configured(self, state_dir: Path) -> None:
        """Note that the claim was carried out."""
        self.configured = True
        (state_dir / CONFIGURED).touch()

    def save_primed(self, state_dir: Path) -> None:
        """Note that it came up as far as a pool wants its guests."""
        self.primed = True
        (state_dir / PRIMED).touch()


_SHAPE = frozenset(one.name for one in fields(MachineShape))
_BUILT = frozenset({"machine_id", "shape", "driver", "disk", "slot_index", "hostname", "agent", "memory_needs"})


def load_machine_record(state_dir: Path) -> MachineRecord | None:
    """The record of a machine, of this or an earlier version, or None where there is none that can be read."""
    try:
        body = json.loads((state_dir / RECORD).read_text())
        if body.get("format", FORMAT) > FORMAT:
            log.warning("a machine's record is of a newer version of the server", machine=state_dir.name)
            return None
        known: dict[str, Any] = {name: value for name, value in body["shape"].items() if name in _SHAPE}
        # JSON has no tuples.
        lists: dict[str, Any] = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        shape = MachineShape(**{**known, **lists})
        record = MachineRecord(**{**{name: value for name, value in body.items() if name in _BUILT}, "shape": shape})
        with contextlib.suppress(FileNotFoundError):
            claim = json.loads((state_dir / CLAIM).read_text())
            record.instance_id = UUID(str(claim["instance_id"]))
            # Not written before usage was counted; the file is as old as the claim.
            record.claimed_at = float(claim.get("at", (state_dir / CLAIM).stat().st_mtime))
        record.configured = (state_dir / CONFIGURED).exists()
        record.primed = (state_dir / PRIMED).exists()
        return record
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write_json(path: Path, body: dict[str, Any]) -> None:
    """Write a small JSON file, replacing it as a whole."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(body))
    temporary.replace(path)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a command runs as, where, and with which variables."""

    user: str
    workdir: str | None
    env: dict[str, str] = field(repr=False)


@dataclass(slots=True, eq=False)
class Machine:
    """A running machine. `upper` and `lowers` are what the host's change scanner reads; there is no `upper` where the guest alone has its disk mounted."""

    record: MachineRecord
    state_dir: Path
    driver: Driver
    running: RunningMachine
    endpoint: GuestEndpoint
    upper: Path | None
    lowers: tuple[Path, ...]
    resources: AsyncExitStack
    freeze_after_seconds: float
    frozen: bool = False
    uses: int = 0
    watches: int = 0
    user_processes: int = 0
    last_used: float = field(default_factory=time.monotonic)
    # By the monotonic clock; unknown of a machine that an earlier daemon started.
    clock_set_at: float = -math.inf
    failure: str | None = None
    # Whether it went on from a checkpoint, which others may have gone on from, too.
    restored: bool = False
    # Begun as a clone of a template, in whose memory is what the guests of pools run ahead.
    cloned: bool = False
    # Of an instance that was suspended: whether it goes on with its memory, and why not.
    woken: dict[str, Any] | None = None
    # Whether its memory is kept: what runs in it goes on with the instance's next machine.
    suspended: bool = False
    when_failed: Callable[[str], None] = lambda _: None
    # User, workdir and env that the guest was given ahead; None when that is not known (adopted from an earlier daemon).
    primed: Identity | None = None
    scan_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    has_baseline: bool = False
    journals: dict[str, Journal] = field(default_factory=dict)
    # By name: those that run, and the last ones that ended.
    terminals: dict[str, Terminal] = field(default_factory=dict)
    volumes: dict[UUID, Attachment] = field(default_factory=dict)
    output_pace: OutputPace = field(default_factory=OutputPace)
    headroom: Headroom = field(default_factory=Headroom)
    _transfers: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(TRANSFERS))
    _freeze_timer: asyncio.TimerHandle | None = None
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    _switching: asyncio.Lock = field(default_factory=asyncio.Lock)
    _closing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def id(self) -> str:
        """The machine's id, never used twice."""
        return self.record.machine_id

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last use; 0 while it is in use."""
        return 0.0 if self.uses else time.monotonic() - self.last_used

    def start_task(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run work that belongs to the machine: it is cancelled and awaited when the machine goes."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[None]:
        """Keep the machine thawed for the block. Raises InstanceFailedError when it has failed."""
        self.uses += 1
        if self._freeze_timer is not None:
            self._freeze_timer.cancel()
            self._freeze_timer = None
        try:
            self.check_disk()
            if self.failure is not None:
                raise InstanceFailedError(self.failure)
            if self.frozen or self._switching.locked():
                await self.thaw()
            yield
        finally:
            self.uses -= 1
            self.last_used = time.monotonic()
            if self.uses == 0:
                self._schedule_freeze(self.freeze_after_seconds)

    @asynccontextmanager
    async def transferring(self) -> AsyncIterator[None]:
        """`in_use`, as one of the few transfers of a file. Raises UnavailableError when the others leave no turn for too long."""
        try:
            async with asyncio.timeout(TRANSFER_WAIT_SECONDS):
                await self._transfers.acquire()
        except TimeoutError:
            raise UnavailableError(
                f"{TRANSFERS} files of this instance are being transferred already; try again later"
            ) from None
        try:
            async with self.in_use():
                yield
        finally:
            self._transfers.release()

    @asynccontextmanager
    async def without_transfers(self, *, timeout_seconds: float) -> AsyncIterator[None]:
        """Keep transfers of files from beginning for the block. Raises ConflictError when those under way go on for too long."""
        async with AsyncExitStack() as turns:
            try:
                async with asyncio.timeout(timeout_seconds):
                    for _ in range(TRANSFERS):
                        await turns.enter_async_context(self._transfers)
            except TimeoutError:
                raise ConflictError("Files of the instance are being transferred; try again later") from None
            yield

    def _schedule_freeze(self, delay: float) -> None:
        if self.failure is None and self.driver.capabilities.freeze:
            loop = asyncio.get_running_loop()
            self._freeze_timer = loop.call_later(delay, lambda: self.start_task(self._freeze_if_quiet()))

    async def _freeze_if_quiet(self) -> None:
        self._freeze_timer = None
        if self.uses or self.frozen or self.failure is not None:
            return
        if self.user_processes:
            try:
                answer = await self.endpoint.request("processes", {}, timeout_seconds=5)
                found = answer.get("user_processes")
            except InnkeeperError:
                found = None
            if self.uses or self._freeze_timer is not None:
                # Used meanwhile: the answer is older than what that use knows, and its end has set a timer.
                return
            self.user_processes = found if isinstance(found, int) else 1
            if self.user_processes:
                self._mind_clock()
                self._schedule_freeze(RECHECK_SECONDS)
                return
        await self.freeze()

    async def freeze(self) -> None:
        """Take the processor time away, unless somebody uses the machine meanwhile."""
        async with self._switching:
            if self.uses or self.frozen or self.failure is not None:
                return
            try:
                await self.driver.freeze(self.id)
            except (OSError, TimeoutError) as error:
                self.driver.thaw(self.id)
                log.warning("freeze failed", machine=self.id, error=str(error))
                return
            self.frozen = True

    async def thaw(self) -> None:
        """Give the processor time back."""
        async with self._switching:
            if self.frozen:
                self.driver.thaw(self.id)
                self.frozen = False
        self._mind_clock()

    async def set_clock(self, *, timeout_seconds: float) -> None:
        """Tell the guest the time. Raises GuestError, LinkLostError."""
        self.clock_set_at = time.monotonic()
        told = {"time_unix_ns": time.time_ns()}
        await self.endpoint.request("configure", told, timeout_seconds=timeout_seconds)

    def _mind_clock(self) -> None:
        """Have a clock of the guest's own set beside what goes on, unless that was done lately: it counts the processor's ticks, and nobody adjusts it."""
        if self.driver.needs.clock and time.monotonic() - self.clock_set_at > CLOCK_SECONDS:
            self.start_task(self.correct_clock())

    async def correct_clock(self) -> None:
        """Have a clock of the guest's own set. A guest that does not listen has the wrong time, and nothing else."""
        with contextlib.suppress(InnkeeperError):
            await self.set_clock(timeout_seconds=CLOCK_TIMEOUT_SECONDS)

    def check_disk(self) -> None:
        """Fail where the guest's disk has become read-only: the kernel does that after a write failed, for the host's disk being full above all.

        Only a new mount, which goes through the journal, makes it writable again; the next start does that.
        """
        if self.upper is not None and has_stopped(self.upper):
            self.fail("The host could not write the instance's disk")

    def fail(self, reason: str) -> None:
        """Record why the machine is of no use any more, once; its owner then takes it away."""
        if self.failure is None:
            self.failure = reason
            log.warning("machine failed", machine=self.id, reason=reason)
            self.when_failed(reason)

    async def close(self, *, stop: bool) -> None:
        """End the machine's own tasks and release everything; without `stop` the guest runs on for the next daemon to adopt."""
        while others := [task for task in self._tasks if task is not asyncio.current_task()]:
            for task in others:
                task.cancel()
            await asyncio.wait(others)
        # After them: the end of a use sets it, and a guest must not be frozen by one who has let go of it.
        if self._freeze_timer is not None:
            self._freeze_timer.cancel()
            self._freeze_timer = None
        for journal in self.journals.values():
            journal.close()
        if stop:
            # Two that end it at once would take turns at the stack, and unmount a disk below a guest that still runs.
            async with self._closing:
                await self.resources.aclose()
        else:
            with contextlib.suppress(OSError):
                await self.endpoint.close(remove=False)
