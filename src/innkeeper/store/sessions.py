"""Sessions: the handles that get VMs."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.vm import Session, stored_request
from innkeeper.store.tables import sessions, vms


def insert(connection: sa.Connection, session: Session) -> None:
    """Store a session."""
    connection.execute(
        sa.insert(sessions).values(
            id=session.id,
            organization_id=session.organization_id,
            created_at=session.created_at,
            request=session.request.stored(),
            env_sealed=session.env_sealed,
        )
    )


def get(connection: sa.Connection, session_id: UUID) -> Session | None:
    """One session, of any organization."""
    row = connection.execute(sa.select(sessions).where(sessions.c.id == session_id)).one_or_none()
    if row is None:
        return None
    return Session(row.id, row.organization_id, row.created_at, stored_request(row.request), row.env_sealed)


def delete_unused(connection: sa.Connection, session_id: UUID) -> None:
    """Forget a session, unless a VM of it is known."""
    used = sa.exists().where(vms.c.session_id == session_id)
    connection.execute(sa.delete(sessions).where(sessions.c.id == session_id, ~used))


def delete_old(connection: sa.Connection, before: datetime, *, limit: int) -> int:
    """Forget sessions that began before a time and of which no VM is known, at most `limit`; how many went."""
    query = (
        sa.select(sessions.c.id)
        .where(sessions.c.created_at < before, ~sa.exists().where(vms.c.session_id == sessions.c.id))
        .order_by(sessions.c.created_at)
        .limit(limit)
    )
    old = list(connection.execute(query).scalars())
    return connection.execute(sa.delete(sessions).where(sessions.c.id.in_(old))).rowcount
