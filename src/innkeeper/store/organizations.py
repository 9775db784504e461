"""Organizations and their users."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.token import Organization, User
from innkeeper.store.tables import organizations, users


def insert(connection: sa.Connection, organization: Organization) -> None:
    """Store an organization. Raises IntegrityError when the name is taken."""
    connection.execute(
        sa.insert(organizations).values(
            id=organization.id,
            name=organization.name,
            created_at=organization.created_at,
            max_instances=organization.max_instances,
            max_memory_mb=organization.max_memory_mb,
        )
    )


def insert_user(connection: sa.Connection, user: User) -> None:
    """Store a user. Raises IntegrityError when the organization has one of that email."""
    connection.execute(
        sa.insert(users).values(
            id=user.id, organization_id=user.organization_id, email=user.email, created_at=user.created_at
        )
    )


def first_user(connection: sa.Connection, organization_id: UUID) -> User | None:
    """The organization's oldest user."""
    query = sa.select(users).where(users.c.organization_id == organization_id).order_by(users.c.id).limit(1)
    row = connection.execute(query).one_or_none()
    return None if row is None else User(row.id, row.organization_id, row.email, row.created_at)


def user(connection: sa.Connection, user_id: UUID) -> User | None:
    """The user of an id."""
    row = connection.execute(sa.select(users).where(users.c.id == user_id)).one_or_none()
    return None if row is None else User(row.id, row.organization_id, row.email, row.created_at)


def get(connection: sa.Connection, organization_id: UUID) -> Organization | None:
    """The organization of an id."""
    row = connection.execute(sa.select(organizations).where(organizations.c.id == organization_id)).one_or_none()
    return None if row is None else _organization(row)


def by_name(connection: sa.Connection, name: str) -> Organization | None:
    """The organization of a name."""
    row = connection.execute(sa.select(organizations).where(organizations.c.name == name)).one_or_none()
    return None if row is None else _organization(row)


def every(connection: sa.Connection) -> list[Organization]:
    """All organizations, oldest first."""
    return [_organization(row) for row in connection.execute(sa.select(organizations).order_by(organizations.c.id))]


def set_limits(
    connection: sa.Connection, organization_id: UUID, *, max_instances: int | None, max_memory_mb: int | None
) -> bool:
    """Whether the organization exists and now has these limits."""
    done = connection.execute(
        sa.update(organizations)
        .where(organizations.c.id == organization_id)
        .values(max_instances=max_instances, max_memory_mb=max_memory_mb)
    )
    return done.rowcount == 1


def _organization(row: Any) -> Organization:
    return Organization(
        id=row.id,
        name=row.name,
        created_at=row.created_at,
        max_instances=row.max_instances,
        max_memory_mb=row.max_memory_mb,
    )
