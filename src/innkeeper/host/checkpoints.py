"""Checkpoints of machines: taken while the guest goes on, restored as other machines, and forks, which are both at once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import structlog

from innkeeper.bus.contract import Handler, ServerCall
from innkeeper.core import checkpoint_verbs as verbs
from innkeeper.core.host_verbs import EnsureMachine, MachineShape
from innkeeper.errors import (
    CheckpointDamagedError,
    CheckpointFailedError,
    CheckpointNotFoundError,
    ConflictError,
    GuestError,
    InnkeeperError,
    InstanceFailedError,
    InstanceNotFoundError,
    InvalidRequestError,
    LinkLostError,
    MemoryUnusableError,
    NotHereError,
    UnavailableError,
)
from innkeeper.host.completion import to_its_end
from innkeeper.host.directories import Directories
from innkeeper.host.disks.checkpoint_store import (
    DISK,
    MEMORY,
    Checkpoint,
    CheckpointStore,
    SavedMemory,
    boot_id,
    saved_files,
    written_files,
)
from innkeeper.host.disks.disk_pool import MIB, DiskPool
from innkeeper.host.disks.disk_template import reflink
from innkeeper.host.drivers.contract import checkpointing
from innkeeper.host.drivers.registry import DriverRegistry
from innkeeper.host.fleet import Fleet
from innkeeper.host.machine import HELD_STILL, Machine, MachineRecord
from innkeeper.host.machine_builder import Origin
from innkeeper.host.still_disk import kept_written, still_disk, write_back
from innkeeper.host.suspensions import Suspensions, copy_moment
from innkeeper.host.verbs import bind_handler

log = structlog.stdlib.get_logger(__name__)

Told = Callable[[dict[str, Any]], None]
OnStep = Callable[[str], None]
EndsIt = Callable[[Machine], Awaitable[None]]
TRANSFER_SECONDS = 10.0
QUIET_SECONDS = 10.0
LINK_SECONDS = 30.0
STANDS_STILL = "The guest did not go on after a checkpoint"


@dataclass(slots=True)
class Stillness:
    """How long a guest did not answer, and how long its programs stood still, in milliseconds; upper bounds."""

    downtime_ms: float = 0.0
    paused_ms: float = 0.0


class Clock:
    """Tells of steps as they are reached: `{"step", "at_ms"}`."""

    def __init__(self, tell: Told) -> None:
        self._began = time.monotonic()
        self._tell = tell

    def __call__(self, step: str) -> None:
        """Tell of one."""
        self._tell({"step": step, "at_ms": round((time.monotonic() - self._began) * 1000, 3)})


class Checkpoints:
    """Serves the verbs of `core.checkpoint_verbs`."""

    def __init__(
        self,
        *,
        directories: Directories,
        fleet: Fleet,
        drivers: DriverRegistry,
        disks: DiskPool,
        store: CheckpointStore,
        suspensions: Suspensions,
        agents: Path,
        disk_reserve_mb: int,
    ) -> None:
        self._directories = directories
        self._fleet = fleet
        self._drivers = drivers
        self._disks = disks
        self._store = store
        self._suspensions = suspensions
        self._agents = agents
        self._reserve_bytes = disk_reserve_mb * MIB
        self._digests = asyncio.Semaphore(1)

    def handlers(self) -> Mapping[str, Handler]:
        """Handlers by verb."""
        return {
            verbs.TakeCheckpoint.verb: bind_handler(verbs.TakeCheckpoint, self._take),
            verbs.SnapshotDisk.verb: bind_handler(verbs.SnapshotDisk, self._snapshot),
            verbs.RestoreCheckpoint.verb: bind_handler(verbs.RestoreCheckpoint, self._restore),
            verbs.ForkMachine.verb: bind_handler(verbs.ForkMachine, self._fork),
            verbs.SuspendMachine.verb: bind_handler(verbs.SuspendMachine, self._suspend),
            verbs.DropCheckpoint.verb: bind_handler(verbs.DropCheckpoint, self._drop),
            verbs.ListCheckpoints.verb: bind_handler(verbs.ListCheckpoints, self._list),
            verbs.MeasureCheckpoints.verb: bind_handler(verbs.MeasureCheckpoints, self._measure),
            verbs.DigestCheckpoint.verb: bind_handler(verbs.DigestCheckpoint, self._digest),
        }

    # --- the verbs -------------------------------------------------------------------------------------------------

    async def _take(self, request: verbs.TakeCheckpoint, call: ServerCall) -> dict[str, Any]:
        known = self._known(request.checkpoint_id, request.instance_id)
        if known is not None:
            return described(known)
        async with _telling(call) as tell:
            with self._store.draft() as draft:
                asleep = await self._of_suspended(request.instance_id, draft, request.checkpoint_id)
                checkpoint, stillness = asleep or await self.capture(
                    request.instance_id, draft, checkpoint_id=request.checkpoint_id, on_step=Clock(tell)
                )
                made = await to_its_end(asyncio.to_thread(self._store.publish, draft, checkpoint))
        return {**described(made), "downtime_ms": stillness.downtime_ms, "paused_ms": stillness.paused_ms}

    async def _snapshot(self, request: verbs.SnapshotDisk, call: ServerCall) -> dict[str, Any]:
        known = self._known(request.checkpoint_id, request.instance_id)
        if known is not None:
            return described(known)
        with self._store.draft() as draft:
            checkpoint, stillness, whole = await self._copy_only(request, draft)
            made = await to_its_end(asyncio.to_thread(self._store.publish, draft, checkpoint))
        return {
            **described(made),
            "downtime_ms": stillness.downtime_ms,
            "paused_ms": stillness.paused_ms,
            "whole": whole,
        }

    async def _restore(self, request: verbs.RestoreCheckpoint, call: ServerCall) -> dict[str, Any]:
        async with _telling(call) as tell:
            with self._store.reading(request.checkpoint_id) as checkpoint:
                origin = await self._origin(checkpoint, request.machine.shape, disk_only=request.disk_only)
                return await self._begin(request.machine, origin, tell)

    async def _fork(self, request: verbs.ForkMachine, call: ServerCall) -> dict[str, Any]:
        if request.machine.instance_id == request.instance_id or self._directories.disk_of(request.machine.instance_id):
            raise ConflictError("machine.instance_id: there is such an instance already")
        async with _telling(call) as tell:
            with self._store.draft() as draft:
                checkpoint, stillness = await self.capture(
                    request.instance_id, draft, checkpoint_id=uuid4(), on_step=Clock(tell)
                )
                # What was written a moment ago fits this host, and is whole.
                answer = await self._begin(request.machine, _with_memory(checkpoint, request.machine.shape), tell)
        return {**answer, "downtime_ms": stillness.downtime_ms, "paused_ms": stillness.paused_ms}

    async def _suspend(self, request: verbs.SuspendMachine, call: ServerCall) -> dict[str, Any]:
        kept, store = self._suspensions.find(request.instance_id), self._suspensions.store
        if kept is not None and kept.memory is not None and request.instance_id not in self._fleet:
            return {"memory_bytes": kept.memory.size_bytes}
        # Of a moment that the guest has left long ago.
        await self._suspensions.drop(request.instance_id)
        size = 0

        async def end(machine: Machine) -> None:
            """The last thing that is done while the guest stands still. From the publication on it is suspended, whoever is killed."""
            nonlocal size
            disk, driver = self._disks.disk_path(machine.record.disk), machine.driver
            mounted = None if driver.needs.disk_files else self._directories.mounts / machine.id / "disk"
            # Memory that is there after a loss of power must not be newer than its disk.
            await asyncio.to_thread(write_back, mounted, disk)
            # Its checksums are made once it has ended, beside what goes on.
            memory = _saved_memory(machine.record, draft, sealed=False)
            digest = machine.record.shape.image_digest
            checkpoint = _checkpoint(request.instance_id, request.instance_id, digest, disk, draft)
            checkpoint = replace(checkpoint, memory=memory)
            await asyncio.to_thread(store.publish, draft, checkpoint, durable=False)
            size = memory.size_bytes
            try:
                await self._fleet.suspend(machine)
            except BaseException:
                # It may go on from here.
                await self._suspensions.drop(request.instance_id)
                raise

        async with _telling(call) as tell:
            with store.draft() as draft:
                on_step = Clock(tell)
                await self._still(request.instance_id, draft, on_step=on_step, end=end)
                on_step("kept")
        return {"memory_bytes": size}

    async def _drop(self, request: verbs.DropCheckpoint, call: ServerCall) -> dict[str, Any]:
        await to_its_end(asyncio.to_thread(self._store.drop, request.checkpoint_id))
        return {}

    async def _list(self, request: verbs.ListCheckpoints, call: ServerCall) -> dict[str, Any]:
        return {"checkpoints": [described(one) for one in await asyncio.to_thread(self._store.all)]}

    async def _measure(self, request: verbs.MeasureCheckpoints, call: ServerCall) -> dict[str, Any]:
        sizes = await asyncio.to_thread(self._store.own_bytes, request.checkpoint_ids)
        return {"own_bytes": {str(checkpoint_id): size for checkpoint_id, size in sizes.items()}}

    async def _digest(self, request: verbs.DigestCheckpoint, call: ServerCall) -> dict[str, Any]:
        # One at a time: each keeps a core and the disk busy.
        async with self._digests:
            # Whoever drops it need not wait for this.
            checkpoint = self._store.get(request.checkpoint_id)
            try:
                return {"disk_digest": await to_its_end(asyncio.to_thread(checkpoint.disk_digest))}
            except CheckpointDamagedError:
                self._store.get(request.checkpoint_id)
                raise

    def _known(self, checkpoint_id: UUID, instance_id: UUID) -> Checkpoint | None:
        try:
            checkpoint = self._store.get(checkpoint_id)
        except CheckpointNotFoundError:
            return None
        if checkpoint.instance_id != instance_id:
            raise ConflictError("There is a checkpoint of that id already")
        return checkpoint

    # --- taking ----------------------------------------------------------------------------------------------------

    async def capture(
        self, instance_id: UUID, draft: Path, *, checkpoint_id: UUID, on_step: OnStep
    ) -> tuple[Checkpoint, Stillness]:
        """Memory and disk of a running instance in a draft's folder, of one moment. Whatever goes wrong, the guest goes on."""
        record, stillness = await self._still(instance_id, draft, on_step=on_step)
        memory = await to_its_end(asyncio.to_thread(_saved_memory, record, draft))
        checkpoint = _checkpoint(checkpoint_id, instance_id, record.shape.image_digest, draft / DISK, draft)
        return replace(checkpoint, memory=memory), stillness

    async def _of_suspended(
        self, instance_id: UUID, draft: Path, checkpoint_id: UUID
    ) -> tuple[Checkpoint, Stillness] | None:
        """What is kept of a suspended instance, in a draft's folder: it shares every block with it. None where the instance is not suspended."""
        if self._suspensions.find(instance_id) is None or instance_id in self._fleet:
            return None
        # Snapshots outlive the start of the host, so their checksums are not left for later.
        await self._suspensions.seal(instance_id)
        async with self._fleet.held_still(instance_id) as machine:
            kept, name = self._suspensions.find(instance_id), self._directories.disk_of(instance_id)
            if machine is not None or kept is None or name is None:
                return None
            if kept.memory is None or kept.memory.boot:
                raise CheckpointFailedError("The memory of the suspended instance cannot be kept")
            await to_its_end(asyncio.to_thread(copy_moment, kept, self._disks.disk_path(name), draft))
            checkpoint = _checkpoint(checkpoint_id, instance_id, kept.image_digest, draft / DISK, draft)
            return replace(checkpoint, memory=kept.memory), Stillness()

    async def _still(
        self, instance_id: UUID, draft: Path, *, on_step: OnStep, end: EndsIt | None = None
    ) -> tuple[MachineRecord, Stillness]:
        """Memory and disk of a running instance in a draft's folder; or with `end` its memory alone, and then it has that moment's guest to end."""
        async with self._fleet.held_still(instance_id) as machine:
            if machine is None or machine.failure is not None:
                raise InstanceNotFoundError
            checkpointing(machine.driver)
            if machine.volumes:
                # They go on changing, and are somewhere else, or gone, where the memory is restored.
                raise CheckpointFailedError("The instance has volumes: detach them first")
            async with AsyncExitStack() as using:
                await using.enter_async_context(machine.in_use())
                if not machine.driver.needs.dialled:
                    # They would break with the link.
                    await using.enter_async_context(machine.without_transfers(timeout_seconds=TRANSFER_SECONDS))
                room = self._check_space(machine)
                stillness = await to_its_end(self._capture(machine, draft, room, on_step, end))
            return machine.record, stillness

    def _check_space(self, machine: Machine) -> int:
        """How many bytes there are for its memory."""
        if not machine.record.memory_needs:
            raise CheckpointFailedError(
                "The guest was started by an earlier version of the server; start it again first"
            )
        room = self._disks.free_bytes() - self._reserve_bytes
        if room < machine.driver.usage(machine.id).memory_bytes:
            raise UnavailableError("The host's disk is full", retry_after_seconds=30)
        return room

    async def _capture(
        self, machine: Machine, draft: Path, room_bytes: int, on_step: OnStep, end: EndsIt | None
    ) -> Stillness:
        driver, disk = machine.driver, self._disks.disk_path(machine.record.disk)
        mounted = self._directories.mounts / machine.id / "disk"
        if driver.needs.disk_files:
            # What the guest has in its memory alone goes to its disk: should that memory be of no use any more, the disk is all that there is.
            async with still_disk(machine, mounted):
                pass
        if end is None:
            # What is written ahead need not be waited for while the guest stands still.
            await asyncio.to_thread(write_back, None if driver.needs.disk_files else mounted, disk)
        stillness, began = Stillness(), time.monotonic()
        failure: Exception | None = None
        try:
            if not driver.needs.dialled:
                await machine.endpoint.rest(timeout_seconds=QUIET_SECONDS)
            on_step("quiet")
            async with self._saved(machine, draft / MEMORY, room_bytes, stillness, on_step):
                on_step("saved")
                if end is not None:
                    await end(machine)
                    return stillness
                if driver.needs.disk_files:
                    await asyncio.to_thread(reflink, disk, draft / DISK)
                else:
                    async with still_disk(machine, mounted):
                        await asyncio.to_thread(reflink, disk, draft / DISK)
                on_step("copied")
        except GuestError as error:
            failure = CheckpointFailedError(f"The guest's agent could not be set aside: {error.message}")
        except (CheckpointFailedError, OSError) as error:
            failure = error
        finally:
            if not driver.needs.dialled:
                machine.endpoint.wake()
        try:
            # A guest that has ended meanwhile says so here, which is why the rest failed.
            link = await machine.endpoint.link(timeout_seconds=LINK_SECONDS)
            if failure is not None and driver.needs.dialled:
                # That link stays while the guest does not go on.
                async with asyncio.timeout(driver.patience_seconds):
                    await link.ping()
        except (LinkLostError, TimeoutError):
            # Nobody could use it any more, and nobody would know why.
            machine.fail(STANDS_STILL)
            raise InstanceFailedError(STANDS_STILL) from failure
        if driver.needs.clock:
            await machine.correct_clock()
        if failure is not None:
            raise failure
        stillness.downtime_ms = stillness.paused_ms if driver.needs.dialled else _ms_since(began)
        on_step("linked")
        return stillness

    @asynccontextmanager
    async def _saved(
        self, machine: Machine, folder: Path, room_bytes: int, stillness: Stillness, on_step: OnStep
    ) -> AsyncIterator[None]:
        """The guest's memory in a new folder, and the guest held still for the block, going on after it whatever happened."""
        mark, began, still = machine.state_dir / HELD_STILL, time.monotonic(), asyncio.Event()

        def on_still() -> None:
            nonlocal began
            if not still.is_set():
                began = time.monotonic()
                still.set()
                on_step("paused")

        folder.mkdir(mode=0o700)  # noqa: ASYNC240 - one mkdir(2)
        # Before it is done: a daemon that is killed from here on leaves it to the next one.
        mark.touch()
        try:
            async with (
                kept_written(self._disks.disk_path(machine.record.disk), until=still),
                checkpointing(machine.driver).saved(machine.id, folder, limit_bytes=room_bytes, on_still=on_still),
            ):
                yield
        finally:
            mark.unlink(missing_ok=True)
            stillness.paused_ms = _ms_since(began)
            on_step("resumed")

    async def _copy_only(self, request: verbs.SnapshotDisk, draft: Path) -> tuple[Checkpoint, Stillness, bool]:
        stillness = Stillness()
        async with self._fleet.held_still(request.instance_id) as machine:
            name, digest = (
                self._directories.disk_of(request.instance_id),
                self._directories.image_of(request.instance_id),
            )
            if name is None or digest is None:
                raise InstanceNotFoundError
            disk, began = self._disks.disk_path(name), 0.0
            mounted = self._directories.mounts / ("" if machine is None else machine.id) / "disk"
            if machine is not None:
                if not machine.driver.capabilities.disk_snapshot:
                    raise NotHereError(
                        f"The disk of a running machine of the driver {machine.driver.name} cannot be kept"
                    )
                await asyncio.to_thread(write_back, None if machine.driver.needs.disk_files else mounted, disk)
            async with still_disk(machine, mounted) as held:
                began = time.monotonic()
                await to_its_end(asyncio.to_thread(reflink, disk, draft / DISK))
            if machine is not None:
                stillness.downtime_ms = _ms_since(began)
        checkpoint = _checkpoint(request.checkpoint_id, request.instance_id, digest, draft / DISK, draft)
        return checkpoint, stillness, held.whole

    # --- beginning with one ----------------------------------------------------------------------------------------

    async def _origin(self, checkpoint: Checkpoint, shape: MachineShape, *, disk_only: bool) -> Origin:
        if disk_only:
            _check_disk(checkpoint, shape)
            return Origin(checkpoint.disk)
        origin, driver = _with_memory(checkpoint, shape), checkpointing(self._drivers.starting(shape.driver))
        needs = await driver.memory_needs()
        checkpoint.check_memory(driver=driver.name, needs=needs, agents=self._agents)
        return replace(origin, check=checkpoint.check_whole)

    async def _begin(self, machine: EnsureMachine, origin: Origin, tell: Told) -> dict[str, Any]:
        answer = await self._fleet.ensure(
            machine, lambda step: tell({"step": step.step, "at_ms": step.at_ms}), origin=origin
        )
        return {**answer, "restored": self._fleet.machine(machine.instance_id).restored}


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """As the bus carries it."""
    memory = checkpoint.memory
    return {
        "checkpoint_id": str(checkpoint.id),
        "instance_id": str(checkpoint.instance_id),
        "created_at": checkpoint.created_at,
        "image_digest": checkpoint.image_digest,
        "disk_mb": checkpoint.disk_mb,
        "disk_bytes": checkpoint.disk_bytes,
        "memory": None
        if memory is None
        else {
            "driver": memory.driver,
            "vcpu_count": memory.vcpu_count,
            "memory_mb": memory.memory_mb,
            "size_bytes": memory.size_bytes,
        },
    }


def _checkpoint(checkpoint_id: UUID, instance_id: UUID, image_digest: str, disk: Path, draft: Path) -> Checkpoint:
    status = disk.stat()
    return Checkpoint(
        id=checkpoint_id,
        instance_id=instance_id,
        created_at=round(time.time(), 3),
        image_digest=image_digest,
        disk_mb=status.st_size // MIB,
        disk_bytes=status.st_blocks * 512,
        folder=draft,
    )


def _saved_memory(record: MachineRecord, draft: Path, *, sealed: bool = True) -> SavedMemory:
    """What lies in a draft's folder. `sealed`, with its checksums, takes a second for a gigabyte."""
    return SavedMemory(
        driver=record.driver,
        agent=record.agent,
        vcpu_count=record.shape.vcpu_count,
        memory_mb=record.shape.memory_mb,
        needs=record.memory_needs,
        files=saved_files(draft / MEMORY) if sealed else written_files(draft / MEMORY),
        boot="" if sealed else boot_id(),
    )


def _check_disk(checkpoint: Checkpoint, shape: MachineShape) -> None:
    if shape.image_digest != checkpoint.image_digest:
        raise InvalidRequestError("image_digest: the checkpoint stands on another image")
    if shape.disk_mb != checkpoint.disk_mb:
        raise InvalidRequestError(f"disk_mb: that of the checkpoint is {checkpoint.disk_mb}")


def _with_memory(checkpoint: Checkpoint, shape: MachineShape) -> Origin:
    """Disk and memory of a checkpoint, for a machine of that shape. Raises InvalidRequestError for other sizes, MemoryUnusableError where there is none."""
    _check_disk(checkpoint, shape)
    memory = checkpoint.memory
    if memory is None:
        raise MemoryUnusableError("The checkpoint holds no memory, only a disk")
    for name, wanted, saved in (
        ("vcpu_count", shape.vcpu_count, memory.vcpu_count),
        ("memory_mb", shape.memory_mb, memory.memory_mb),
    ):
        if wanted != saved:
            raise InvalidRequestError(f"{name}: that of the checkpoint is {saved}")
    return Origin(checkpoint.disk, checkpoint.memory_folder, memory.agent)


def _ms_since(began: float) -> float:
    return round((time.monotonic() - began) * 1000, 3)


@asynccontextmanager
async def _telling(call: ServerCall) -> AsyncIterator[Told]:
    """Something that takes messages for the caller at once; they are sent beside, all of them before the block has ended well."""
    steps: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def report() -> None:
        while (step := await steps.get()) is not None:
            await call.send_message(step)

    reporter = asyncio.get_running_loop().create_task(report())
    try:
        yield steps.put_nowait
        steps.put_nowait(None)
        # Whoever has gone need not be told.
        with contextlib.suppress(InnkeeperError):
            await reporter
    finally:
        reporter.cancel()
