"""Leased rows: who works on a row holds its `lock_token` until `lock_expires_at`, and applies its outcome only while it still does.

The work itself (asking a host) happens outside any transaction. An apply that finds another token is stale and is dropped.
"""

from __future__ import annotations

import functools
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa


@functools.cache
def _take(table: sa.Table) -> sa.Update:
    expired = sa.or_(
        table.c.lock_token.is_(None), table.c.lock_expires_at.is_(None), table.c.lock_expires_at <= sa.bindparam("now")
    )
    return sa.update(table).where(table.c.id == sa.bindparam("row"), expired)


@functools.cache
def _held(table: sa.Table) -> sa.Update:
    return sa.update(table).where(table.c.id == sa.bindparam("row"), table.c.lock_token == sa.bindparam("held"))


def take(connection: sa.Connection, table: sa.Table, row_id: UUID, *, now: datetime, ttl_seconds: float) -> UUID | None:
    """A fresh token for the row, or None while someone else holds it."""
    token = uuid4()
    values = {"lock_token": token, "lock_expires_at": now + timedelta(seconds=ttl_seconds)}
    done = connection.execute(_take(table), {"row": row_id, "now": now, **values})
    return token if done.rowcount == 1 else None


def renew(
    connection: sa.Connection, table: sa.Table, row_id: UUID, token: UUID, *, now: datetime, ttl_seconds: float
) -> bool:
    """Whether the lease was still held and now lasts longer."""
    values = {"lock_expires_at": now + timedelta(seconds=ttl_seconds)}
    done = connection.execute(_held(table), {"row": row_id, "held": token, **values})
    return done.rowcount == 1


def apply(
    connection: sa.Connection, table: sa.Table, row_id: UUID, token: UUID, values: dict[str, Any], *, release: bool
) -> bool:
    """Whether the values were stored: only while `token` is the row's. `release` gives the lease back with them."""
    if release:
        values = {**values, "lock_token": None, "lock_expires_at": None}
    done = connection.execute(_held(table), {"row": row_id, "held": token, **values})
    return done.rowcount == 1


def break_all(connection: sa.Connection, table: sa.Table) -> int:
    """Free every row, and how many were held: for a process that knows it is the only one on this database, at its start."""
    done = connection.execute(
        sa.update(table).where(table.c.lock_token.is_not(None)).values(lock_token=None, lock_expires_at=None)
    )
    return done.rowcount
