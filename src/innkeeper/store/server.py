"""What the server knows of itself: key and value."""

from __future__ import annotations

import sqlalchemy as sa

from innkeeper.store.tables import server


def get(connection: sa.Connection, key: str) -> str | None:
    """The value of a key."""
    return connection.execute(sa.select(server.c.value).where(server.c.key == key)).scalar_one_or_none()


def put(connection: sa.Connection, key: str, value: str) -> None:
    """Store a value in place of any older one."""
    if connection.execute(sa.update(server).where(server.c.key == key).values(value=value)).rowcount == 0:
        connection.execute(sa.insert(server).values(key=key, value=value))
