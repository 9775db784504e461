"""Credentials for registries; the password is stored sealed only."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from innkeeper.store.tables import registry_credentials as table


@dataclass(frozen=True, slots=True)
class StoredCredential:
    """Who an organization is at a registry."""

    id: UUID
    organization_id: UUID
    registry: str
    username: str
    updated_at: datetime
    password_sealed: bytes = field(repr=False)


def put(connection: sa.Connection, credential: StoredCredential) -> None:
    """Store a credential in place of the one that the organization had for the registry."""
    delete(connection, credential.organization_id, credential.registry)
    connection.execute(
        sa.insert(table).values(
            id=credential.id,
            organization_id=credential.organization_id,
            registry=credential.registry,
            username=credential.username,
            password_sealed=credential.password_sealed,
            updated_at=credential.updated_at,
        )
    )


def delete(connection: sa.Connection, organization_id: UUID, registry: str) -> bool:
    """Whether there was one."""
    done = connection.execute(
        sa.delete(table).where(table.c.organization_id == organization_id, table.c.registry == registry)
    )
    return done.rowcount > 0


def get(connection: sa.Connection, organization_id: UUID, registry: str) -> StoredCredential | None:
    """The organization's credential for a registry."""
    row = connection.execute(
        sa.select(table).where(table.c.organization_id == organization_id, table.c.registry == registry)
    ).one_or_none()
    return None if row is None else _credential(row)


def of_organization(connection: sa.Connection, organization_id: UUID) -> list[StoredCredential]:
    """All credentials of an organization, by registry."""
    query = sa.select(table).where(table.c.organization_id == organization_id).order_by(table.c.registry)
    return [_credential(row) for row in connection.execute(query)]


def _credential(row: Any) -> StoredCredential:
    return StoredCredential(
        row.id, row.organization_id, row.registry, row.username, row.updated_at, password_sealed=row.password_sealed
    )
