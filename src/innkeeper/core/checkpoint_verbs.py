"""What the API process asks of a host daemon about moments of instances: their disks, and their memory; carried like `core.host_verbs`.

A checkpoint's id is the asker's to choose: what an answer that was lost had made is found by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar
from uuid import UUID

from innkeeper.core.host_verbs import EnsureMachine


@dataclass(frozen=True, slots=True)
class TakeCheckpoint:
    """Keep memory and disk of a running instance as they are at one moment, and the guest goes on; or of a suspended one, which goes on being that.

    Its open connections to other machines break (docs/drivers.md says what else). Repeated with the id of a checkpoint of that instance it answers again.
    Streams: `{"step": "quiet"|"paused"|"saved"|"copied"|"resumed"|"linked", "at_ms": float}`.
    Answer: a Checkpoint as of `ListCheckpoints`, and of one that was made now `"downtime_ms"`: how long the guest did not answer, at most, `"paused_ms"`:
    how long its programs stood still, at most. Errors, each with the guest running on: checkpoint_failed with the reason, conflict (the id is taken; files
    are being transferred), instance_not_found, not_implemented (no such driver), service_unavailable (no space).
    """

    verb: ClassVar[str] = "checkpoint.take"
    instance_id: UUID
    checkpoint_id: UUID


@dataclass(frozen=True, slots=True)
class SnapshotDisk:
    """Keep the disk of an instance, running or not. The guest only waits to write meanwhile.

    Answer and errors as of TakeCheckpoint, with `"memory"` None, and of one that was made now `"whole": bool`: whether its file system was at rest. A guest
    that has to hold its disk still itself, and does not, has its disk kept as after a loss of power, which its journal mends.
    """

    verb: ClassVar[str] = "checkpoint.disk"
    instance_id: UUID
    checkpoint_id: UUID


@dataclass(frozen=True, slots=True)
class RestoreCheckpoint:
    """Make a new instance's machine ready from a checkpoint, on a copy of its disk.

    With the memory, the machine has the checkpoint's sizes and image; what ran there goes on, with new randomness, time, host name, machine id and
    address. With `disk_only` it starts on the disk. An instance that has a disk here already is made ready on that, as by `machine.ensure`.
    Streams and answer: those of EnsureMachine, and `"restored": bool`: whether its memory was. Errors: checkpoint_not_found, memory_unusable with the
    reason (ask again with `disk_only`), invalid_request (other sizes), and those of EnsureMachine.
    """

    verb: ClassVar[str] = "checkpoint.restore"
    checkpoint_id: UUID
    machine: EnsureMachine
    disk_only: bool = False


@dataclass(frozen=True, slots=True)
class ForkMachine:
    """Make a new instance's machine ready as a copy of a running one, which goes on: TakeCheckpoint and RestoreCheckpoint, with nothing kept.

    Streams: the steps of both. Answer: that of RestoreCheckpoint with those `_ms` of TakeCheckpoint. Errors: those of both.
    """

    verb: ClassVar[str] = "checkpoint.fork"
    instance_id: UUID
    machine: EnsureMachine


@dataclass(frozen=True, slots=True)
class SuspendMachine:
    """Keep a running instance's memory, end its machine, and leave its disk, its journals and what is known of its files as they are.

    The next `machine.ensure` goes on with the memory. Idempotent. Streams: `{"step": "quiet"|"paused"|"saved"|"kept", "at_ms": float}`.
    Answer: `{"memory_bytes": int}`. Errors: those of TakeCheckpoint, the guest running on; instance_not_found where it has neither a machine nor kept memory.
    """

    verb: ClassVar[str] = "machine.suspend"
    instance_id: UUID


@dataclass(frozen=True, slots=True)
class DropCheckpoint:
    """Remove a checkpoint; machines that began with it keep what they have. Idempotent. Answer: `{}`. Errors: conflict (it is being restored)."""

    verb: ClassVar[str] = "checkpoint.drop"
    checkpoint_id: UUID


@dataclass(frozen=True, slots=True)
class ListCheckpoints:
    """Those of the host, oldest first.

    Answer: `{"checkpoints": [{"checkpoint_id", "instance_id", "created_at" (Unix seconds), "image_digest", "disk_mb", "disk_bytes" (blocks that are
    shared with other disks included), "memory": {"driver", "vcpu_count", "memory_mb", "size_bytes"}|None}]}`.
    """

    verb: ClassVar[str] = "checkpoint.list"


@dataclass(frozen=True, slots=True)
class MeasureCheckpoints:
    """What would be free without each of the named ones: blocks that no other file shares.

    Answer: `{"own_bytes": {checkpoint_id: int}}`, of those that there are.
    """

    verb: ClassVar[str] = "checkpoint.measure"
    checkpoint_ids: tuple[UUID, ...]


@dataclass(frozen=True, slots=True)
class DigestCheckpoint:
    """The checksum of a checkpoint's disk as it is now, which reads all of it: seconds for a gigabyte.

    Answer: `{"disk_digest": str}`. Errors: checkpoint_not_found, checkpoint_damaged (it cannot be read).
    """

    verb: ClassVar[str] = "checkpoint.digest"
    checkpoint_id: UUID


VERBS: tuple[type[Any], ...] = (
    TakeCheckpoint,
    SnapshotDisk,
    RestoreCheckpoint,
    ForkMachine,
    SuspendMachine,
    DropCheckpoint,
    ListCheckpoints,
    MeasureCheckpoints,
    DigestCheckpoint,
)
