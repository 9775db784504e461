"""Every machine of the host: which instance has which, how it gets one, and how it loses it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import structlog

from innkeeper.core.host_verbs import EnsureMachine, MachineShape, WarmPool
from innkeeper.core.instance import BootStep, InstanceState
from innkeeper.core.log_line import Severity
from innkeeper.errors import (
    InnkeeperError,
    InstanceFailedError,
    InstanceNotFoundError,
    MemoryUnusableError,
    NoHostError,
    NotFoundError,
    UnavailableError,
)
from innkeeper.host.admission import MIB, Admission, Load
from innkeeper.host.change_scanner import ChangeScanError
from innkeeper.host.departures import Departures
from innkeeper.host.directories import INSTANCE_FORMAT, INSTANCE_RECORD, Directories
from innkeeper.host.disks.checkpoint_store import Checkpoint, CheckpointStore
from innkeeper.host.disks.disk_pool import DiskPool
from innkeeper.host.disks.step_cache import StepCache
from innkeeper.host.disks.template_store import TemplateStore
from innkeeper.host.drivers.registry import DriverRegistry
from innkeeper.host.file_changes import FileChanges
from innkeeper.host.instance_locks import InstanceLocks
from innkeeper.host.instance_logs import InstanceLogs
from innkeeper.host.machine import Machine, write_json
from innkeeper.host.machine_builder import MachineBuilder, Origin, Steps
from innkeeper.host.metrics import CLAIMED, COLD, RESTARTED, HostMetrics
from innkeeper.host.suspensions import Suspensions
from innkeeper.host.templates import Templates
from innkeeper.host.usage import UsageLedger
from innkeeper.host.warm import WarmPools
from innkeeper.wire.frames import ProtocolError
from innkeeper.wire.link import Link

log = structlog.stdlib.get_logger(__name__)

# A guest for a pool takes 0.3 s of both cores to build: not while somebody waits for an answer.
QUIET_SECONDS = 0.2
# Between two lines about the links of one guest.
REDIAL_LOG_SECONDS = 10.0
OnStep = Callable[[BootStep], None]
OnFailure = Callable[[UUID, str], None]


class Fleet:
    """Owns the machines from ready to gone."""

    def __init__(
        self,
        *,
        directories: Directories,
        builder: MachineBuilder,
        admission: Admission,
        changes: FileChanges,
        steps: StepCache,
        checkpoints: CheckpointStore,
        suspensions: Suspensions,
        templates: TemplateStore,
        drivers: DriverRegistry,
        disks: DiskPool,
        max_starts: int,
        on_failure: OnFailure,
        on_pool_ready: Callable[[str], None],
        metrics: HostMetrics,
        usage: UsageLedger,
        logs: InstanceLogs,
    ) -> None:
        self._logs = logs
        self._metrics = metrics
        self._directories = directories
        self._builder = builder
        self._admission = admission
        self._changes = changes
        self._kept_steps = steps
        self._checkpoints = checkpoints
        self._suspensions = suspensions
        self._on_failure = on_failure
        self._by_instance: dict[UUID, Machine] = {}
        # Called with a machine that was used before: it may hold commands that nobody follows.
        self.resume: Callable[[Machine], None] = lambda _: None
        self._locks = InstanceLocks()
        self._starts = asyncio.Semaphore(max_starts)
        self._building_mb = 0
        self._waiting_cold = 0
        self._touched = 0.0
        self._departures = Departures(directories=directories, builder=builder, changes=changes, usage=usage)
        self.templates = Templates(
            store=templates,
            drivers=drivers,
            disks=disks,
            build=self._build_template,
            warm_up=builder.warm_up,
            discard=self._departures.discard,
        )
        self.warm = WarmPools(
            build=self._build_warm,
            discard=self._departures.discard,
            busy=lambda: self._waiting_cold > 0 or time.monotonic() - self._touched < QUIET_SECONDS,
            parallel=max_starts,
            on_ready=on_pool_ready,
            metrics=metrics,
        )

    # --- looking up ------------------------------------------------------------------------------------------------

    def machine(self, instance_id: UUID) -> Machine:
        """The instance's ready machine. Raises InstanceNotFoundError when it has none."""
        self._touched = time.monotonic()
        machine = self._by_instance.get(instance_id)
        if machine is None or machine.failure is not None or not machine.record.configured:
            raise InstanceNotFoundError
        return machine

    def __contains__(self, instance_id: UUID) -> bool:
        """Whether the instance has a machine."""
        return instance_id in self._by_instance

    @property
    def waiting_starts(self) -> int:
        """Cold starts that are under way or wait for their turn."""
        return self._waiting_cold

    @contextlib.asynccontextmanager
    async def held_still(self, instance_id: UUID) -> AsyncIterator[Machine | None]:
        """The instance's machine, or None, while no machine of it is made, taken away or on its way out."""
        async with self._locks.hold(instance_id):
            disk = self._directories.disk_of(instance_id)
            if disk is not None:
                await self._departures.gone(disk)
            yield self._by_instance.get(instance_id)

    def machines(self) -> list[Machine]:
        """The machines of instances."""
        return list(self._by_instance.values())

    def disks(self) -> list[UUID]:
        """Instances that have a disk here."""
        return self._directories.instance_ids()

    def held(self) -> set[Machine]:
        """Every machine of which something exists, those on their way down included."""
        return set(self._departures.held)

    def images_in_use(self) -> frozenset[str] | None:
        """Digests of the images below disks, machines and checkpoints; None when that is not known of each, and so no image may go."""
        in_use = {machine.record.shape.image_digest for machine in self._departures.held}
        try:
            in_use |= self._checkpoints.images()
        except UnavailableError:
            return None
        for instance_id in self.disks():
            try:
                digest = self._directories.image_of(instance_id)
            except UnavailableError:
                return None
            if digest is None:
                return None
            in_use.add(digest)
        return frozenset(in_use)

    def owned_disks(self) -> set[str]:
        """Names of the disks that instances and machines own. Raises UnavailableError when a record cannot be read."""
        return self._directories.owned_disks() | {machine.record.disk for machine in self._departures.held}

    def journals_of(self, machine: Machine) -> Path:
        """The folder of the journals of a machine's instance."""
        assert machine.record.instance_id is not None  # noqa: S101 - only instances run commands
        return self.journals(machine.record.instance_id)

    def journals(self, instance_id: UUID) -> Path:
        """The folder of an instance's journals."""
        return self._directories.instances / str(instance_id) / "journals"

    def terminals(self, machine: Machine) -> Path:
        """The folder of what is kept of the terminals of a machine's instance."""
        return self.journals_of(machine).parent / "terminals"

    def loads(self) -> list[Load]:
        """What admission counts."""
        loads = [
            Load(machine.record.shape.memory_mb, machine.frozen)
            for machine in (*self.machines(), *self.warm.machines())
        ]
        return [*loads, Load(self._building_mb + self.templates.held_bytes() // MIB, frozen=False)]

    # --- getting a machine -----------------------------------------------------------------------------------------

    async def ensure(self, request: EnsureMachine, on_step: OnStep, *, origin: Origin | None = None) -> dict[str, Any]:
        """See EnsureMachine. An instance that has nothing here yet begins with `origin`."""
        self._touched = time.monotonic()
        async with self._locks.hold(request.instance_id):
            machine = self._by_instance.get(request.instance_id)
            claimed = False
            if machine is None or machine.failure is not None:
                steps = Steps(on_step)
                if not request.bare:
                    self._logs.begin(request.instance_id)
                try:
                    new = self._directories.disk_of(request.instance_id) is None
                    machine, start = await self._obtain(request, steps, origin)
                except Exception as error:
                    known = error if isinstance(error, InnkeeperError) else InnkeeperError()
                    self._metrics.count_failed_start(known.code)
                    self._logs.note(request.instance_id, f"Not started: {known.message}", level=Severity.ERROR)
                    raise
                # First of all: from here on it is the instance's, whatever else fails.
                self._serve(machine, watch=not request.bare)
                claimed = start == CLAIMED
                machine.record.boot_trace = steps.trace
                steps.stamp_remaining()
                steps.stamp(InstanceState.READY)
                self._note_start(machine, new=new, restored=origin is not None)
                self._metrics.observe_start(steps.trace, start)
                if not claimed:
                    self.resume(machine)
            return {
                "boot_trace": [asdict(step) for step in machine.record.boot_trace],
                "isolation": asdict(machine.driver.isolation),
                "claimed": claimed,
                "woken": machine.woken,
            }

    def _note_start(self, machine: Machine, *, new: bool, restored: bool) -> None:
        assert machine.record.instance_id is not None  # noqa: S101 - bound before
        level, said = Severity.INFO, "Started on its disk"
        if new:
            said = "Created from a snapshot" if restored else "Created"
        elif machine.woken is not None:
            reason = machine.woken["reason"]
            said = "Resumed with its memory" if not reason else f"Resumed on its disk, its memory is lost: {reason}"
            level = Severity.WARNING if reason else level
        self._logs.note(machine.record.instance_id, said, level=level)

    async def _obtain(self, request: EnsureMachine, steps: Steps, origin: Origin | None) -> tuple[Machine, str]:
        disk = self._directories.disk_of(request.instance_id)
        if disk is not None:
            # It has begun before, and goes on with what it has.
            origin = None
        elif request.step_key is not None:
            kept = self._kept_steps.get(request.step_key)
            if kept.image_digest != request.shape.image_digest:
                raise NotFoundError("The step is kept on another image")
            origin = Origin(kept.path)
        if disk is None and origin is None and not request.bare:
            warm = self.warm.claim(request.shape)
            if warm is not None:
                try:
                    await self._bind(warm, request)
                except BaseException as error:
                    # The cancellation of a claim included: the guest is out of its pool, and nobody else would take it away.
                    self._abandon(warm, request.instance_id)
                    if not isinstance(error, (InnkeeperError, OSError, TimeoutError)):
                        raise
                    log.warning("a warm guest could not be claimed", machine=warm.id, error=str(error))
                else:
                    return warm, CLAIMED
        elif disk is not None:
            # Mounted twice, a disk shows the second mount what was there before the first one wrote back, and is ruined.
            await self._departures.gone(disk)
            memory = self._suspensions.find(request.instance_id)
            if memory is not None:
                return await self._wake(request, steps, disk, memory), RESTARTED
        return await self._start(request, steps, disk, origin), COLD if disk is None else RESTARTED

    async def _wake(self, request: EnsureMachine, steps: Steps, disk: str, kept: Checkpoint) -> Machine:
        """The machine of a suspended instance. What the host cannot do now is raised, and the instance stays suspended."""
        reason = ""
        try:
            origin = await self._suspensions.origin(kept, request.shape, disk)
            machine = await self._with_memory(request, steps, disk, origin)
            if machine is None:
                # Once more, from the same moment: a busy host may be all that it was.
                origin = await self._suspensions.origin(kept, request.shape, disk)
                machine = await self._with_memory(request, steps, disk, origin)
            if machine is None:
                reason = "The guest did not go on with its memory"
        except MemoryUnusableError as error:
            machine, reason = None, error.message
        if machine is None:
            log.warning("a suspended guest starts on its disk", instance_id=str(request.instance_id), reason=reason)
            # Before anything writes to the disk, which fits the memory no more then.
            await self._suspensions.drop(request.instance_id)
            machine = await self._start(request, steps, disk, None)
        else:
            await self._suspensions.drop(request.instance_id)
        machine.woken = {"with_memory": not reason, "reason": reason}
        return machine

    async def _with_memory(self, request: EnsureMachine, steps: Steps, disk: str, origin: Origin) -> Machine | None:
        """A machine that goes on with its memory, or None where that failed for another reason than that the host has no room.

        Raises MemoryUnusableError where another attempt would end alike.
        """
        try:
            return await self._start(request, steps, disk, origin)
        except MemoryUnusableError:
            await self._departures.gone(disk)
            raise
        except InnkeeperError as error:
            if isinstance(error, UnavailableError) and not isinstance(error, InstanceFailedError):
                raise
            log.warning("a guest did not go on with its memory", instance=str(request.instance_id), error=error.message)
            # What is left of it has the disk until it is gone.
            await self._departures.gone(disk)
            return None

    async def _start(self, request: EnsureMachine, steps: Steps, disk: str | None, origin: Origin | None) -> Machine:
        """A machine on the disk, or on one of its own, which is the instance's from now on."""
        self._waiting_cold += 1
        try:
            async with self._starts:
                hostname = self._directories.hostname_of(request.instance_id) or request.hostname
                machine = await self._build(
                    request.shape,
                    steps=steps,
                    hostname=hostname,
                    disk=disk,
                    origin=origin,
                    instance_id=request.instance_id,
                )
        finally:
            self._waiting_cold -= 1
        try:
            await self._bind(machine, request)
        except BaseException:
            if disk is None:
                self._abandon(machine, request.instance_id)
            else:
                self._departures.leave(machine)
            raise
        return machine

    async def _bind(self, machine: Machine, request: EnsureMachine) -> None:
        """Give a machine to an instance: records first, so that a crash at any point is cleaned or taken up, then its identity."""
        folder = self._directories.instances / str(request.instance_id)
        (folder / "journals").mkdir(mode=0o700, parents=True, exist_ok=True)
        self._changes.prepare(machine, request.instance_id)
        record = machine.record
        instance = {
            "format": INSTANCE_FORMAT,
            "disk": record.disk,
            "hostname": record.hostname,
            "image_digest": record.shape.image_digest,
        }
        write_json(folder / INSTANCE_RECORD, instance)
        self._departures.later(asyncio.to_thread(_sync, folder / INSTANCE_RECORD))
        machine.record.instance_id = request.instance_id
        machine.record.save_claim(machine.state_dir)
        async with machine.in_use():
            if await self._builder.configure(machine, request) and machine.has_baseline:
                self._changes.forget_baseline(machine)
        machine.record.save_configured(machine.state_dir)

    def _serve(self, machine: Machine, *, watch: bool) -> None:
        assert machine.record.instance_id is not None  # noqa: S101 - bound before
        self._by_instance[machine.record.instance_id] = machine
        if watch:
            self._departures.later(self._watch_changes(machine))

    async def _watch_changes(self, machine: Machine) -> None:
        """Have a baseline before the first command, which makes it itself when it is faster. In a thread: it takes up to 5 ms, and nobody waits for it."""
        await asyncio.to_thread(self._changes.watch, machine)
        if machine.failure is not None:
            self._changes.release(machine)
            return
        try:
            async with machine.in_use():
                await self._changes.ensure_baseline(machine)
        except (InnkeeperError, ChangeScanError) as error:
            # The first command tries again.
            log.warning("no baseline yet", machine=machine.id, error=str(error))

    async def _build(
        self,
        shape: MachineShape,
        *,
        steps: Steps,
        hostname: str | None = None,
        label: str = "room",
        disk: str | None = None,
        origin: Origin | None = None,
        instance_id: UUID | None = None,
        as_template: bool = False,
    ) -> Machine:
        self._admit(shape.memory_mb, for_instance=instance_id is not None or as_template)
        self._building_mb += shape.memory_mb
        try:
            begin = partial(
                self._builder.build,
                shape,
                steps=steps,
                hostname=hostname,
                label=label,
                disk=disk,
                instance_id=instance_id,
                as_template=as_template,
            )
            if disk is None and origin is None and not as_template:
                machine = await self.templates.start(shape, lambda origin: begin(origin=origin))
            else:
                machine = await begin(origin=origin)
        finally:
            self._building_mb -= shape.memory_mb
        self._watch(machine)
        return machine

    def _admit(self, memory_mb: int, *, for_instance: bool) -> None:
        while True:
            try:
                self._admission.check(memory_mb, self.loads())
            except NoHostError:
                # A guest that nobody has claimed must not keep one out that somebody wants.
                spare = self.warm.evict() if for_instance else None
                if spare is None:
                    raise
                self._departures.later(self._departures.discard(spare))
            else:
                return

    async def _build_template(self, shape: MachineShape) -> Machine:
        return await self._build(shape, steps=Steps(lambda _: None), label="template", as_template=True)

    async def _build_warm(self, pool: WarmPool) -> Machine:
        async with self._starts:
            machine = await self._build(pool.shape, steps=Steps(lambda _: None), label=pool.hostname)
        try:
            await self._builder.prime(machine, pool)
            machine.user_processes = 0
            await self._changes.prepare_ahead(machine)
            await machine.freeze()
        except BaseException:
            await self._departures.discard(machine)
            raise
        return machine

    # --- losing a machine ------------------------------------------------------------------------------------------

    def _watch(self, machine: Machine) -> None:
        """Notice the end of a machine and an agent that breaks the protocol."""
        self._departures.held.add(machine)
        links = itertools.count()
        told = [-REDIAL_LOG_SECONDS]

        def on_link(link: Link) -> None:
            again = next(links) > 0
            self._metrics.count_link(again=again)
            if again and machine.endpoint.last_error:
                # Whatever went on over the one before was broken off. Why, only the guest knows; one that dials without end does not fill the log.
                now = time.monotonic()
                if now - told[-1] > REDIAL_LOG_SECONDS:
                    told[-1] = now
                    log.warning("a guest's link had broken", machine=machine.id, guest_says=machine.endpoint.last_error)
            link.closed.add_done_callback(lambda closed: self._link_closed(machine, closed.result()))

        machine.endpoint.on_link(on_link)
        machine.when_failed = lambda reason: self._failed(machine, reason)
        machine.endpoint.on_failure(machine.fail)
        machine.running.exited.add_done_callback(lambda _: machine.fail(machine.running.why()))

    def _link_closed(self, machine: Machine, reason: BaseException | None) -> None:
        if isinstance(reason, ProtocolError):
            machine.fail(f"The guest agent broke the protocol: {reason}")

    def _failed(self, machine: Machine, reason: str) -> None:
        self._metrics.count_machine_failure()
        self.warm.forget(machine)
        instance_id = machine.record.instance_id
        if instance_id is not None and self._by_instance.get(instance_id) is machine:
            del self._by_instance[instance_id]
            self._logs.note(instance_id, f"Failed: {reason}", level=Severity.ERROR)
            self._on_failure(instance_id, reason)
        self._departures.leave(machine)

    async def destroy(self, instance_id: UUID, *, keep_disk: bool) -> None:
        """See DestroyMachine."""
        async with self._locks.hold(instance_id):
            machine = self._by_instance.pop(instance_id, None)
            ran = machine is not None
            if machine is None:
                # One that failed, or whose end did not succeed before.
                machine = next((held for held in self._departures.held if held.record.instance_id == instance_id), None)
            disk = None
            suspended = not keep_disk and self._suspensions.find(instance_id) is not None
            if not keep_disk:
                with contextlib.suppress(InnkeeperError):
                    disk = self._directories.disk_of(instance_id)
                self._departures.trash(instance_id, log_too=True)
                self._logs.forget(instance_id)
            if machine is not None:
                await self._departures.end(machine)
                if ran:
                    self._logs.note(instance_id, "Stopped")
            elif disk is not None:
                self._departures.later(self._departures.remove_disk(disk))
            if suspended:
                self._departures.later(self._suspensions.drop(instance_id))
            if not keep_disk:
                self._departures.empty_trash()

    async def suspend(self, machine: Machine) -> None:
        """End a machine whose memory is kept, and which stands still: what ran in it is followed again when the instance goes on."""
        assert machine.record.instance_id is not None  # noqa: S101 - only instances are suspended
        self._by_instance.pop(machine.record.instance_id, None)
        machine.suspended = True
        # Before it is told to end: what is followed now is not lost.
        await machine.close(stop=False)
        await self._departures.end(machine)
        self._logs.note(machine.record.instance_id, "Suspended, its memory is kept")
        self._departures.later(self._suspensions.seal(machine.record.instance_id))

    def _abandon(self, machine: Machine, instance_id: UUID) -> None:
        """Give up a machine whose instance has nothing else yet, with the records that name its disk."""
        try:
            self._departures.trash(instance_id, log_too=False)
        finally:
            self._departures.leave(machine)
            # A guest that ended while it was claimed has left its disk to the instance that was to have it.
            self._departures.later(self._departures.remove_disk(machine.record.disk))
            self._departures.empty_trash()

    # --- start and end of the daemon -------------------------------------------------------------------------------

    def adopt(self, machine: Machine) -> None:
        """Take over a machine that an earlier daemon started."""
        self._watch(machine)
        if machine.record.instance_id is None:
            self.warm.adopt(machine)
        else:
            self._by_instance[machine.record.instance_id] = machine
            self._changes.watch(machine)
            self.resume(machine)

    async def close(self, *, keep_running: bool) -> None:
        """Let go of every machine (they run on), or take all away."""
        await self.templates.close()
        everything = [*self.machines(), *self.warm.machines()]
        if keep_running:
            await asyncio.gather(*(machine.close(stop=False) for machine in everything))
        else:
            await asyncio.gather(*(self._departures.discard(machine) for machine in everything))
        await self._departures.settle()


def _sync(path: Path) -> None:
    """Have a record and its name survive a loss of power. What is gone meanwhile needs no syncing."""
    for name in (path, path.parent, path.parent.parent):
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
