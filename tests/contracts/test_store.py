"""What every database behind the store must do."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa

from innkeeper.core.event import AuditEvent
from innkeeper.core.instance import Instance, InstanceState
from innkeeper.core.profile import Profile
from innkeeper.core.room import Room
from innkeeper.core.token import Organization
from innkeeper.ids import uuid7
from innkeeper.store import audit_events, instances, leases, organizations, profiles, rooms, server, tables
from innkeeper.store.database import Database, open_database
from innkeeper.store.profiles import StoredProfile

pytestmark = pytest.mark.anyio
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


@pytest.fixture(params=["sqlite"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    opened = await open_database(f"sqlite:///{tmp_path}/store.db")
    yield opened
    await opened.close()


async def organization(database: Database) -> Organization:
    made = Organization(uuid7(), uuid4().hex, NOW)
    await database.write(organizations.insert, made)
    return made


async def instance(database: Database, *, lock_token: UUID | None = None) -> Instance:
    owner = await organization(database)
    profile = Profile(uuid4(), owner.id, "base", "base", NOW)
    made = Instance(uuid7(), owner.id, uuid4(), profile.id, "base", InstanceState.ACTIVE, NOW, memory_mb=1024)

    def insert(connection: sa.Connection) -> None:
        profiles.insert(connection, StoredProfile(profile))
        instances.insert(connection, made, lock_token=lock_token, now=NOW, ttl_seconds=60)

    await database.write(insert)
    return made


async def test_a_write_is_seen_by_the_next_read(database: Database) -> None:
    for n in range(20):
        await database.write(server.put, "key", str(n))
        assert await database.read(server.get, "key") == str(n)


async def test_a_write_that_raises_is_undone_alone(database: Database) -> None:
    def half(connection: sa.Connection) -> None:
        server.put(connection, "half", "x")
        raise LookupError

    outcomes = await asyncio.gather(
        *(database.write(server.put, f"k{n}", "x") if n % 3 else database.write(half) for n in range(60)),
        return_exceptions=True,
    )
    assert [isinstance(outcome, LookupError) for outcome in outcomes] == [n % 3 == 0 for n in range(60)]
    assert await database.read(server.get, "half") is None
    assert all([await database.read(server.get, f"k{n}") == "x" for n in range(60) if n % 3])


async def test_writes_do_not_lose_each_other(database: Database) -> None:
    await database.write(server.put, "n", "0")

    def add(connection: sa.Connection) -> None:
        server.put(connection, "n", str(int(server.get(connection, "n") or 0) + 1))

    await asyncio.gather(*(database.write(add) for _ in range(200)))
    assert await database.read(server.get, "n") == "200"


async def test_a_cancelled_caller_does_not_undo_its_write(database: Database) -> None:
    writing = asyncio.create_task(database.write(server.put, "key", "kept"))
    await asyncio.sleep(0)
    writing.cancel()
    await asyncio.wait({writing})
    await database.write(server.put, "other", "x")
    assert await database.read(server.get, "key") == "kept"


async def test_a_read_cannot_write(database: Database) -> None:
    with pytest.raises(sa.exc.DBAPIError):
        await database.read(server.put, "key", "x")


async def test_times_keep_their_moment(database: Database) -> None:
    east = datetime(2026, 1, 2, 8, 0, tzinfo=timezone(timedelta(hours=5)))
    made = Organization(uuid7(), "east", east)
    await database.write(organizations.insert, made)
    found = await database.read(organizations.get, made.id)
    assert found is not None
    assert found.created_at == east
    assert found.created_at.tzinfo is UTC
    with pytest.raises(sa.exc.StatementError):
        await database.write(organizations.insert, Organization(uuid7(), "naive", datetime(2026, 1, 1)))


async def test_names_are_unique(database: Database) -> None:
    await database.write(organizations.insert, Organization(uuid7(), "same", NOW))
    with pytest.raises(sa.exc.IntegrityError):
        await database.write(organizations.insert, Organization(uuid7(), "same", NOW))


async def test_a_pair_is_one_room(database: Database) -> None:
    one, two = await instance(database), await instance(database)
    await database.write(rooms.insert, Room(one.profile_id, "r", one.id, NOW))
    with pytest.raises(sa.exc.IntegrityError):
        await database.write(rooms.insert, Room(one.profile_id, "r", two.id, NOW))
    await database.write(rooms.insert, Room(two.profile_id, "r", two.id, NOW))


async def test_foreign_keys_hold(database: Database) -> None:
    made = await instance(database)
    with pytest.raises(sa.exc.IntegrityError):
        await database.write(rooms.insert, Room(uuid4(), "r", made.id, NOW))
    await database.write(rooms.insert, Room(made.profile_id, "r", made.id, NOW))
    with pytest.raises(sa.exc.IntegrityError):
        await database.write(profiles.delete, made.profile_id)


async def test_an_instance_comes_back_as_it_went(database: Database) -> None:
    made = await instance(database)
    assert await database.read(instances.get, made.id) == made
    assert await database.read(instances.usage, made.organization_id) == (1, 1024)


async def test_one_holder_of_a_lease(database: Database) -> None:
    made = await instance(database)
    tokens = await asyncio.gather(
        *(database.write(leases.take, tables.instances, made.id, now=NOW, ttl_seconds=60) for _ in range(10))
    )
    assert sum(token is not None for token in tokens) == 1


async def test_a_stale_apply_is_dropped(database: Database) -> None:
    made = await instance(database)
    first = await database.write(leases.take, tables.instances, made.id, now=NOW, ttl_seconds=60)
    assert first is not None
    later = NOW + timedelta(seconds=61)
    second = await database.write(leases.take, tables.instances, made.id, now=later, ttl_seconds=60)
    assert second is not None
    apply = leases.apply
    assert not await database.write(apply, tables.instances, made.id, first, {"state": "failed"}, release=True)
    assert not await database.write(leases.renew, tables.instances, made.id, first, now=later, ttl_seconds=60)
    assert await database.write(leases.renew, tables.instances, made.id, second, now=later, ttl_seconds=60)
    assert await database.write(apply, tables.instances, made.id, second, {"state": "ready"}, release=True)
    assert not await database.write(apply, tables.instances, made.id, second, {"state": "failed"}, release=True)
    found = await database.read(instances.get, made.id)
    assert found is not None
    assert found.state is InstanceState.READY


async def test_unsettled_rows_are_those_that_nobody_works_on(database: Database) -> None:
    free, held = await instance(database), await instance(database, lock_token=uuid4())
    assert await database.read(instances.unsettled, now=NOW) == [free.id]
    assert set(await database.read(instances.unsettled, now=NOW + timedelta(seconds=61))) == {free.id, held.id}
    assert await database.write(leases.break_all, tables.instances) == 1
    assert set(await database.read(instances.unsettled, now=NOW)) == {free.id, held.id}


async def test_an_older_state_does_not_replace_a_newer_one(database: Database) -> None:
    made = await instance(database)
    newer = dataclasses.replace(made, state=InstanceState.READY, revision=5)
    assert await database.write(instances.advance, newer)
    assert not await database.write(instances.advance, dataclasses.replace(made, revision=4))
    assert await database.read(instances.get, made.id) == newer


async def test_audit_pages_newest_first(database: Database) -> None:
    owner, other = await organization(database), await organization(database)
    events = [AuditEvent(uuid7(), owner.id, NOW, "a", f"act{n}", "t", "id") for n in range(5)]
    await database.write(audit_events.insert, *events)
    page = await database.read(audit_events.page, owner.id, before=None, limit=2)
    assert [event.action for event in page] == ["act4", "act3"]
    rest = await database.read(audit_events.page, owner.id, before=page[-1].id, limit=10)
    assert [event.action for event in rest] == ["act2", "act1", "act0"]
    assert await database.read(audit_events.page, other.id, before=None, limit=10) == []


async def test_it_opens_again_as_it_was(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/again.db"
    for expected in (None, "x"):
        opened = await open_database(url)
        assert await opened.read(server.get, "key") == expected
        await opened.write(server.put, "key", "x")
        await opened.close()
        await opened.close()
