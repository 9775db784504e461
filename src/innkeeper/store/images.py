"""Images: names, what they stand for, and where that came from."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.image import Image, ImageSource, ImageStatus
from innkeeper.core.image_config import config_from_json, config_to_json
from innkeeper.core.instance import InstanceState
from innkeeper.store.tables import images, instances, profiles, snapshots


def insert(connection: sa.Connection, image: Image) -> None:
    """Store an image. Raises IntegrityError when its organization has one of that name."""
    connection.execute(
        sa.insert(images).values(
            id=image.id,
            organization_id=image.organization_id,
            name=image.name,
            created_at=image.created_at,
            **_values(image),
        )
    )


def update(connection: sa.Connection, image: Image) -> bool:
    """Whether the image was there and is now as given."""
    done = connection.execute(sa.update(images).where(images.c.id == image.id).values(**_values(image)))
    return done.rowcount == 1


def delete(connection: sa.Connection, image_id: UUID) -> bool:
    """Whether the image was there."""
    return connection.execute(sa.delete(images).where(images.c.id == image_id)).rowcount == 1


def every(connection: sa.Connection) -> list[Image]:
    """All images of all organizations, by name."""
    return [_image(row) for row in connection.execute(sa.select(images).order_by(images.c.name, images.c.id))]


def digests(connection: sa.Connection) -> set[str]:
    """The digests that some image has, of whatever organization, and some snapshot that is one."""
    named = sa.select(images.c.digest).where(images.c.digest != "")
    kept = sa.select(snapshots.c.image_digest).where(snapshots.c.oci_image.is_not(None), snapshots.c.image_digest != "")
    return set(connection.execute(named.union(kept)).scalars())


def count_users(connection: sa.Connection, digest: str) -> int:
    """How many images, snapshots and instances that are still there stand on a digest."""
    of = (
        sa.select(sa.func.count()).select_from(images).where(images.c.digest == digest),
        sa.select(sa.func.count()).select_from(snapshots).where(snapshots.c.image_digest == digest),
        sa.select(sa.func.count())
        .select_from(instances)
        .where(instances.c.image_digest == digest, instances.c.state != InstanceState.DESTROYED.value),
    )
    return sum(connection.execute(query).scalar_one() for query in of)


def profiles_of(connection: sa.Connection, organization_id: UUID, name: str) -> list[str]:
    """Names of the organization's profiles that name the image."""
    query = sa.select(profiles.c.name).where(profiles.c.organization_id == organization_id, profiles.c.image == name)
    return list(connection.execute(query.order_by(profiles.c.name)).scalars())


def count_instances(connection: sa.Connection, organization_id: UUID, name: str, digest: str) -> int:
    """How many instances that are still there were made of the image as it is now."""
    query = (
        sa.select(sa.func.count())
        .select_from(instances)
        .where(
            instances.c.organization_id == organization_id,
            instances.c.image == name,
            instances.c.image_digest == digest,
            instances.c.state != InstanceState.DESTROYED.value,
        )
    )
    return connection.execute(query).scalar_one()


def _values(image: Image) -> dict[str, Any]:
    return {
        "digest": image.digest,
        "size_bytes": image.size_bytes,
        "source": image.source.value,
        "source_ref": image.source_ref,
        "status": image.status.value,
        "last_error": image.last_error,
        "config": config_to_json(image.config),
        "tools": list(image.tools),
        "updated_at": image.updated_at,
    }


def _image(row: Any) -> Image:
    return Image(
        id=row.id,
        organization_id=row.organization_id,
        name=row.name,
        source=ImageSource(row.source),
        status=ImageStatus(row.status),
        created_at=row.created_at,
        updated_at=row.updated_at,
        digest=row.digest,
        size_bytes=row.size_bytes,
        source_ref=row.source_ref,
        last_error=row.last_error,
        config=config_from_json(row.config),
        tools=tuple(row.tools),
    )
