"""The VM: an instance by its own id, with a session, a lifetime and an environment; how it is shown and what bounds it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from innkeeper.core.egress_policy import EgressPolicy
from innkeeper.core.instance import PROVISIONING, Instance, InstanceState
from innkeeper.core.isolation import Wish, wish_of
from innkeeper.core.profile import IDLE_SECONDS_RANGE, MEMORY_MB_RANGE, VCPU_RANGE, validate_env
from innkeeper.core.snapshot import validate_name
from innkeeper.core.volume import MountRequest
from innkeeper.errors import InvalidRequestError

LIFETIME_SECONDS_MIN = 20
HOLD_SECONDS_MAX = 86_400
METADATA_BYTES_MAX = 16_384
REASON_CHARACTERS_MAX = 500
# 26 characters of base32 are an instance's id; the number is the generation, which the first one leaves out.
_VM_ID = re.compile(r"vm_([a-z2-7]{26})(?:-([1-9][0-9]{0,5}))?")


class EnvStatus(StrEnum):
    """What became of the variables that a VM was given."""

    NONE = "none"
    APPLIED = "applied"
    FAILED = "failed"


class VmEnd(StrEnum):
    """Why a VM is no more."""

    DELETED = "deleted"
    KILLED = "killed"
    EXPIRED = "expired"
    IDLE = "idle"
    # A backup was restored that does not have it.
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class VmRequest:
    """What a VM is to be; None is the server's default. A session keeps it for the VMs that it gets later, without `env`, which is kept sealed.

    Raises:
        InvalidRequestError: naming the field.

    """

    vm_lifetime_seconds: int | None = None
    memory_mb: int | None = None
    vcpu_count: int | None = None
    metadata: Mapping[str, Any] | None = None
    env: Mapping[str, str] | None = field(default=None, repr=False)
    image_variant: str | None = None
    idle_seconds: int | None = None
    egress_policy: EgressPolicy | None = None
    driver: str | None = None
    min_isolation: str | None = None
    snapshot_id: UUID | None = None
    snapshot_on_terminate: bool | None = None
    snapshot_name: str | None = None
    auto_suspend: bool | None = None
    auto_resume: bool | None = None
    volumes: tuple[MountRequest, ...] | None = None

    def __post_init__(self) -> None:
        for name, value, (low, high) in (
            ("memory_mb", self.memory_mb, MEMORY_MB_RANGE),
            ("vcpu_count", self.vcpu_count, VCPU_RANGE),
            ("idle_seconds", self.idle_seconds, IDLE_SECONDS_RANGE),
        ):
            if value is not None and not low <= value <= high:
                raise InvalidRequestError(f"{name}: must be between {low} and {high}")
        if self.vm_lifetime_seconds is not None and self.vm_lifetime_seconds < LIFETIME_SECONDS_MIN:
            raise InvalidRequestError(f"vm_lifetime_seconds: must be at least {LIFETIME_SECONDS_MIN}")
        self.wish.validate()
        validate_name(self.snapshot_name or "", "snapshot_name")
        validate_metadata(self.metadata or {})
        validate_env(dict(self.env or {}))

    @property
    def wish(self) -> Wish:
        """How the VM is to be isolated."""
        return wish_of(self.driver, self.min_isolation)

    def over(self, before: VmRequest) -> VmRequest:
        """This request, with what it leaves open as in the one before; the environment apart."""
        mine = {name: value for name, value in self.stored().items() if value is not None}
        return stored_request({**before.stored(), **mine})

    def stored(self) -> dict[str, Any]:
        """The JSON form, without the environment."""
        return {
            "vm_lifetime_seconds": self.vm_lifetime_seconds,
            "memory_mb": self.memory_mb,
            "vcpu_count": self.vcpu_count,
            "metadata": None if self.metadata is None else dict(self.metadata),
            "image_variant": self.image_variant,
            "idle_seconds": self.idle_seconds,
            "egress_policy": None if self.egress_policy is None else asdict(self.egress_policy),
            "driver": self.driver,
            "min_isolation": self.min_isolation,
            "snapshot_id": None if self.snapshot_id is None else str(self.snapshot_id),
            "snapshot_on_terminate": self.snapshot_on_terminate,
            "snapshot_name": self.snapshot_name,
            "auto_suspend": self.auto_suspend,
            "auto_resume": self.auto_resume,
            "volumes": None if self.volumes is None else [one.stored() for one in self.volumes],
        }


def stored_request(stored: Mapping[str, Any]) -> VmRequest:
    """The request of `VmRequest.stored`'s form."""
    policy, snapshot_id, volumes = (stored.get(name) for name in ("egress_policy", "snapshot_id", "volumes"))
    return VmRequest(
        **{
            **stored,
            "egress_policy": None if policy is None else policy_of(policy),
            "snapshot_id": None if snapshot_id is None else UUID(snapshot_id),
            "volumes": None if volumes is None else tuple(MountRequest.of_stored(one) for one in volumes),
        }
    )


def policy_of(stored: Mapping[str, Any]) -> EgressPolicy:
    """The policy of its stored form."""
    return EgressPolicy(stored["mode"], tuple(stored["ports"]), tuple(stored["cidrs"]))


@dataclass(frozen=True, slots=True)
class Vm:
    """What an instance has as a VM. `memory_mb` is what its next start gets."""

    instance_id: UUID
    organization_id: UUID
    session_id: UUID
    lifetime_seconds: int
    expires_at: datetime
    memory_mb: int
    wish: Wish = field(default_factory=Wish)
    generation: int = 1
    metadata: dict[str, Any] = field(default_factory=dict)
    image_variant: str | None = None
    idle_seconds: int | None = None
    egress_policy: EgressPolicy = field(default_factory=EgressPolicy)
    env_sealed: bytes | None = field(default=None, repr=False)
    hold_until: datetime | None = None
    hold_reason: str | None = None
    end_reason: VmEnd | None = None
    ended_at: datetime | None = None
    # What it begins with, and how it did: None until it has come up, then `memory` or `disk`.
    snapshot_id: UUID | None = None
    restored: str | None = None
    # Whether a snapshot is taken before it ends, and what that is called.
    snapshot_on_terminate: bool = False
    snapshot_name: str | None = None
    # Whether it is suspended where it would end by itself, and whether its use wakes it.
    auto_suspend: bool = False
    auto_resume: bool = True
    # Why it is suspended, and who woke it last.
    suspend_reason: str | None = None
    woken_by: str | None = None

    @property
    def vm_id(self) -> str:
        """What clients call it."""
        return vm_id(self.instance_id, self.generation)


@dataclass(frozen=True, slots=True)
class Session:
    """A client's handle that gets a VM on first use, and another one when that has ended."""

    id: UUID
    organization_id: UUID
    created_at: datetime
    request: VmRequest = field(default_factory=VmRequest)
    env_sealed: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class VmEvent:
    """Something that happened to a VM, or is going to: `at` is when it was noted."""

    id: UUID
    instance_id: UUID
    at: datetime
    type: str
    reason: str
    details: dict[str, str] = field(default_factory=dict)


def vm_id(instance_id: UUID, generation: int) -> str:
    """The id that clients see; no UUID, because some tell VMs from sessions by that."""
    text = base64.b32encode(instance_id.bytes).decode().rstrip("=").lower()
    return f"vm_{text}" if generation == 1 else f"vm_{text}-{generation}"


def parse_vm_id(text: str) -> tuple[UUID, int] | None:
    """(instance id, generation) of a VM's id in its one spelling, or None."""
    match = _VM_ID.fullmatch(text)
    if match is None:
        return None
    instance_id = UUID(bytes=base64.b32decode(match[1].upper() + "======"))
    generation = int(match[2] or 1)
    return (instance_id, generation) if vm_id(instance_id, generation) == text else None


def show_status(instance: Instance) -> str:
    """How a VM's state is spelled (docs/concepts.md)."""
    if instance.desired == "destroyed" or instance.state is InstanceState.DESTROYED:
        return "killed"
    if instance.state is InstanceState.READY:
        return "active"
    if instance.state is InstanceState.SUSPENDING:
        return "suspending"
    if instance.state is InstanceState.FAILED:
        return "error"
    return "creating" if instance.state in PROVISIONING else "suspended"


def env_status(vm: Vm, instance: Instance) -> tuple[EnvStatus, str | None]:
    """What became of the VM's variables, and why they could not be given to it."""
    if vm.env_sealed is None:
        return EnvStatus.NONE, None
    if instance.state is InstanceState.FAILED:
        return EnvStatus.FAILED, instance.failure
    return (EnvStatus.APPLIED if instance.boot_trace else EnvStatus.NONE), None


def validate_metadata(metadata: Mapping[str, Any]) -> None:
    """Check the size of what a user says of a VM.

    Raises:
        InvalidRequestError: too much, or not storable.

    """
    try:
        size = len(json.dumps(metadata, allow_nan=False, ensure_ascii=False).encode())
    except (ValueError, RecursionError, UnicodeEncodeError):
        raise InvalidRequestError("metadata: must be a JSON object of valid Unicode and finite numbers") from None
    if size > METADATA_BYTES_MAX:
        raise InvalidRequestError(f"metadata: at most {METADATA_BYTES_MAX} bytes of JSON")
