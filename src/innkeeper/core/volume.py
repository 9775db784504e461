"""The volume: storage that outlives instances; a checkpoint of one, which nobody can ever write; and a mount, which says that an instance has one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Self
from uuid import UUID

from innkeeper.core.volume_verbs import SIZE_MB_RANGE, mount_path_error
from innkeeper.errors import InvalidRequestError

MIB = 1 << 20
NAME_CHARACTERS_MAX = 200
# A checkpoint that is asked for by this name is the newest one.
LATEST = "latest"


class VolumeStatus(StrEnum):
    """What becomes of a volume. A row says `creating` before its host hears of it, and `deleting` before the host lets go of it."""

    CREATING = "creating"
    READY = "ready"
    FAILED = "failed"
    DELETING = "deleting"


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume, or the checkpoint of the volume `checkpoint_of`; on its host under the same id. The size is its quota."""

    id: UUID
    organization_id: UUID
    host_id: UUID
    name: str
    size_mb: int
    status: VolumeStatus
    created_at: datetime
    checkpoint_of: UUID | None = None
    error: str | None = None

    @property
    def quota_bytes(self) -> int:
        """How much it can hold, what its file system needs for itself included."""
        return self.size_mb * MIB


class MountState(StrEnum):
    """Where a mount is on its way. A row says `attaching` before the host hears of it, and `detaching` before the host lets go of it."""

    ATTACHING = "attaching"
    ATTACHED = "attached"
    DETACHING = "detaching"


@dataclass(frozen=True, slots=True)
class MountRequest:
    """A volume, or one of its checkpoints, that a VM is to have at a path. Raises InvalidRequestError, naming the field."""

    volume_id: UUID
    path: str
    read_only: bool = False
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        problem = mount_path_error(self.path)
        if problem is not None:
            raise InvalidRequestError(f"mount_path: {problem}")
        if self.checkpoint is not None and not self.read_only:
            raise InvalidRequestError("checkpoint_id: a checkpoint can only be read; mode must be ro")

    def stored(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "volume_id": str(self.volume_id),
            "path": self.path,
            "read_only": self.read_only,
            "checkpoint": self.checkpoint,
        }

    @classmethod
    def of_stored(cls, stored: Mapping[str, Any]) -> Self:
        """The request of its stored form."""
        return cls(UUID(stored["volume_id"]), stored["path"], stored["read_only"], stored["checkpoint"])


@dataclass(frozen=True, slots=True)
class Mount:
    """That an instance has a volume, or with `checkpoint_id` that checkpoint of it, at a path, whenever it runs."""

    id: UUID
    instance_id: UUID
    volume_id: UUID
    path: str
    read_only: bool
    state: MountState
    checkpoint_id: UUID | None = None

    @property
    def disk_id(self) -> UUID:
        """What its host calls what is mounted."""
        return self.checkpoint_id or self.volume_id

    @property
    def mode(self) -> str:
        """As clients say it."""
        return "ro" if self.read_only else "rw"


def size_mb_of(quota_bytes: int) -> int:
    """The size of a volume with this quota: whole MiB, rounded up. Raises InvalidRequestError."""
    low, high = SIZE_MB_RANGE
    size_mb = -(-quota_bytes // MIB)
    if not low <= size_mb <= high:
        raise InvalidRequestError(f"quota_bytes: must be between {low * MIB} and {high * MIB}")
    return size_mb


def validate_name(name: str) -> None:
    """Raises InvalidRequestError."""
    if not name or len(name) > NAME_CHARACTERS_MAX:
        raise InvalidRequestError(f"name: between 1 and {NAME_CHARACTERS_MAX} characters")
    if not name.isprintable():
        raise InvalidRequestError("name: printable characters only")
