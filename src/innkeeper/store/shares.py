"""Shares. A revoked one has no row; one of an instance that is gone goes with the instance's row."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.share import Share
from innkeeper.store.tables import instances
from innkeeper.store.tables import shares as table


def insert(connection: sa.Connection, share: Share) -> None:
    """Store a new share."""
    connection.execute(
        sa.insert(table).values(
            id=share.id,
            organization_id=share.organization_id,
            instance_id=share.instance_id,
            name=share.name,
            port=share.port,
            is_public=share.is_public,
            created_at=share.created_at,
        )
    )


def count(connection: sa.Connection, instance_id: UUID) -> int:
    """How many shares an instance has."""
    found = connection.execute(sa.select(sa.func.count()).where(table.c.instance_id == instance_id))
    return int(found.scalar_one())


def set_public(connection: sa.Connection, share_id: UUID, *, is_public: bool) -> bool:
    """Whether there was such a share."""
    done = connection.execute(sa.update(table).where(table.c.id == share_id).values(is_public=is_public))
    return done.rowcount > 0


def delete(connection: sa.Connection, share_id: UUID) -> bool:
    """Whether there was such a share."""
    return connection.execute(sa.delete(table).where(table.c.id == share_id)).rowcount > 0


def every(connection: sa.Connection) -> list[Share]:
    """The shares of all instances that are not destroyed, oldest first."""
    query = (
        sa.select(table)
        .join(instances, instances.c.id == table.c.instance_id)
        .where(instances.c.destroyed_at.is_(None))
        .order_by(table.c.created_at, table.c.id)
    )
    return [_share(row) for row in connection.execute(query)]


def _share(row: Any) -> Share:
    return Share(row.id, row.organization_id, row.instance_id, row.name, row.port, row.is_public, row.created_at)
