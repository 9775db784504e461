"""Profiles. The values of `env` are stored sealed only; a Profile that comes from here has an empty `env`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.egress_policy import EgressPolicy
from innkeeper.core.profile import Profile
from innkeeper.store.tables import profiles, rooms


@dataclass(frozen=True, slots=True)
class StoredProfile:
    """A profile without the values of its environment, their names, and the sealed JSON object that holds them."""

    profile: Profile
    env_names: tuple[str, ...] = ()
    env_sealed: bytes | None = field(default=None, repr=False)


def insert(connection: sa.Connection, stored: StoredProfile) -> None:
    """Store a profile. Raises IntegrityError when the organization has one of that name."""
    connection.execute(
        sa.insert(profiles).values(
            id=stored.profile.id,
            organization_id=stored.profile.organization_id,
            created_at=stored.profile.created_at,
            **_values(stored),
        )
    )


def update(connection: sa.Connection, stored: StoredProfile, *, from_revision: int) -> bool:
    """Whether the profile was still at `from_revision` and is now as given. Raises IntegrityError when the name is taken."""
    done = connection.execute(
        sa.update(profiles)
        .where(profiles.c.id == stored.profile.id, profiles.c.revision == from_revision)
        .values(**_values(stored))
    )
    return done.rowcount == 1


def delete(connection: sa.Connection, profile_id: UUID) -> bool:
    """Whether the profile was there. Raises IntegrityError while it has rooms."""
    return connection.execute(sa.delete(profiles).where(profiles.c.id == profile_id)).rowcount == 1


def get(connection: sa.Connection, profile_id: UUID) -> StoredProfile | None:
    """One profile, of any organization."""
    row = connection.execute(sa.select(profiles).where(profiles.c.id == profile_id)).one_or_none()
    return None if row is None else _stored(row)


def of_organization(connection: sa.Connection, organization_id: UUID) -> list[StoredProfile]:
    """The profiles of an organization, oldest first."""
    query = sa.select(profiles).where(profiles.c.organization_id == organization_id).order_by(profiles.c.id)
    return [_stored(row) for row in connection.execute(query)]


def every(connection: sa.Connection) -> list[StoredProfile]:
    """All profiles of all organizations, oldest first."""
    return [_stored(row) for row in connection.execute(sa.select(profiles).order_by(profiles.c.id))]


def count_rooms(connection: sa.Connection, profile_id: UUID) -> int:
    """How many rooms were made from the profile and are still there."""
    query = sa.select(sa.func.count()).select_from(rooms).where(rooms.c.profile_id == profile_id)
    return connection.execute(query).scalar_one()


def _values(stored: StoredProfile) -> dict[str, Any]:
    profile = stored.profile
    return {
        "name": profile.name,
        "image": profile.image,
        "vcpu_count": profile.vcpu_count,
        "memory_mb": profile.memory_mb,
        "disk_mb": profile.disk_mb,
        "env_names": list(stored.env_names),
        "env_sealed": stored.env_sealed,
        "user": profile.user,
        "workdir": profile.workdir,
        "egress_policy": profile.egress_policy.as_dict(),
        "driver": profile.driver,
        "min_isolation": profile.min_isolation,
        "warm_pool_size": profile.warm_pool_size,
        "idle_seconds": profile.idle_seconds,
        "command_timeout_seconds": profile.command_timeout_seconds,
        "public_files": profile.public_files,
        "revision": profile.revision,
    }


def _stored(row: Any) -> StoredProfile:
    return StoredProfile(
        Profile(
            id=row.id,
            organization_id=row.organization_id,
            name=row.name,
            image=row.image,
            created_at=row.created_at,
            vcpu_count=row.vcpu_count,
            memory_mb=row.memory_mb,
            disk_mb=row.disk_mb,
            user=row.user,
            workdir=row.workdir,
            egress_policy=EgressPolicy(mode=row.egress_policy["mode"]),
            driver=row.driver,
            min_isolation=row.min_isolation,
            warm_pool_size=row.warm_pool_size,
            idle_seconds=row.idle_seconds,
            command_timeout_seconds=row.command_timeout_seconds,
            public_files=row.public_files,
            revision=row.revision,
        ),
        tuple(row.env_names),
        row.env_sealed,
    )
