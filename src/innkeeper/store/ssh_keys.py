"""Public keys of an organization's people, numbered within it."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.ssh_key import SshKey
from innkeeper.store.tables import ssh_keys


def insert(connection: sa.Connection, organization_id: UUID, key: SshKey) -> None:
    """Store a key under its number. Raises IntegrityError when the number is there."""
    connection.execute(
        sa.insert(ssh_keys).values(
            organization_id=organization_id,
            number=key.number,
            public_key=key.public_key,
            fingerprint=key.fingerprint,
            comment=key.comment,
            created_at=key.created_at,
        )
    )


def next_number(connection: sa.Connection, organization_id: UUID) -> int:
    """A number that no key of the organization has or had."""
    query = sa.select(sa.func.coalesce(sa.func.max(ssh_keys.c.number), 0))
    return int(connection.execute(query.where(ssh_keys.c.organization_id == organization_id)).scalar_one()) + 1


def by_fingerprint(connection: sa.Connection, organization_id: UUID, fingerprint: str) -> SshKey | None:
    """The organization's key of a fingerprint."""
    query = sa.select(ssh_keys).where(
        ssh_keys.c.organization_id == organization_id,
        ssh_keys.c.fingerprint == fingerprint,
        ssh_keys.c.removed_at.is_(None),
    )
    row = connection.execute(query).one_or_none()
    return None if row is None else _key(row)


def numbers_of(connection: sa.Connection, fingerprint: str) -> dict[UUID, int]:
    """The number of the key of a fingerprint, in each organization that has it."""
    query = sa.select(ssh_keys.c.organization_id, ssh_keys.c.number).where(
        ssh_keys.c.fingerprint == fingerprint, ssh_keys.c.removed_at.is_(None)
    )
    return {row.organization_id: row.number for row in connection.execute(query)}


def of_organization(connection: sa.Connection, organization_id: UUID) -> list[SshKey]:
    """The organization's keys, oldest first."""
    mine = (ssh_keys.c.organization_id == organization_id) & ssh_keys.c.removed_at.is_(None)
    query = sa.select(ssh_keys).where(mine).order_by(ssh_keys.c.number)
    return [_key(row) for row in connection.execute(query)]


def remove(connection: sa.Connection, organization_id: UUID, number: int, at: datetime) -> bool:
    """Whether the organization had the key, which nobody sees any more."""
    done = connection.execute(
        sa.update(ssh_keys)
        .where(
            ssh_keys.c.organization_id == organization_id, ssh_keys.c.number == number, ssh_keys.c.removed_at.is_(None)
        )
        .values(removed_at=at, public_key="", comment="")
    )
    return done.rowcount == 1


def _key(row: Any) -> SshKey:
    return SshKey(row.number, row.public_key, row.fingerprint, row.comment, row.created_at)
