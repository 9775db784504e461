"""The snapshot: a kept moment of an instance, its disk and perhaps its memory, from which others begin; what may be said of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from innkeeper.core.egress_policy import EgressPolicy
from innkeeper.core.image_config import ImageConfig
from innkeeper.errors import ConflictError, InvalidRequestError, SnapshotDamagedError

NAME_CHARACTERS_MAX = 200


class SnapshotStatus(StrEnum):
    """What becomes of a snapshot. A row says `creating` before its host hears of it, and `deleting` before the host lets go of it.

    `damaged`: a verification, or a checksum, says that it is not what was taken; it is kept as it is.
    """

    CREATING = "creating"
    READY = "ready"
    FAILED = "failed"
    DELETING = "deleting"
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class Mark:
    """What a guest said of itself just before its memory was saved; `nonce` was left in its memory."""

    nonce: str
    machine_id: str
    hostname: str
    entropy: str


@dataclass(frozen=True, slots=True)
class Check:
    """One result of a verification. `ok` None: it could not be told, `detail` says why."""

    name: str
    ok: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A moment of the instance `instance_id`, kept on a host as the checkpoint of the same id; or an image on a host, made of `oci_image`.

    One of an image has no instance, no driver and no memory: VMs begin with the image itself, by any driver. `env_sealed` are variables of these,
    a JSON object bound to the organization and `id`.
    `memory` is whether what ran is part of it. `memory_mb` and `vcpu_count` are the instance's. `parent_id` is the snapshot that the instance itself
    began with. `disk_bytes` are those of its disk, blocks that it shares with others included. `checks` are those of `verified_at`.
    """

    id: UUID
    organization_id: UUID
    instance_id: UUID | None
    host_id: UUID
    name: str
    status: SnapshotStatus
    created_at: datetime
    memory: bool
    driver: str | None
    image: str
    image_digest: str
    image_config: ImageConfig | None
    vcpu_count: int
    memory_mb: int
    disk_mb: int
    egress_policy: EgressPolicy = field(default_factory=EgressPolicy)
    parent_id: UUID | None = None
    # Of a fork, which it goes with.
    passing: bool = False
    # Those that were mounted, which are no part of it.
    volumes: tuple[UUID, ...] = ()
    disk_bytes: int | None = None
    memory_bytes: int | None = None
    downtime_ms: float | None = None
    error: str | None = None
    mark: Mark | None = None
    disk_digest: str | None = None
    verified_at: datetime | None = None
    checks: tuple[Check, ...] = ()
    oci_image: str | None = None
    env_sealed: bytes | None = field(default=None, repr=False)

    @property
    def of_image(self) -> bool:
        """Whether it is an image, and no moment of anything."""
        return self.oci_image is not None

    def check_ready(self) -> None:
        """Raises ConflictError, SnapshotDamagedError for one that nothing can begin with, saying why."""
        if self.status is SnapshotStatus.READY:
            return
        if self.status is SnapshotStatus.DAMAGED:
            raise SnapshotDamagedError(f"The snapshot is damaged: {self.error}")
        why = f": {self.error}" if self.error else ""
        raise ConflictError(f"The snapshot is {self.status}, not ready{why}")

    def check_sizes(self, *, memory_mb: int | None, vcpu_count: int | None, image_variant: str | None) -> None:
        """Refuse what a VM that begins with it cannot be. Raises InvalidRequestError, naming the field."""
        if image_variant is not None:
            raise InvalidRequestError(f"image_variant: the snapshot stands on its own image, {self.image!r}")
        if not self.memory:
            return
        for name, wanted, has in (
            ("memory_mb", memory_mb, self.memory_mb),
            ("vcpu_count", vcpu_count, self.vcpu_count),
        ):
            if wanted not in (None, has):
                raise InvalidRequestError(f"{name}: the snapshot has memory, and was taken of a VM with {has}")


def validate_name(name: str, field_name: str = "name") -> None:
    """Raises InvalidRequestError."""
    if len(name) > NAME_CHARACTERS_MAX:
        raise InvalidRequestError(f"{field_name}: at most {NAME_CHARACTERS_MAX} characters")
    if not name.isprintable():
        raise InvalidRequestError(f"{field_name}: printable characters only")
