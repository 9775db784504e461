"""Snapshots: rows that say whose a checkpoint of a host is. One that is deleted has no row."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.image_config import config_from_json, config_to_json
from innkeeper.core.snapshot import Check, Mark, Snapshot, SnapshotStatus
from innkeeper.core.vm import policy_of
from innkeeper.store.tables import snapshots as table

_CREATING, _READY, _FAILED = (status.value for status in list(SnapshotStatus)[:3])
_DAMAGED = SnapshotStatus.DAMAGED.value
_OF_IMAGE = table.c.oci_image.is_not(None)


def insert(
    connection: sa.Connection, snapshot: Snapshot, *, lock_token: UUID, now: datetime, ttl_seconds: float
) -> None:
    """Store a new snapshot, leased to whoever has `lock_token`."""
    connection.execute(
        sa.insert(table).values(
            id=snapshot.id,
            organization_id=snapshot.organization_id,
            instance_id=snapshot.instance_id,
            host_id=snapshot.host_id,
            created_at=snapshot.created_at,
            driver=snapshot.driver,
            image=snapshot.image,
            vcpu_count=snapshot.vcpu_count,
            memory_mb=snapshot.memory_mb,
            disk_mb=snapshot.disk_mb,
            egress_policy=asdict(snapshot.egress_policy),
            parent_id=snapshot.parent_id,
            passing=snapshot.passing,
            volumes=[str(one) for one in snapshot.volumes],
            oci_image=snapshot.oci_image,
            env_sealed=snapshot.env_sealed,
            lock_token=lock_token,
            lock_expires_at=now + timedelta(seconds=ttl_seconds),
            **outcome(snapshot),
        )
    )


def outcome(snapshot: Snapshot) -> dict[str, Any]:
    """The columns that change over its life."""
    return {
        "name": snapshot.name,
        "status": snapshot.status.value,
        "memory": snapshot.memory,
        "image_digest": snapshot.image_digest,
        "image_config": None if snapshot.image_config is None else config_to_json(snapshot.image_config),
        "disk_bytes": snapshot.disk_bytes,
        "memory_bytes": snapshot.memory_bytes,
        "downtime_ms": snapshot.downtime_ms,
        "error": snapshot.error,
        "mark": None if snapshot.mark is None else asdict(snapshot.mark),
    }


def get(connection: sa.Connection, snapshot_id: UUID) -> Snapshot | None:
    """One snapshot, in whatever state."""
    row = connection.execute(sa.select(table).where(table.c.id == snapshot_id)).one_or_none()
    return None if row is None else _snapshot(row)


def count(connection: sa.Connection, organization_id: UUID) -> int:
    """How many snapshots the organization has, failed ones included, whose rows say why."""
    query = sa.select(sa.func.count()).where(table.c.organization_id == organization_id)
    return connection.execute(query).scalar_one()


def of_organization(connection: sa.Connection, organization_id: UUID) -> list[Snapshot]:
    """An organization's snapshots, newest first."""
    query = sa.select(table).where(table.c.organization_id == organization_id).order_by(table.c.id.desc())
    return [_snapshot(row) for row in connection.execute(query)]


def children(connection: sa.Connection, snapshot_id: UUID) -> list[UUID]:
    """Ids of the snapshots of instances that began with this one, oldest first."""
    query = sa.select(table.c.id).where(table.c.parent_id == snapshot_id).order_by(table.c.id)
    return list(connection.execute(query).scalars())


def on_host(connection: sa.Connection, host_id: UUID) -> list[Snapshot]:
    """All of a host's that are checkpoints, whatever their state."""
    query = sa.select(table).where(table.c.host_id == host_id, ~_OF_IMAGE).order_by(table.c.id)
    return [_snapshot(row) for row in connection.execute(query)]


def image_bytes(connection: sa.Connection, organization_id: UUID) -> int:
    """What the organization's snapshots that are images have together."""
    query = sa.select(sa.func.coalesce(sa.func.sum(table.c.disk_bytes), 0))
    return int(connection.execute(query.where(table.c.organization_id == organization_id, _OF_IMAGE)).scalar_one())


def fail_builds(connection: sa.Connection, error: str) -> list[UUID]:
    """Those that were being built have failed: for the start of a server. Their ids."""
    query = sa.select(table.c.id).where(table.c.status == _CREATING, _OF_IMAGE)
    ids = list(connection.execute(query).scalars())
    values = {"status": _FAILED, "error": error, "image_digest": "", "disk_bytes": None}
    connection.execute(sa.update(table).where(table.c.id.in_(ids)).values(**values))
    return ids


def image_ids(connection: sa.Connection) -> set[UUID]:
    """Ids of all that are images."""
    return set(connection.execute(sa.select(table.c.id).where(_OF_IMAGE)).scalars())


def kept(connection: sa.Connection, host_id: UUID) -> set[UUID]:
    """Ids of the checkpoints of a host that are somebody's."""
    query = sa.select(table.c.id).where(table.c.host_id == host_id, table.c.status != _FAILED)
    return set(connection.execute(query).scalars())


def undigested(connection: sa.Connection) -> list[Snapshot]:
    """Those whose disk has no checksum yet, oldest first."""
    query = sa.select(table).where(
        table.c.status == _READY, table.c.disk_digest.is_(None), table.c.passing.is_(False), ~_OF_IMAGE
    )
    return [_snapshot(row) for row in connection.execute(query.order_by(table.c.id))]


def least_verified(connection: sa.Connection, before: datetime) -> Snapshot | None:
    """The one that was verified, or else taken, longest ago, if that was before a moment and nobody works on it."""
    since = sa.func.coalesce(table.c.verified_at, table.c.created_at)
    query = sa.select(table).where(
        table.c.status == _READY, table.c.passing.is_(False), ~_OF_IMAGE, since < before, table.c.lock_token.is_(None)
    )
    row = connection.execute(query.order_by(since, table.c.id).limit(1)).one_or_none()
    return None if row is None else _snapshot(row)


def set_digest(connection: sa.Connection, snapshot_id: UUID, digest: str) -> None:
    """Note the checksum of its disk, once."""
    query = sa.update(table).where(table.c.id == snapshot_id, table.c.disk_digest.is_(None))
    connection.execute(query.values(disk_digest=digest))


def verification(checks: Sequence[Check], now: datetime) -> dict[str, Any]:
    """The columns that a verification changes: what is damaged becomes usable again where it turns out to be whole."""
    failed = [f"{one.name}: {one.detail}" for one in checks if one.ok is False]
    return {
        "status": (SnapshotStatus.DAMAGED if failed else SnapshotStatus.READY).value,
        "error": "; ".join(failed) or None,
        "verified_at": now,
        "checks": [asdict(one) for one in checks],
    }


def mark_damaged(connection: sa.Connection, snapshot_id: UUID, error: str) -> None:
    """What was ready turned out to be damaged."""
    query = sa.update(table).where(table.c.id == snapshot_id, table.c.status == _READY)
    connection.execute(query.values(status=SnapshotStatus.DAMAGED.value, error=error))


def rename(connection: sa.Connection, snapshot_id: UUID, name: str) -> bool:
    """Whether there was such a snapshot."""
    return connection.execute(sa.update(table).where(table.c.id == snapshot_id).values(name=name)).rowcount > 0


def fail_ready(connection: sa.Connection, snapshot_id: UUID, error: str) -> bool:
    """Whether it was there, and is of no use from now on."""
    query = sa.update(table).where(table.c.id == snapshot_id, table.c.status.in_((_READY, _DAMAGED)))
    return connection.execute(query.values(status=_FAILED, error=error)).rowcount > 0


def without_checkpoints(connection: sa.Connection, images: Set[str], error: str) -> None:
    """For a copy of the database that goes without the checkpoints, and with these images: all others are of no use, and say why."""
    ready = sa.select(table.c.id, table.c.image_digest).where(_OF_IMAGE, table.c.status == _READY)
    stay = [row.id for row in connection.execute(ready) if row.image_digest in images]
    others = sa.update(table).where(table.c.id.not_in(stay))
    unfinished = table.c.status.in_((_CREATING, _READY, _DAMAGED))
    connection.execute(others.where(unfinished).values(status=_FAILED, error=error))
    connection.execute(others.where(_OF_IMAGE).values(image_digest=""))


def delete(connection: sa.Connection, snapshot_id: UUID) -> bool:
    """Whether there was such a snapshot."""
    return connection.execute(sa.delete(table).where(table.c.id == snapshot_id)).rowcount > 0


def _snapshot(row: Any) -> Snapshot:
    return Snapshot(
        id=row.id,
        organization_id=row.organization_id,
        instance_id=row.instance_id,
        host_id=row.host_id,
        name=row.name,
        status=SnapshotStatus(row.status),
        created_at=row.created_at,
        memory=row.memory,
        driver=row.driver,
        image=row.image,
        image_digest=row.image_digest,
        image_config=None if row.image_config is None else config_from_json(row.image_config),
        vcpu_count=row.vcpu_count,
        memory_mb=row.memory_mb,
        disk_mb=row.disk_mb,
        egress_policy=policy_of(row.egress_policy),
        parent_id=row.parent_id,
        passing=row.passing,
        volumes=tuple(UUID(one) for one in row.volumes),
        disk_bytes=row.disk_bytes,
        memory_bytes=row.memory_bytes,
        downtime_ms=row.downtime_ms,
        error=row.error,
        mark=None if row.mark is None else Mark(**row.mark),
        disk_digest=row.disk_digest,
        verified_at=row.verified_at,
        checks=tuple(Check(**one) for one in row.checks or ()),
        oci_image=row.oci_image,
        env_sealed=row.env_sealed,
    )
