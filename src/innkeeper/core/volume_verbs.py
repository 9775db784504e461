"""What the API process asks of a host daemon about volumes: disks that outlive instances; carried like `core.host_verbs`.

A volume's id is the asker's to choose: what an answer that was lost had made is found by it. Names and owners are the asker's, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar
from uuid import UUID

# A file system needs some room for itself.
SIZE_MB_RANGE = (64, 1_048_576)
# SCSI disks of one machine, and mounts of one sandbox.
VOLUMES_MAX = 16
PATH_BYTES_MAX = 1_024
# The guest's system, and what its agent needs.
RESERVED = frozenset({"proc", "sys", "dev", "run", ".innkeeper"})


@dataclass(frozen=True, slots=True)
class CreateVolume:
    """Make a volume: empty, or with `copy_of` as a copy that shares its blocks until one of them is written, of its size unless `size_mb` is larger.

    The size is the quota. Nobody can ever write an `immutable` one. Repeated with the same parameters it answers again. Whoever may write `copy_of` waits
    while it is copied, and goes on.
    Answer: a Volume as of `ListVolumes`. Errors: conflict (the id is taken), volume_not_found, volume_failed (who may write `copy_of` does not hold it still),
    volume_in_use (it is just coming or going), invalid_request, guest_written (a larger copy of a volume that a virtual machine has written),
    service_unavailable (no space).
    """

    verb: ClassVar[str] = "volume.create"
    volume_id: UUID
    size_mb: int
    copy_of: UUID | None = None
    immutable: bool = False


@dataclass(frozen=True, slots=True)
class GrowVolume:
    """Give a volume that nobody has attached a larger quota. Idempotent. Answer: a Volume.

    Errors: volume_not_found, volume_in_use, invalid_request (it would shrink), conflict (immutable), service_unavailable (no space).
    """

    verb: ClassVar[str] = "volume.grow"
    volume_id: UUID
    size_mb: int


@dataclass(frozen=True, slots=True)
class RemoveVolume:
    """Delete a volume that nobody has attached. Idempotent. Answer: `{}`. Errors: volume_in_use, naming the instances."""

    verb: ClassVar[str] = "volume.remove"
    volume_id: UUID


@dataclass(frozen=True, slots=True)
class AttachVolume:
    """Have a running instance see a volume at `path`, until it is detached or the instance's machine ends.

    One instance may write a volume at a time, or several read it (`read_only`). At the path there is nothing, or an empty directory; what is missing above it
    is made. A volume that nobody has used yet becomes the instance's user's. Idempotent with the same parameters.
    Answer: `{}`. Errors: instance_not_found, volume_not_found, volume_in_use (naming the instances; or the instance has it elsewhere), guest_written,
    conflict (immutable; something at the path; too many), invalid_request (the path), volume_failed, guest_error, not_implemented (no such driver).
    """

    verb: ClassVar[str] = "volume.attach"
    instance_id: UUID
    volume_id: UUID
    path: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class DetachVolume:
    """Take a volume away from a running instance. Everything that was written is on it. Idempotent; fine for one that does not run.

    Answer: `{}`. Errors: volume_in_use, with the programs that the guest says have it open; volume_failed, guest_error (its agent does not let go). It is
    attached as before then.
    """

    verb: ClassVar[str] = "volume.detach"
    instance_id: UUID
    volume_id: UUID


@dataclass(frozen=True, slots=True)
class ListVolumes:
    """Those of the host, or of these those that it has.

    Answer: `{"volumes": [{"volume_id", "size_mb", "used_bytes" (blocks that are shared with others included), "own_bytes" (without them),
    "guest_written", "immutable", "attached": [{"instance_id", "path", "read_only", "ready": bool}]}]}`. Not `ready`: it is being attached or detached.
    """

    verb: ClassVar[str] = "volume.list"
    volume_ids: tuple[UUID, ...] | None = None


VERBS: tuple[type[Any], ...] = (CreateVolume, GrowVolume, RemoveVolume, AttachVolume, DetachVolume, ListVolumes)


def mount_path_error(path: str) -> str | None:
    """What is wrong with a path of a guest for a volume, by its text alone; None where nothing is."""
    parts = path.split("/")
    if parts[0] or len(parts) < 2 or not all(part not in ("", ".", "..") for part in parts[1:]) or "\0" in path:
        return "not an absolute path without empty parts, . and .."
    if len(path.encode(errors="replace")) > PATH_BYTES_MAX:
        return f"more than {PATH_BYTES_MAX} bytes"
    if not path.isprintable():
        return "not printable"
    if parts[1] in RESERVED:
        return f"/{parts[1]} is the system's"
    return None
