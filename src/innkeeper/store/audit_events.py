"""The audit log: appended to, read by page, never changed."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.event import AuditEvent
from innkeeper.store.tables import audit_events


def insert(connection: sa.Connection, *events: AuditEvent) -> None:
    """Append events."""
    if events:
        connection.execute(
            sa.insert(audit_events),
            [
                {
                    "id": event.id,
                    "organization_id": event.organization_id,
                    "at": event.at,
                    "actor": event.actor,
                    "action": event.action,
                    "object_type": event.object_type,
                    "object_id": event.object_id,
                    "details": event.details,
                }
                for event in events
            ],
        )


def page(connection: sa.Connection, organization_id: UUID, *, before: UUID | None, limit: int) -> Sequence[AuditEvent]:
    """Events of an organization, newest first, that are older than `before`."""
    query = sa.select(audit_events).where(audit_events.c.organization_id == organization_id)
    if before is not None:
        query = query.where(audit_events.c.id < before)
    return [
        AuditEvent(
            id=row.id,
            organization_id=row.organization_id,
            at=row.at,
            actor=row.actor,
            action=row.action,
            object_type=row.object_type,
            object_id=row.object_id,
            details=dict(row.details),
        )
        for row in connection.execute(query.order_by(audit_events.c.id.desc()).limit(limit))
    ]
