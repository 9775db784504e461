"""The instance: the durable noun, and the one table of its states."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from innkeeper.core.image_config import ImageConfig
from innkeeper.errors import ConflictError


class InstanceState(StrEnum):
    """Internal states (docs/architecture.md section 4). The first seven are spelled as the Gentility dialect documents them."""

    ACTIVE = "active"
    NETWORK_ALLOCATED = "network_allocated"
    FTAP_CREATED = "ftap_created"
    IMAGE_GENERATED = "image_generated"
    VM_STARTED = "vm_started"
    VM_BOOTED = "vm_booted"
    READY = "ready"
    SUSPENDING = "suspending"
    SUSPENDED = "suspended"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"
    DESTROYED = "destroyed"


PROVISIONING = (
    InstanceState.ACTIVE,
    InstanceState.NETWORK_ALLOCATED,
    InstanceState.FTAP_CREATED,
    InstanceState.IMAGE_GENERATED,
    InstanceState.VM_STARTED,
    InstanceState.VM_BOOTED,
    InstanceState.READY,
)

_S = InstanceState

# Nothing runs, and the disk is kept: the next use brings it up.
ASLEEP = frozenset({_S.SUSPENDING, _S.SUSPENDED, _S.STOPPING, _S.STOPPED})


def _legal() -> dict[InstanceState, frozenset[InstanceState]]:
    table = {
        # Suspended: it was, and could not be woken now.
        state: frozenset({*PROVISIONING[position + 1 :], _S.SUSPENDED, _S.FAILED, _S.STOPPING, _S.DESTROYED})
        for position, state in enumerate(PROVISIONING)
    }
    table[_S.STOPPING] = frozenset({_S.STOPPED, _S.FAILED, _S.DESTROYED})
    table[_S.STOPPED] = frozenset({_S.ACTIVE, _S.FAILED, _S.DESTROYED})
    table[_S.FAILED] = frozenset({_S.ACTIVE, _S.DESTROYED})
    # A server that starts again finds READY rows whose machine is gone: their next use provisions again on the kept disk.
    table[_S.READY] = (table[_S.READY] | {_S.ACTIVE, _S.SUSPENDING}) - {_S.SUSPENDED}
    # What cannot be suspended goes on.
    table[_S.SUSPENDING] = frozenset({_S.SUSPENDED, _S.READY, _S.STOPPING, _S.FAILED, _S.DESTROYED})
    table[_S.SUSPENDED] = frozenset({_S.ACTIVE, _S.STOPPING, _S.FAILED, _S.DESTROYED})
    table[_S.DESTROYED] = frozenset()
    return table


LEGAL: dict[InstanceState, frozenset[InstanceState]] = _legal()


@dataclass(frozen=True, slots=True)
class BootStep:
    """One stamped provisioning step: its name and milliseconds since the start of the provisioning."""

    step: str
    at_ms: float


@dataclass(frozen=True, slots=True)
class Isolation:
    """What separates a guest from the host: level `none`, `gvisor` or `microvm`, the driver, how that runs it, and why so.

    `accelerator` is a VM's: `kvm`, or `tcg` where its processor is played by a program.
    """

    level: str
    driver: str
    platform: str
    reason: str
    accelerator: str | None = None


@dataclass(frozen=True, slots=True)
class Instance:
    """One guest computer.

    `id` is internal (uuid7). `public_id` is what the Gentility dialect shows: a random uuid4, because it is the key to
    unauthenticated files. `revision` counts changes of state and guards concurrent writers.
    """

    id: UUID
    organization_id: UUID
    public_id: UUID
    profile_id: UUID
    image: str
    state: InstanceState
    created_at: datetime
    host_id: UUID | None = None
    desired: str = "running"
    failure: str | None = None
    boot_trace: tuple[BootStep, ...] = ()
    isolation: Isolation | None = None
    last_active_at: datetime | None = None
    revision: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    # What it was made of: a restart on its disk uses the same image and size, whatever became of the profile.
    image_digest: str = ""
    image_config: ImageConfig | None = None
    vcpu_count: int = 0
    memory_mb: int = 0
    disk_mb: int = 0


def transition(instance: Instance, state: InstanceState, *, failure: str | None = None) -> Instance:
    """The instance in its new state. The only function that changes a state.

    Raises:
        ConflictError: the table does not allow the step.

    """
    if state == instance.state:
        return instance
    if state not in LEGAL[instance.state]:
        raise ConflictError(f"An instance cannot go from {instance.state} to {state}")
    return replace(
        instance,
        state=state,
        failure=failure if state is InstanceState.FAILED else None,
        revision=instance.revision + 1,
    )
