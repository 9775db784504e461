"""The audit log: appended to, read by page, never changed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.event import FAILURES, AuditEvent, AuditFilter
from innkeeper.ids import before_uuid7
from innkeeper.store.tables import audit_events

_INSERT = sa.insert(audit_events)


def insert(connection: sa.Connection, *events: AuditEvent) -> None:
    """Append events."""
    if events:
        connection.execute(
            _INSERT,
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


def delete_older(connection: sa.Connection, before: datetime, *, limit: int) -> int:
    """Delete the oldest events from before a time, at most `limit`; how many went. Ids ascend with time, so it looks no further than those."""
    newest = before_uuid7(before)
    old = sa.select(audit_events.c.id).where(audit_events.c.id < newest).order_by(audit_events.c.id).limit(limit)
    return connection.execute(sa.delete(audit_events).where(audit_events.c.id.in_(old))).rowcount


def page(
    connection: sa.Connection,
    organization_id: UUID,
    *,
    before: UUID | None,
    limit: int,
    which: AuditFilter | None = None,
) -> Sequence[AuditEvent]:
    """Events of an organization, newest first, that are older than `before`."""
    query = sa.select(audit_events).where(audit_events.c.organization_id == organization_id)
    if before is not None:
        query = query.where(audit_events.c.id < before)
    if which is not None:
        query = query.where(*_conditions(which))
    return [_event(row) for row in connection.execute(query.order_by(audit_events.c.id.desc()).limit(limit))]


def get(connection: sa.Connection, organization_id: UUID, event_id: UUID) -> AuditEvent | None:
    """One event of an organization."""
    query = sa.select(audit_events).where(
        audit_events.c.id == event_id, audit_events.c.organization_id == organization_id
    )
    row = connection.execute(query).one_or_none()
    return None if row is None else _event(row)


def _conditions(which: AuditFilter) -> list[sa.ColumnElement[bool]]:
    found: list[sa.ColumnElement[bool]] = []
    if which.group is not None:
        found.append(audit_events.c.action.startswith(f"{which.group}.", autoescape=True))
    if which.action is not None:
        found.append(audit_events.c.action == which.action)
    if which.actor is not None:
        found.append(audit_events.c.actor == which.actor)
    if which.failed is not None:
        found.append(audit_events.c.action.in_(FAILURES) if which.failed else audit_events.c.action.not_in(FAILURES))
    for key, value in (("instance_id", which.instance_id), ("session_id", which.session_id)):
        if value is not None:
            told = audit_events.c.details[key].as_string() == value
            found.append(sa.or_(audit_events.c.object_id == value, told))
    return found


def _event(row: Any) -> AuditEvent:
    return AuditEvent(
        id=row.id,
        organization_id=row.organization_id,
        at=row.at,
        actor=row.actor,
        action=row.action,
        object_type=row.object_type,
        object_id=row.object_id,
        details=dict(row.details),
    )
