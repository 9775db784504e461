"""What guests used is counted once, whoever is asked how often."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa

from innkeeper.control import clock, retention, rooms, usage
from innkeeper.core.usage import Used
from innkeeper.errors import InvalidRequestError
from innkeeper.store import tables

pytestmark = pytest.mark.anyio
World = Any


def used(machine_id: str, instance_id: UUID, cpu_us: int, seconds: float = 0.0) -> dict[str, Any]:
    return {
        "machine_id": machine_id,
        "instance_id": str(instance_id),
        "cpu_us": cpu_us,
        "memory_mb": 512,
        "seconds": seconds,
    }


async def room(world: World, name: str = "r") -> UUID:
    instance_id: UUID = (await rooms.get_or_create(world.control, world.me, world.profile_id(), name)).instance.id
    return instance_id


async def today(world: World) -> Used:
    return (await usage.by_day(world.control, world.me, days=1))[0].used


async def test_sums_of_a_machine_are_added_once(world: World) -> None:
    instance_id = await room(world)
    assert await today(world) == Used()
    world.host.running_usage = {"m": used("m", instance_id, 1_000, 2.0)}
    assert await today(world) == Used(1_000, 1_024.0)
    assert await today(world) == Used(1_000, 1_024.0)
    world.host.running_usage = {"m": used("m", instance_id, 1_500, 3.0)}
    assert await today(world) == Used(1_500, 1_536.0)
    # It ended, and its last sums come from its record, which is then forgotten.
    world.host.running_usage, world.host.ended_usage = {}, {"m": used("m", instance_id, 1_700, 3.5)}
    assert await today(world) == Used(1_700, 1_792.0)
    assert world.host.ended_usage == {}
    world.host.running_usage = {"n": used("n", instance_id, 300, 1.0)}
    assert await today(world) == Used(2_000, 2_304.0)
    assert await usage.of_instance(world.control, instance_id, host_id=world.host.id) == Used(2_000, 2_304.0)


async def test_what_a_host_says_takes_nothing_away_and_gives_nothing_to_nobody(world: World) -> None:
    instance_id = await room(world)
    world.host.running_usage = {
        "m": used("m", instance_id, 1_000, 2.0),
        "stranger": used("stranger", uuid4(), 7_000, 7.0),
        "no id": {**used("no id", instance_id, 9, 9.0), "instance_id": "x"},
    }
    assert await today(world) == Used(1_000, 1_024.0)
    world.host.running_usage = {"m": used("m", instance_id, -5, -1.0)}
    assert await today(world) == Used(1_000, 1_024.0)
    world.host.running_usage = {"m": used("m", instance_id, 10**30, 1e30)}
    assert await today(world) == Used(usage.CPU_US_MAX, usage.MEMORY_MIB_SECONDS_MAX)


async def test_days_are_counted_apart_and_merged_when_they_are_old(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance_id = await room(world)
    first = datetime(2026, 1, 31, 23, 59, tzinfo=UTC)
    for number, moment in enumerate((first, first + timedelta(minutes=2))):
        monkeypatch.setattr(clock, "now", lambda moment=moment: moment)
        world.host.running_usage = {"m": used("m", instance_id, 1_000 * (number + 1), 2.0 * (number + 1))}
        await usage.count(world.control)
    monkeypatch.undo()
    span = {"first": date(2026, 1, 30), "last": date(2026, 2, 1)}

    async def told() -> list[Used]:
        return [one.used for one in await usage.by_day(world.control, world.me, **span)]

    before = [Used(), Used(1_000, 1_024.0), Used(1_000, 1_024.0)]
    assert await told() == before
    world.host.running_usage = {}
    assert await retention.forget(world.control) >= 2
    assert await told() == before
    rows = await world.control.database.read(lambda connection: connection.execute(sa.select(tables.usage)).all())
    assert [(row.merged, row.instance_id) for row in rows] == [(True, world.me.organization_id)] * 2
    assert await retention.forget(world.control) == 0


async def test_a_machine_that_goes_on_for_months_is_not_counted_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance_id = await room(world)
    world.host.running_usage = {"m": used("m", instance_id, 1_000, 2.0)}
    with monkeypatch.context() as then:
        then.setattr(clock, "now", lambda: datetime.now(UTC) - timedelta(days=200))
        await usage.count(world.control)
    world.host.running_usage = {"m": used("m", instance_id, 1_001, 2.0)}
    assert await today(world) == Used(1, 0.0)
    await retention.forget(world.control)
    assert await today(world) == Used(1, 0.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"days": 0},
        {"days": 366},
        {"first": date(2026, 1, 2), "last": date(2026, 1, 1)},
        {"first": date(2024, 1, 1), "last": date(2026, 1, 1)},
    ],
)
async def test_a_span_that_is_none(world: World, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        await usage.by_day(world.control, world.me, **fields)
