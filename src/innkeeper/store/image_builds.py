"""Image builds, the newest of each organization."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.image_build import BuildStatus, ImageBuild
from innkeeper.store import instances
from innkeeper.store.tables import image_builds

# What marks the row of a guest that builds: such a guest has no room.
LABEL = "image_build"
_GOING_ON = (BuildStatus.WAITING.value, BuildStatus.RUNNING.value)


def insert(connection: sa.Connection, build: ImageBuild) -> None:
    """Store a new build."""
    connection.execute(
        sa.insert(image_builds).values(
            id=build.id,
            organization_id=build.organization_id,
            name=build.name,
            created_at=build.created_at,
            **_changing(build),
        )
    )


def update(connection: sa.Connection, build: ImageBuild) -> None:
    """Store what became of a build."""
    connection.execute(sa.update(image_builds).where(image_builds.c.id == build.id).values(**_changing(build)))


def get(connection: sa.Connection, organization_id: UUID, build_id: UUID) -> ImageBuild | None:
    """One build of the organization."""
    row = connection.execute(
        sa.select(image_builds).where(image_builds.c.id == build_id, image_builds.c.organization_id == organization_id)
    ).one_or_none()
    return None if row is None else _build_of(row)


def newest(
    connection: sa.Connection, organization_id: UUID, *, name: str | None = None, limit: int
) -> list[ImageBuild]:
    """The organization's builds, newest first; with `name` those of one image."""
    query = sa.select(image_builds).where(image_builds.c.organization_id == organization_id)
    if name is not None:
        query = query.where(image_builds.c.name == name)
    # Ids are uuid7: their order is that of time.
    return [_build_of(row) for row in connection.execute(query.order_by(image_builds.c.id.desc()).limit(limit))]


def drop_old(connection: sa.Connection, organization_id: UUID, *, keep: int) -> list[UUID]:
    """Forget the organization's builds beyond the newest `keep` that have ended; their ids."""
    kept = (
        sa.select(image_builds.c.id)
        .where(image_builds.c.organization_id == organization_id)
        .order_by(image_builds.c.id.desc())
        .limit(keep)
    )
    old = (
        image_builds.c.organization_id == organization_id,
        image_builds.c.status.not_in(_GOING_ON),
        image_builds.c.id.not_in(kept),
    )
    ids = list(connection.execute(sa.select(image_builds.c.id).where(*old)).scalars())
    if ids:
        connection.execute(sa.delete(image_builds).where(image_builds.c.id.in_(ids)))
    return ids


def end_interrupted(connection: sa.Connection, error: str, now: datetime) -> list[UUID]:
    """At the start of a server: what an earlier one was building has failed, and its guests are nobody's. The builds' ids."""
    ids = list(connection.execute(sa.select(image_builds.c.id).where(image_builds.c.status.in_(_GOING_ON))).scalars())
    connection.execute(
        sa.update(image_builds)
        .where(image_builds.c.status.in_(_GOING_ON))
        .values(status=BuildStatus.FAILED.value, error=error, ended_at=now)
    )
    instances.delete_labelled(connection, LABEL)
    return ids


def ids(connection: sa.Connection) -> set[UUID]:
    """Every build that is kept."""
    return set(connection.execute(sa.select(image_builds.c.id)).scalars())


def _changing(build: ImageBuild) -> dict[str, Any]:
    return {
        "status": build.status.value,
        "ended_at": build.ended_at,
        "error": build.error,
        "digest": build.digest,
    }


def _build_of(row: Any) -> ImageBuild:
    return ImageBuild(
        id=row.id,
        organization_id=row.organization_id,
        name=row.name,
        status=BuildStatus(row.status),
        created_at=row.created_at,
        ended_at=row.ended_at,
        error=row.error,
        digest=row.digest,
    )
