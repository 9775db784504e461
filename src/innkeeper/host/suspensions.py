"""What is kept of suspended instances: their memory, beside their own disk, which must stay as it was at that moment."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from uuid import UUID

import structlog

from innkeeper.core.host_verbs import MachineShape
from innkeeper.errors import CheckpointNotFoundError, InnkeeperError, MemoryUnusableError
from innkeeper.host.completion import to_its_end
from innkeeper.host.disks.checkpoint_store import DISK, MEMORY, Checkpoint, CheckpointStore, sync
from innkeeper.host.disks.disk_pool import DiskPool
from innkeeper.host.disks.disk_template import reflink, reflink_over
from innkeeper.host.drivers.contract import checkpointing
from innkeeper.host.drivers.registry import DriverRegistry
from innkeeper.host.machine import HELD_STILL, MachineRecord
from innkeeper.host.machine_builder import Origin

log = structlog.stdlib.get_logger(__name__)

FOLDER = "suspended"


class Suspensions:
    """Memory by instance, in the form of checkpoints whose disk is the instance's own.

    A guest that goes on writes to its disk, and the memory that it began with fits that disk no more. So the disk is copied first, into the folder of the
    memory: whoever is killed before the guest is up leaves both, and the next attempt begins with the same moment. When it is up the folder goes.
    """

    def __init__(self, *, disks: DiskPool, drivers: DriverRegistry, agents: Path) -> None:
        self.store = CheckpointStore(disks.directory / FOLDER)
        self._disks = disks
        self._drivers = drivers
        self._agents = agents
        self._sealing = asyncio.Semaphore(1)

    def find(self, instance_id: UUID) -> Checkpoint | None:
        """What is kept of the instance's memory, or None when it is not suspended here."""
        try:
            return self.store.get(instance_id)
        except CheckpointNotFoundError:
            return None

    def may_be_adopted(self, record: MachineRecord, state_dir: Path) -> bool:
        """Whether a machine runs on; one that was held still to be suspended, and whose memory is whole, does not."""
        held = (state_dir / HELD_STILL).exists()
        return not (held and record.instance_id is not None and self.find(record.instance_id) is not None)

    async def origin(self, kept: Checkpoint, shape: MachineShape, disk: str) -> Origin:
        """What the instance's machine goes on from, on its own disk as it was at that moment.

        Raises MemoryUnusableError with the reason; OSError; UnavailableError where the driver cannot start anything now.
        """
        memory = kept.memory
        if memory is None:
            raise MemoryUnusableError("There is no memory")
        wanted = (shape.driver, shape.image_digest, shape.vcpu_count, shape.memory_mb)
        if wanted != (memory.driver, kept.image_digest, memory.vcpu_count, memory.memory_mb):
            raise MemoryUnusableError("The machine is to be another one than its memory was saved of")
        driver = checkpointing(self._drivers.starting(shape.driver))
        needs = await driver.memory_needs()
        kept.check_memory(driver=driver.name, needs=needs, agents=self._agents)
        path = self._disks.disk_path(disk)
        await to_its_end(asyncio.to_thread(_keep_moment, kept, path))
        return Origin(path, kept.memory_folder, memory.agent, check=kept.check_whole, same_guest=True)

    async def seal(self, instance_id: UUID) -> None:
        """Add the checksums to memory that was kept without, one after the other: each keeps a core busy. Fine where there is none. Raises OSError."""
        async with self._sealing:
            await to_its_end(asyncio.to_thread(self.store.seal, instance_id))

    async def drop(self, instance_id: UUID) -> None:
        """Forget the memory: its instance runs, starts on its disk, or is no more. Fine where there is none."""
        await to_its_end(asyncio.to_thread(self.store.drop, instance_id))

    async def settle(self, instances: Path, running: set[UUID]) -> int:
        """At the start of a daemon: forget what belongs to nobody, and the memory of guests that run on; seal the rest. How many were forgotten."""
        forgotten = 0
        for path in self.store.folders():
            with contextlib.suppress(ValueError, InnkeeperError, OSError):
                if not (instances / path.name).exists() or UUID(path.name) in running:
                    await self.drop(UUID(path.name))
                    forgotten += 1
                else:
                    # A daemon that was killed did not get to it.
                    await self.seal(UUID(path.name))
        return forgotten


def copy_moment(kept: Checkpoint, disk: Path, folder: Path) -> None:
    """Copy memory and disk of a suspended instance into a folder, in no time: the copies share all blocks. Raises OSError."""
    (folder / MEMORY).mkdir(mode=0o700)
    for path in kept.memory_folder.iterdir():
        reflink(path, folder / MEMORY / path.name)
    # Where a machine has begun on the disk since, and did not come up, the copy is what it was.
    copy = kept.folder / DISK
    reflink(copy if copy.exists() else disk, folder / DISK)


def _keep_moment(kept: Checkpoint, disk: Path) -> None:
    """Have the disk as it was when the memory was saved, and a copy of that, which is there after a loss of power before anything writes to the disk."""
    copy = kept.folder / DISK
    if copy.exists():
        # A machine has begun on the disk since, and did not come up.
        reflink_over(copy, disk)
        return
    draft = copy.with_suffix(".new")
    draft.unlink(missing_ok=True)
    reflink(disk, draft)
    draft.rename(copy)
    sync(kept.folder)
