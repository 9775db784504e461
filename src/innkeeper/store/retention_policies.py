"""Retention policies: a row per organization that has one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.retention_policy import RetentionPolicy, RetentionRule
from innkeeper.store.tables import retention_policies as table


def get(connection: sa.Connection, organization_id: UUID) -> RetentionPolicy:
    """The organization's policy; one without rules where it has none."""
    row = connection.execute(sa.select(table).where(table.c.organization_id == organization_id)).one_or_none()
    return RetentionPolicy() if row is None else _policy(row)


def put(connection: sa.Connection, organization_id: UUID, policy: RetentionPolicy) -> None:
    """Store it in the place of what there was."""
    connection.execute(sa.delete(table).where(table.c.organization_id == organization_id))
    rules = {"snapshots": asdict(policy.snapshots), "volume_checkpoints": asdict(policy.volume_checkpoints)}
    connection.execute(sa.insert(table).values(organization_id=organization_id, **rules))


def every(connection: sa.Connection) -> list[tuple[UUID, RetentionPolicy]]:
    """All of them, with whose they are."""
    return [(row.organization_id, _policy(row)) for row in connection.execute(sa.select(table))]


def _policy(row: Any) -> RetentionPolicy:
    return RetentionPolicy(RetentionRule(**row.snapshots), RetentionRule(**row.volume_checkpoints))
