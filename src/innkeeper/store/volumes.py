"""Volumes, their checkpoints, and the mounts of instances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.instance import InstanceState
from innkeeper.core.volume import Mount, MountState, Volume, VolumeStatus
from innkeeper.store.tables import instances
from innkeeper.store.tables import volume_mounts as mounts
from innkeeper.store.tables import volumes as table


def insert(connection: sa.Connection, volume: Volume, *, lock_token: UUID, now: datetime, ttl_seconds: float) -> None:
    """Store a new volume, leased to whoever has `lock_token`."""
    connection.execute(
        sa.insert(table).values(
            id=volume.id,
            organization_id=volume.organization_id,
            host_id=volume.host_id,
            checkpoint_of=volume.checkpoint_of,
            created_at=volume.created_at,
            lock_token=lock_token,
            lock_expires_at=now + timedelta(seconds=ttl_seconds),
            **outcome(volume),
        )
    )


def outcome(volume: Volume) -> dict[str, Any]:
    """The columns that change over its life."""
    return {"name": volume.name, "size_mb": volume.size_mb, "status": volume.status.value, "error": volume.error}


def get(connection: sa.Connection, volume_id: UUID) -> Volume | None:
    """One volume or checkpoint, in whatever state."""
    row = connection.execute(sa.select(table).where(table.c.id == volume_id)).one_or_none()
    return None if row is None else _volume(row)


def of_organization(connection: sa.Connection, organization_id: UUID) -> list[Volume]:
    """An organization's volumes, newest first, without checkpoints."""
    query = sa.select(table).where(table.c.organization_id == organization_id, table.c.checkpoint_of.is_(None))
    return [_volume(row) for row in connection.execute(query.order_by(table.c.id.desc()))]


def checkpoints_of(connection: sa.Connection, volume_id: UUID) -> list[Volume]:
    """A volume's checkpoints, newest first."""
    query = sa.select(table).where(table.c.checkpoint_of == volume_id).order_by(table.c.id.desc())
    return [_volume(row) for row in connection.execute(query)]


def on_host(connection: sa.Connection, host_id: UUID) -> list[Volume]:
    """All of a host's, checkpoints before what they are of."""
    query = sa.select(table).where(table.c.host_id == host_id)
    return [_volume(row) for row in connection.execute(query.order_by(table.c.checkpoint_of.is_(None), table.c.id))]


def count(connection: sa.Connection, organization_id: UUID) -> int:
    """How many volumes and checkpoints the organization has."""
    query = sa.select(sa.func.count()).where(table.c.organization_id == organization_id)
    return connection.execute(query).scalar_one()


def rename(connection: sa.Connection, volume_id: UUID, name: str) -> bool:
    """Whether there was such a volume."""
    return connection.execute(sa.update(table).where(table.c.id == volume_id).values(name=name)).rowcount > 0


def fail_ready(connection: sa.Connection, volume_id: UUID, error: str) -> bool:
    """Whether it was ready, and is of no use from now on."""
    query = sa.update(table).where(table.c.id == volume_id, table.c.status == VolumeStatus.READY.value)
    return connection.execute(query.values(status=VolumeStatus.FAILED.value, error=error)).rowcount > 0


def forget_others(connection: sa.Connection, host_id: UUID, sizes_mb: Mapping[UUID, int], error: str) -> None:
    """Of the host's only those of `sizes_mb` are of use, and have these sizes; nobody has another, nor has one who ended: for a copy of the database."""
    ended = sa.select(instances.c.id).where(instances.c.state == InstanceState.DESTROYED.value)
    connection.execute(sa.delete(mounts).where(mounts.c.instance_id.in_(ended)))
    for volume in on_host(connection, host_id):
        if volume.id in sizes_mb:
            connection.execute(sa.update(table).where(table.c.id == volume.id).values(size_mb=sizes_mb[volume.id]))
        elif volume.status in (VolumeStatus.CREATING, VolumeStatus.READY):
            connection.execute(sa.delete(mounts).where(mounts.c.disk_id == volume.id))
            failed = {"status": VolumeStatus.FAILED.value, "error": error}
            connection.execute(sa.update(table).where(table.c.id == volume.id).values(**failed))


def delete(connection: sa.Connection, volume_id: UUID) -> bool:
    """Whether there was such a volume."""
    return connection.execute(sa.delete(table).where(table.c.id == volume_id)).rowcount > 0


def insert_mount(connection: sa.Connection, mount: Mount) -> None:
    """Store a mount. Raises IntegrityError where the instance has the disk already."""
    connection.execute(
        sa.insert(mounts).values(
            id=mount.id,
            instance_id=mount.instance_id,
            volume_id=mount.volume_id,
            checkpoint_id=mount.checkpoint_id,
            disk_id=mount.disk_id,
            path=mount.path,
            read_only=mount.read_only,
            state=mount.state.value,
        )
    )


def set_mount_state(connection: sa.Connection, mount_id: UUID, state: MountState) -> None:
    """Note where a mount is on its way."""
    connection.execute(sa.update(mounts).where(mounts.c.id == mount_id).values(state=state.value))


def delete_mount(connection: sa.Connection, mount_id: UUID) -> None:
    """The instance has it no more."""
    connection.execute(sa.delete(mounts).where(mounts.c.id == mount_id))


def delete_mounts_of(connection: sa.Connection, instance_id: UUID) -> None:
    """The instance is no more."""
    connection.execute(sa.delete(mounts).where(mounts.c.instance_id == instance_id))


def every_mount(connection: sa.Connection) -> list[Mount]:
    """All mounts of all organizations, in the order in which they were made."""
    return [_mount(row) for row in connection.execute(sa.select(mounts).order_by(mounts.c.id))]


def mounts_of_disk(connection: sa.Connection, disk_id: UUID) -> list[Mount]:
    """Who has a volume or a checkpoint, whatever state that is in."""
    query = sa.select(mounts).where(mounts.c.disk_id == disk_id).order_by(mounts.c.id)
    return [_mount(row) for row in connection.execute(query)]


def mounts_of_volumes(connection: sa.Connection, volume_ids: Sequence[UUID]) -> list[Mount]:
    """Who has some volumes or checkpoints of them."""
    query = sa.select(mounts).where(mounts.c.volume_id.in_(volume_ids)).order_by(mounts.c.id)
    return [_mount(row) for row in connection.execute(query)]


def _volume(row: Any) -> Volume:
    return Volume(
        id=row.id,
        organization_id=row.organization_id,
        host_id=row.host_id,
        name=row.name,
        size_mb=row.size_mb,
        status=VolumeStatus(row.status),
        created_at=row.created_at,
        checkpoint_of=row.checkpoint_of,
        error=row.error,
    )


def _mount(row: Any) -> Mount:
    return Mount(
        id=row.id,
        instance_id=row.instance_id,
        volume_id=row.volume_id,
        path=row.path,
        read_only=row.read_only,
        state=MountState(row.state),
        checkpoint_id=row.checkpoint_id,
    )
