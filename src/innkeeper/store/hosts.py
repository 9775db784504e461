"""Hosts that were ever seen."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.host import Host
from innkeeper.store.tables import hosts


def seen(connection: sa.Connection, host: Host, now: datetime) -> Host:
    """Note that a host answered; the stored host, whose `draining` is the operator's word."""
    done = connection.execute(
        sa.update(hosts).where(hosts.c.id == host.id).values(name=host.name, address=host.address, last_seen_at=now)
    )
    if done.rowcount == 0:
        connection.execute(
            sa.insert(hosts).values(
                id=host.id, name=host.name, address=host.address, draining=host.draining, last_seen_at=now
            )
        )
    row = connection.execute(sa.select(hosts).where(hosts.c.id == host.id)).one()
    return _host(row)


def every(connection: sa.Connection) -> list[Host]:
    """All hosts, by name."""
    return [_host(row) for row in connection.execute(sa.select(hosts).order_by(hosts.c.name, hosts.c.id))]


def set_draining(connection: sa.Connection, host_id: UUID, *, draining: bool, deadline: datetime | None) -> bool:
    """Whether the host exists and is now marked so."""
    change = sa.update(hosts).where(hosts.c.id == host_id).values(draining=draining, drain_deadline=deadline)
    return connection.execute(change).rowcount == 1


def _host(row: sa.Row[Any]) -> Host:
    return Host(id=row.id, name=row.name, address=row.address, draining=row.draining, drain_deadline=row.drain_deadline)
