"""History goes after its time: a little at a time, and nothing else with it."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa

from innkeeper.control import audit, clock, retention, rooms
from innkeeper.core.event import AuditEvent
from innkeeper.ids import before_uuid7, uuid7
from innkeeper.store import audit_events, tables

pytestmark = pytest.mark.anyio
World = Any


def event_of(world: World, days_ago: float, number: int = 0) -> AuditEvent:
    at = clock.now() - timedelta(days=days_ago)
    event_id = UUID(int=before_uuid7(at).int + number)
    event = audit.event(world.me, "test.old", "thing", str(number))
    return dataclasses.replace(event, id=event_id, at=at)


async def counted(world: World, table: sa.Table, *where: Any) -> int:
    def count(connection: sa.Connection) -> int:
        return connection.execute(sa.select(sa.func.count()).select_from(table).where(*where)).scalar_one()

    found: int = await world.control.database.read(count)
    return found


async def test_audit_events_go_after_their_time(world: World) -> None:
    old, young = event_of(world, 91), event_of(world, 89)
    await world.control.database.write(audit_events.insert, old, young)
    others = await counted(world, tables.audit_events) - 2
    assert await retention.forget(world.control) == 1
    assert await counted(world, tables.audit_events) == others + 1
    assert await counted(world, tables.audit_events, tables.audit_events.c.id == young.id) == 1
    assert world.control.metrics.rows_forgotten == 1
    assert await retention.forget(world.control) == 0


async def test_rows_of_destroyed_rooms_go_and_living_ones_stay(world: World) -> None:
    first = (await rooms.get_or_create(world.control, world.me, world.profile_id(), "gone")).instance
    kept = (await rooms.get_or_create(world.control, world.me, world.profile_id(), "kept")).instance
    young = (await rooms.get_or_create(world.control, world.me, world.profile_id(), "young")).instance
    for name in ("gone", "young"):
        await rooms.destroy(world.control, world.me, world.profile_id(), name)
    assert await counted(world, tables.instances, tables.instances.c.destroyed_at.is_not(None)) == 2

    def age(connection: sa.Connection) -> None:
        long_ago = clock.now() - timedelta(days=91)
        instances = tables.instances
        connection.execute(sa.update(instances).where(instances.c.id == first.id).values(destroyed_at=long_ago))
        # A room that nobody used for a year is not history.
        connection.execute(
            sa.update(instances).where(instances.c.id == kept.id).values(created_at=long_ago, last_active_at=long_ago)
        )

    await world.control.database.write(age)
    assert await retention.forget(world.control) == 1
    assert await counted(world, tables.instances, tables.instances.c.id.in_([kept.id, young.id])) == 2
    assert await counted(world, tables.instances, tables.instances.c.id == first.id) == 0


async def test_a_pass_is_bounded_and_the_next_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BATCH_ROWS", 3), ("BATCHES", 2), ("PAUSE_SECONDS", 0)):
        monkeypatch.setattr(retention, name, value)
    await world.control.database.write(audit_events.insert, *(event_of(world, 100, number) for number in range(10)))
    assert [await retention.forget(world.control) for _ in range(3)] == [6, 4, 0]


async def test_the_time_is_a_setting(world: World) -> None:
    await world.control.database.write(audit_events.insert, event_of(world, 3))
    async with world.running(audit_retention_days=2) as control:
        assert await retention.forget(control) == 1


def test_the_border_among_ids() -> None:
    before, moment = uuid7(), clock.now() + timedelta(seconds=1)
    assert before < before_uuid7(moment)
    assert before_uuid7(moment) > before_uuid7(moment - timedelta(milliseconds=1))
    assert before_uuid7(clock.now() - timedelta(seconds=1)) < before
    assert before_uuid7(moment).version == 7
