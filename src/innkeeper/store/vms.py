"""VMs: what instances have beyond a room's, and what happened to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.egress_policy import EgressPolicy
from innkeeper.core.instance import Instance, InstanceState
from innkeeper.core.isolation import wish_of
from innkeeper.core.vm import Vm, VmEnd, VmEvent, policy_of, vm_id
from innkeeper.store.instances import instance_of
from innkeeper.store.tables import instances, vm_events, vms

_OWN = [
    vms.c[name].label(f"vm_{name}")
    for name in (
        "session_id",
        "generation",
        "lifetime_seconds",
        "expires_at",
        "memory_mb",
        "metadata",
        "image_variant",
        "idle_seconds",
        "egress_policy",
        "driver",
        "min_isolation",
        "env_sealed",
        "hold_until",
        "hold_reason",
        "end_reason",
        "snapshot_id",
        "restored",
        "snapshot_on_terminate",
        "snapshot_name",
        "auto_suspend",
        "auto_resume",
        "suspend_reason",
        "woken_by",
    )
]
_JOINED = sa.select(*_OWN, instances).join_from(vms, instances, vms.c.instance_id == instances.c.id)


def insert(connection: sa.Connection, vm: Vm) -> None:
    """Store a VM; its instance and session are there."""
    connection.execute(
        sa.insert(vms).values(
            instance_id=vm.instance_id,
            organization_id=vm.organization_id,
            session_id=vm.session_id,
            **_values(vm),
        )
    )


def update(connection: sa.Connection, vm: Vm) -> None:
    """Store what may change of a VM."""
    connection.execute(sa.update(vms).where(vms.c.instance_id == vm.instance_id).values(**_values(vm)))


def get(connection: sa.Connection, instance_id: UUID) -> tuple[Vm, Instance] | None:
    """One VM and its instance, in whatever state."""
    row = connection.execute(_JOINED.where(vms.c.instance_id == instance_id)).one_or_none()
    return None if row is None else _pair(row)


def living(connection: sa.Connection) -> list[tuple[Vm, Instance]]:
    """All VMs of all organizations that have not ended, oldest first."""
    query = _JOINED.where(instances.c.state != InstanceState.DESTROYED.value).order_by(instances.c.id)
    return [_pair(row) for row in connection.execute(query)]


def newest_of_session(connection: sa.Connection, session_id: UUID) -> tuple[Vm, Instance] | None:
    """The VM that a session had last, which may have ended."""
    query = _JOINED.where(vms.c.session_id == session_id).order_by(instances.c.id.desc()).limit(1)
    row = connection.execute(query).one_or_none()
    return None if row is None else _pair(row)


def page(
    connection: sa.Connection, organization_id: UUID, *, living_only: bool, before: UUID | None, limit: int
) -> list[tuple[Vm, Instance]]:
    """An organization's VMs whose instance came before the id `before`, newest first."""
    query = _JOINED.where(vms.c.organization_id == organization_id)
    if living_only:
        query = query.where(instances.c.state != InstanceState.DESTROYED.value)
    if before is not None:
        query = query.where(vms.c.instance_id < before)
    return [_pair(row) for row in connection.execute(query.order_by(vms.c.instance_id.desc()).limit(limit))]


def beginning_with(connection: sa.Connection, snapshot_id: UUID) -> list[Vm]:
    """The VMs that are still to begin with a snapshot: they have not come up yet."""
    query = _JOINED.where(
        vms.c.snapshot_id == snapshot_id,
        vms.c.restored.is_(None),
        instances.c.state != InstanceState.DESTROYED.value,
        instances.c.desired != "destroyed",
    )
    return [_pair(row)[0] for row in connection.execute(query.order_by(instances.c.id))]


def names(connection: sa.Connection, instance_ids: Sequence[UUID]) -> dict[UUID, str]:
    """What clients call those of the instances that have not ended, by the instances' ids."""
    if not instance_ids:
        return {}
    query = (
        sa.select(vms.c.instance_id, vms.c.generation)
        .join_from(vms, instances, vms.c.instance_id == instances.c.id)
        .where(vms.c.instance_id.in_(instance_ids), instances.c.state != InstanceState.DESTROYED.value)
    )
    return {row.instance_id: vm_id(row.instance_id, row.generation) for row in connection.execute(query)}


def set_memory(connection: sa.Connection, instance_id: UUID, memory_mb: int) -> None:
    """Note what the VM's next start gets."""
    connection.execute(sa.update(vms).where(vms.c.instance_id == instance_id).values(memory_mb=memory_mb))


def insert_events(connection: sa.Connection, *events: VmEvent) -> None:
    """Append what happened, for VMs that are still known."""
    for event in events:
        values = sa.select(
            sa.literal(event.id, sa.Uuid()),
            sa.literal(event.instance_id, sa.Uuid()),
            sa.literal(event.at, vm_events.c.at.type),
            sa.literal(event.type),
            sa.literal(event.reason),
            sa.literal(event.details, sa.JSON()),
        ).where(sa.exists().where(vms.c.instance_id == event.instance_id))
        connection.execute(sa.insert(vm_events).from_select([c.name for c in vm_events.columns], values))


def events(connection: sa.Connection, instance_id: UUID, *, after: UUID | None, limit: int) -> list[VmEvent]:
    """What happened to a VM after the event `after`, oldest first."""
    query = sa.select(vm_events).where(vm_events.c.instance_id == instance_id)
    if after is not None:
        query = query.where(vm_events.c.id > after)
    rows = connection.execute(query.order_by(vm_events.c.id).limit(limit))
    return [VmEvent(row.id, row.instance_id, row.at, row.type, row.reason, dict(row.details)) for row in rows]


def _values(vm: Vm) -> dict[str, Any]:
    return {
        "generation": vm.generation,
        "lifetime_seconds": vm.lifetime_seconds,
        "expires_at": vm.expires_at,
        "memory_mb": vm.memory_mb,
        "metadata": vm.metadata,
        "image_variant": vm.image_variant,
        "idle_seconds": vm.idle_seconds,
        "egress_policy": asdict(vm.egress_policy),
        "driver": vm.wish.driver,
        "min_isolation": vm.wish.min_isolation,
        "env_sealed": vm.env_sealed,
        "hold_until": vm.hold_until,
        "hold_reason": vm.hold_reason,
        "end_reason": None if vm.end_reason is None else vm.end_reason.value,
        "snapshot_id": vm.snapshot_id,
        "restored": vm.restored,
        "snapshot_on_terminate": vm.snapshot_on_terminate,
        "snapshot_name": vm.snapshot_name,
        "auto_suspend": vm.auto_suspend,
        "auto_resume": vm.auto_resume,
        "suspend_reason": vm.suspend_reason,
        "woken_by": vm.woken_by,
    }


def _pair(row: Any) -> tuple[Vm, Instance]:
    instance = instance_of(row)
    vm = Vm(
        instance_id=instance.id,
        organization_id=instance.organization_id,
        session_id=row.vm_session_id,
        lifetime_seconds=row.vm_lifetime_seconds,
        expires_at=row.vm_expires_at,
        memory_mb=row.vm_memory_mb,
        wish=wish_of(row.vm_driver, row.vm_min_isolation),
        generation=row.vm_generation,
        metadata=dict(row.vm_metadata),
        image_variant=row.vm_image_variant,
        idle_seconds=row.vm_idle_seconds,
        egress_policy=EgressPolicy() if row.vm_egress_policy is None else policy_of(row.vm_egress_policy),
        env_sealed=row.vm_env_sealed,
        hold_until=row.vm_hold_until,
        hold_reason=row.vm_hold_reason,
        end_reason=None if row.vm_end_reason is None else VmEnd(row.vm_end_reason),
        ended_at=row.destroyed_at,
        snapshot_id=row.vm_snapshot_id,
        restored=row.vm_restored,
        snapshot_on_terminate=row.vm_snapshot_on_terminate,
        snapshot_name=row.vm_snapshot_name,
        auto_suspend=bool(row.vm_auto_suspend),
        auto_resume=row.vm_auto_resume is not False,
        suspend_reason=row.vm_suspend_reason,
        woken_by=row.vm_woken_by,
    )
    return vm, instance
