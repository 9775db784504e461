"""The checkpoints of a scripted host: rows in a dict, and errors where a test sets them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from uuid import UUID

from innkeeper.bus.contract import ServerCall
from innkeeper.core import checkpoint_verbs as verbs
from innkeeper.core.host_verbs import EnsureMachine
from innkeeper.errors import CheckpointNotFoundError, ConflictError, InnkeeperError, InstanceNotFoundError

DISK_BYTES, MEMORY_BYTES, OWN_BYTES = 5_000, 3_000, 3_500


class ScriptedCheckpoints:
    """Answers to checkpoint verbs. `hold` keeps those that take one waiting; the errors are raised by the next verb of their kind and all after it."""

    def __init__(
        self,
        disks: set[UUID],
        machines: dict[UUID, dict[str, Any]],
        suspended: set[UUID],
        ensure: Callable[[EnsureMachine, ServerCall], Awaitable[dict[str, Any]]],
    ) -> None:
        self._disks = disks
        self._machines = machines
        self._suspended = suspended
        self._ensure = ensure
        self.kept: dict[UUID, dict[str, Any]] = {}
        self.hold = asyncio.Event()
        self.hold.set()
        self.take_error: InnkeeperError | None = None
        self.restore_error: InnkeeperError | None = None
        self.drop_error: InnkeeperError | None = None
        self.digest_error: InnkeeperError | None = None
        self.digest = "d1"

    def answers(self) -> Iterable[tuple[type[Any], Callable[[Any, ServerCall], Any]]]:
        return (
            (verbs.TakeCheckpoint, self._take),
            (verbs.SnapshotDisk, self._disk),
            (verbs.RestoreCheckpoint, self._restore),
            (verbs.DropCheckpoint, self._drop),
            (verbs.ListCheckpoints, self._list),
            (verbs.MeasureCheckpoints, self._measure),
            (verbs.DigestCheckpoint, self._digest),
        )

    async def _take(self, request: verbs.TakeCheckpoint, call: ServerCall) -> dict[str, Any]:
        await self.hold.wait()
        if self.take_error is not None:
            raise self.take_error
        # Some tests look at who asks whether a machine is there.
        if request.instance_id not in self._machines and request.instance_id not in self._suspended:
            raise InstanceNotFoundError
        memory = {"driver": "gvisor", "vcpu_count": 2, "memory_mb": 1024, "size_bytes": MEMORY_BYTES}
        return self._keep(request.instance_id, request.checkpoint_id, memory)

    async def _disk(self, request: verbs.SnapshotDisk, call: ServerCall) -> dict[str, Any]:
        await self.hold.wait()
        if request.instance_id not in self._disks:
            raise InstanceNotFoundError
        return self._keep(request.instance_id, request.checkpoint_id, None)

    def _keep(self, instance_id: UUID, checkpoint_id: UUID, memory: dict[str, Any] | None) -> dict[str, Any]:
        self.kept[checkpoint_id] = {
            "checkpoint_id": str(checkpoint_id),
            "instance_id": str(instance_id),
            "created_at": 1.0,
            "image_digest": "d",
            "disk_mb": 10_240,
            "disk_bytes": DISK_BYTES,
            "memory": memory,
        }
        return {**self.kept[checkpoint_id], "downtime_ms": 12.5, "paused_ms": 10.0}

    async def _restore(self, request: verbs.RestoreCheckpoint, call: ServerCall) -> dict[str, Any]:
        if request.checkpoint_id not in self.kept:
            raise CheckpointNotFoundError
        if self.restore_error is not None and not request.disk_only:
            raise self.restore_error
        return {**await self._ensure(request.machine, call), "restored": not request.disk_only}

    async def _drop(self, request: verbs.DropCheckpoint, call: ServerCall) -> dict[str, Any]:
        if self.drop_error is not None:
            raise self.drop_error
        self.kept.pop(request.checkpoint_id, None)
        return {}

    async def _list(self, request: verbs.ListCheckpoints, call: ServerCall) -> dict[str, Any]:
        return {"checkpoints": list(self.kept.values())}

    async def _digest(self, request: verbs.DigestCheckpoint, call: ServerCall) -> dict[str, Any]:
        if self.digest_error is not None:
            raise self.digest_error
        if request.checkpoint_id not in self.kept:
            raise CheckpointNotFoundError
        return {"disk_digest": self.digest}

    async def _measure(self, request: verbs.MeasureCheckpoints, call: ServerCall) -> dict[str, Any]:
        return {"own_bytes": {str(one): OWN_BYTES for one in request.checkpoint_ids if one in self.kept}}


def in_use() -> ConflictError:
    """What a host says of a checkpoint from which a machine is being started."""
    return ConflictError("The checkpoint is being restored")
