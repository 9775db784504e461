"""Instances: the rows that the reconciler keeps true."""

from __future__ import annotations

from collections.abc import Mapping, Set
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.image_config import config_from_json, config_to_json
from innkeeper.core.instance import BootStep, Instance, InstanceState, Isolation
from innkeeper.store.tables import instances, rooms, vm_events, vms

_S = InstanceState
_GONE = _S.DESTROYED.value
# States in which a row rests until someone asks for something.
_SETTLED = (_S.READY.value, _S.SUSPENDED.value, _S.STOPPED.value, _S.FAILED.value)

# Statements that every room's life needs, made once, with their values as parameters: to make one anew costs more than to run it.
_INSERT = sa.insert(instances)
_ADVANCE = sa.update(instances).where(
    instances.c.id == sa.bindparam("row"), instances.c.revision < sa.bindparam("before")
)


def insert(
    connection: sa.Connection, instance: Instance, *, lock_token: UUID | None, now: datetime, ttl_seconds: float
) -> None:
    """Store a new instance, leased to whoever has `lock_token`."""
    connection.execute(
        _INSERT,
        {
            "id": instance.id,
            "organization_id": instance.organization_id,
            "public_id": instance.public_id,
            "profile_id": instance.profile_id,
            "image": instance.image,
            "image_config": None if instance.image_config is None else config_to_json(instance.image_config),
            "created_at": instance.created_at,
            "last_active_at": instance.last_active_at,
            "labels": instance.labels,
            "lock_token": lock_token,
            "lock_expires_at": None if lock_token is None else now + timedelta(seconds=ttl_seconds),
            **state_values(instance),
        },
    )


def state_values(instance: Instance) -> dict[str, Any]:
    """The columns that change over the life of an instance."""
    isolation = instance.isolation
    return {
        "image_digest": instance.image_digest,
        "vcpu_count": instance.vcpu_count,
        "memory_mb": instance.memory_mb,
        "disk_mb": instance.disk_mb,
        "host_id": instance.host_id,
        "desired": instance.desired,
        "state": instance.state.value,
        "failure": instance.failure,
        "boot_trace": [[step.step, step.at_ms] for step in instance.boot_trace],
        "isolation": None
        if isolation is None
        else [isolation.level, isolation.driver, isolation.platform, isolation.reason, isolation.accelerator],
        "revision": instance.revision,
    }


def advance(connection: sa.Connection, instance: Instance) -> bool:
    """Whether the stored row was older and is now as given: the guard for changes that need no lease."""
    done = connection.execute(_ADVANCE, {"row": instance.id, "before": instance.revision, **state_values(instance)})
    return done.rowcount == 1


def get(connection: sa.Connection, instance_id: UUID) -> Instance | None:
    """One instance, in whatever state."""
    row = connection.execute(sa.select(instances).where(instances.c.id == instance_id)).one_or_none()
    return None if row is None else instance_of(row)


def delete(connection: sa.Connection, instance_id: UUID) -> None:
    """Forget a row with its handles: for an instance that nobody was ever told about."""
    for table in (rooms, vm_events, vms):
        connection.execute(sa.delete(table).where(table.c.instance_id == instance_id))
    connection.execute(sa.delete(instances).where(instances.c.id == instance_id))


def delete_labelled(connection: sa.Connection, label: str) -> None:
    """Forget the rows of guests that work of the server's had, by its label: what a host has of them is an orphan then, which it is told to destroy."""
    alive = sa.select(instances.c.id, instances.c.labels).where(instances.c.state != _GONE)
    guests = [row.id for row in connection.execute(alive) if label in row.labels]
    if guests:
        connection.execute(sa.delete(instances).where(instances.c.id.in_(guests)))


def delete_destroyed(connection: sa.Connection, before: datetime, *, limit: int) -> int:
    """Forget the instances that were destroyed before a time, at most `limit`, oldest first; how many went."""
    query = (
        sa.select(instances.c.id)
        .where(instances.c.destroyed_at < before, instances.c.state == _GONE)
        .order_by(instances.c.destroyed_at)
        .limit(limit)
    )
    old = list(connection.execute(query).scalars())
    for table in (vm_events, vms):
        connection.execute(sa.delete(table).where(table.c.instance_id.in_(old)))
    return connection.execute(sa.delete(instances).where(instances.c.id.in_(old))).rowcount


def forget_others(connection: sa.Connection, host_id: UUID, kept: Set[UUID], now: datetime) -> int:
    """Mark the host's living instances that are not in `kept` as destroyed, their rooms with them; how many. For a copy of the database."""
    others = alive_on_host(connection, host_id) - kept
    for instance_id in others:
        connection.execute(sa.delete(rooms).where(rooms.c.instance_id == instance_id))
        connection.execute(sa.update(vms).where(vms.c.instance_id == instance_id).values(end_reason="lost"))
        gone = {"state": _GONE, "desired": "destroyed", "destroyed_at": now}
        connection.execute(sa.update(instances).where(instances.c.id == instance_id).values(**gone))
    return len(others)


def unsettled(connection: sa.Connection, *, now: datetime) -> list[UUID]:
    """Ids of the rows that are not as desired and that nobody works on."""
    query = sa.select(instances.c.id).where(
        instances.c.state != _GONE,
        sa.or_(instances.c.lock_token.is_(None), instances.c.lock_expires_at <= now),
        sa.or_(instances.c.desired == "destroyed", instances.c.state.not_in(_SETTLED)),
    )
    return list(connection.execute(query).scalars())


def alive_on_host(connection: sa.Connection, host_id: UUID) -> set[UUID]:
    """Ids of the instances that have, or may have, a machine or a disk on the host."""
    query = sa.select(instances.c.id).where(instances.c.host_id == host_id, instances.c.state != _GONE)
    return set(connection.execute(query).scalars())


def organizations_on_host(connection: sa.Connection, host_id: UUID) -> dict[UUID, UUID]:
    """Whose the instances are that have, or may have, a machine or a disk on the host."""
    query = sa.select(instances.c.id, instances.c.organization_id)
    rows = connection.execute(query.where(instances.c.host_id == host_id, instances.c.state != _GONE))
    return {row.id: row.organization_id for row in rows}


def usage(connection: sa.Connection, organization_id: UUID) -> tuple[int, int]:
    """How many instances the organization has, and the sum of their memory in MiB: of a VM what it has, or what its next start gets where that is more."""
    more = sa.case((vms.c.memory_mb > instances.c.memory_mb, vms.c.memory_mb), else_=instances.c.memory_mb)
    query = (
        sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(more), 0))
        .select_from(instances.outerjoin(vms, vms.c.instance_id == instances.c.id))
        .where(instances.c.organization_id == organization_id, instances.c.state != _GONE)
    )
    count, memory_mb = connection.execute(query).one()
    return count, memory_mb


def set_last_active(connection: sa.Connection, active: Mapping[UUID, datetime]) -> None:
    """Note when instances were last used."""
    if active:
        connection.execute(
            sa.update(instances)
            .where(instances.c.id == sa.bindparam("instance_id"))
            .values(last_active_at=sa.bindparam("active_at")),
            [{"instance_id": instance_id, "active_at": at} for instance_id, at in active.items()],
        )


def instance_of(row: Any) -> Instance:
    """The instance of a row that has all columns of the table."""
    return Instance(
        id=row.id,
        organization_id=row.organization_id,
        public_id=row.public_id,
        profile_id=row.profile_id,
        image=row.image,
        state=InstanceState(row.state),
        created_at=row.created_at,
        host_id=row.host_id,
        desired=row.desired,
        failure=row.failure,
        boot_trace=tuple(BootStep(step, at_ms) for step, at_ms in row.boot_trace),
        # Rows that are older than the accelerator end before it.
        isolation=None if row.isolation is None else Isolation(*row.isolation),
        last_active_at=row.last_active_at,
        revision=row.revision,
        labels=dict(row.labels),
        image_digest=row.image_digest,
        image_config=None if row.image_config is None else config_from_json(row.image_config),
        vcpu_count=row.vcpu_count,
        memory_mb=row.memory_mb,
        disk_mb=row.disk_mb,
    )
