"""Executions of VMs: which there are, and where."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.execution import ExecutionRow
from innkeeper.store.tables import executions


def insert(connection: sa.Connection, *rows: ExecutionRow) -> None:
    """Store executions that were begun."""
    connection.execute(
        sa.insert(executions),
        [
            {
                "id": row.id,
                "organization_id": row.organization_id,
                "instance_id": row.instance_id,
                "kind": row.kind,
                "created_at": row.created_at,
            }
            for row in rows
        ],
    )


def get(connection: sa.Connection, execution_id: UUID) -> ExecutionRow | None:
    """One execution."""
    row = connection.execute(sa.select(executions).where(executions.c.id == execution_id)).one_or_none()
    return None if row is None else _row(row)


def page(connection: sa.Connection, instance_id: UUID, *, before: UUID | None, limit: int) -> list[ExecutionRow]:
    """A VM's executions, newest first, from before the one named."""
    query = sa.select(executions).where(executions.c.instance_id == instance_id)
    if before is not None:
        query = query.where(executions.c.id < before)
    return [_row(row) for row in connection.execute(query.order_by(executions.c.id.desc()).limit(limit))]


def delete_older(connection: sa.Connection, before: datetime, *, limit: int) -> int:
    """Delete the oldest rows from before that moment; how many went."""
    old = sa.select(executions.c.id).where(executions.c.created_at < before).limit(limit)
    return int(connection.execute(sa.delete(executions).where(executions.c.id.in_(old))).rowcount)


def _row(row: sa.Row[tuple[object, ...]]) -> ExecutionRow:
    return ExecutionRow(**row._mapping)
