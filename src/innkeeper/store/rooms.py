"""Rooms: (profile, room id) -> instance. The primary key is what makes a room one room across processes."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.instance import Instance, InstanceState
from innkeeper.core.room import Room
from innkeeper.store.instances import instance_of
from innkeeper.store.tables import instances, rooms

_INSERT = sa.insert(rooms)
_JOINED = sa.select(rooms.c.room_id, rooms.c.created_at.label("room_created_at"), instances).join_from(
    rooms, instances, rooms.c.instance_id == instances.c.id
)


def insert(connection: sa.Connection, room: Room) -> None:
    """Store a room. Raises IntegrityError when the pair exists or the profile is gone."""
    connection.execute(
        _INSERT,
        {
            "profile_id": room.profile_id,
            "room_id": room.room_id,
            "instance_id": room.instance_id,
            "created_at": room.created_at,
        },
    )


def delete_of_instance(connection: sa.Connection, instance_id: UUID) -> None:
    """Forget the room of an instance."""
    connection.execute(sa.delete(rooms).where(rooms.c.instance_id == instance_id))


def get(connection: sa.Connection, profile_id: UUID, room_id: str) -> tuple[Room, Instance] | None:
    """One room and its instance."""
    query = _JOINED.where(rooms.c.profile_id == profile_id, rooms.c.room_id == room_id)
    row = connection.execute(query).one_or_none()
    return None if row is None else _pair(row)


def by_public_id(connection: sa.Connection, public_id: UUID) -> tuple[Room, Instance] | None:
    """The room whose instance has that public id."""
    row = connection.execute(_JOINED.where(instances.c.public_id == public_id)).one_or_none()
    return None if row is None else _pair(row)


def every(connection: sa.Connection) -> list[tuple[Room, Instance]]:
    """All rooms of all organizations, oldest instance first."""
    return [_pair(row) for row in connection.execute(_JOINED.order_by(instances.c.id))]


def page(
    connection: sa.Connection, organization_id: UUID, *, profile_id: UUID | None, after: UUID | None, limit: int
) -> list[tuple[Room, Instance]]:
    """Rooms of an organization (and of one profile) whose instance comes after the id `after`, oldest instance first."""
    query = _JOINED.where(
        instances.c.organization_id == organization_id, instances.c.state != InstanceState.DESTROYED.value
    )
    if profile_id is not None:
        query = query.where(rooms.c.profile_id == profile_id)
    if after is not None:
        query = query.where(instances.c.id > after)
    return [_pair(row) for row in connection.execute(query.order_by(instances.c.id).limit(limit))]


def _pair(row: Any) -> tuple[Room, Instance]:
    return Room(row.profile_id, row.room_id, row.id, row.room_created_at), instance_of(row)
