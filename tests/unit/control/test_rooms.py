"""Rooms: one instance per pair, whoever asks and however often; failure, restart, waiting, limits."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any
from uuid import uuid4

import pytest

from innkeeper.control import audit, organizations, profiles, rooms
from innkeeper.core.host_verbs import DestroyMachine, EnsureMachine
from innkeeper.core.image import ImageStatus
from innkeeper.core.instance import InstanceState
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import (
    ForbiddenError,
    HostMismatchError,
    InstanceFailedError,
    InstanceNotFoundError,
    InstanceNotReadyError,
    InvalidRequestError,
    NoHostError,
    ProfileNotFoundError,
    RateLimitedError,
    UnavailableError,
)
from innkeeper.store import instances
from innkeeper.store import rooms as store

pytestmark = pytest.mark.anyio
World = Any


async def test_fifty_first_requests_make_one_instance(world: World) -> None:
    profile_id = world.profile_id()
    world.host.hold.clear()
    asking = [asyncio.create_task(rooms.get_or_create(world.control, world.me, profile_id, "r")) for _ in range(50)]
    await world.until(lambda: world.host.count(EnsureMachine) > 0)
    world.host.hold.set()
    views = await asyncio.gather(*asking)
    assert {view.instance.id for view in views} == {views[0].instance.id}
    assert world.host.count(EnsureMachine) == 1
    assert views[0].instance.state is InstanceState.READY
    assert views[0].room_id == "r"
    assert views[0].host is not None
    assert views[0].host.id == world.host.id


async def test_two_processes_agree_on_one_instance(still_world: World) -> None:
    async with still_world.running() as one, still_world.running() as two:
        still_world.control = one
        me, profile_id = still_world.me, still_world.profile_id()
        views = await asyncio.gather(
            *(rooms.get_or_create(control, me, profile_id, "r") for control in (one, two) for _ in range(5))
        )
    assert len({view.instance.id for view in views}) == 1
    assert {view.instance.state for view in views} == {InstanceState.READY}


async def test_a_ready_room_needs_no_database(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    profile_id = world.profile_id()
    first = await rooms.get_or_create(world.control, world.me, profile_id, "r")
    await world.control.later.flush(world.control)

    async def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the database was asked")

    monkeypatch.setattr(world.control.database, "read", refuse)
    monkeypatch.setattr(world.control.database, "write", refuse)
    again = await rooms.get_or_create(world.control, world.me, profile_id, "r", host_id=world.host.id)
    assert again is first or again.instance == first.instance
    monkeypatch.undo()


async def test_the_row_is_committed_before_the_host_is_asked(world: World) -> None:
    world.host.hold.clear()
    asking = asyncio.create_task(rooms.get_or_create(world.control, world.me, world.profile_id(), "r"))
    await world.until(lambda: world.host.count(EnsureMachine) == 1)
    found = await world.control.database.read(store.get, world.profile_id(), "r")
    assert found is not None
    assert found[1].state is InstanceState.ACTIVE
    world.host.hold.set()
    await asking


async def test_waiting_ends_with_the_status_and_goes_on_behind(still_world: World) -> None:
    async with still_world.running(room_wait_seconds=1) as control:
        still_world.control = control
        still_world.host.hold.clear()
        with pytest.raises(
            InstanceNotReadyError, match=r"^Instance is still provisioning, current status: image_generated$"
        ):
            await rooms.get_or_create(control, still_world.me, still_world.profile_id(), "r")
        still_world.host.hold.set()
        await still_world.until(lambda: control.flights.get((still_world.profile_id(), "r")) is None)
        await rooms.get_or_create(control, still_world.me, still_world.profile_id(), "r")
        assert still_world.host.count(EnsureMachine) == 1


async def test_a_caller_that_goes_away_cancels_nothing(world: World) -> None:
    world.host.hold.clear()
    asking = asyncio.create_task(rooms.get_or_create(world.control, world.me, world.profile_id(), "r"))
    await world.until(lambda: world.host.count(EnsureMachine) == 1)
    asking.cancel()
    await asyncio.wait({asking})
    world.host.hold.set()
    view = await rooms.get_or_create(world.control, world.me, world.profile_id(), "r")
    assert view.instance.state is InstanceState.READY
    assert world.host.count(EnsureMachine) == 1


async def test_what_the_host_is_asked_for(world: World) -> None:
    profile = await profiles.create(
        world.control,
        world.me,
        {"name": "mine", "image": "base", "env": {"KEY": "secret"}, "user": "ann", "workdir": "/srv", "memory_mb": 512},
    )
    view = await rooms.get_or_create(world.control, world.me, profile.profile.id, "r")
    request = next(r for r in world.host.asked if isinstance(r, EnsureMachine))
    assert request.env == {"LANG": "C", "KEY": "secret"}
    assert (request.user, request.workdir, request.shape.memory_mb) == ("ann", "/srv", 512)
    assert request.shape.image_digest == "d-base"
    assert request.hostname == f"mine-{view.instance.id.hex[-8:]}"
    assert "secret" not in repr(view)
    pools = [p for p in world.host.pools[-1].pools if p.shape.pool_key == request.shape.pool_key]
    assert [pool.size for pool in pools] == [2]


async def test_boot_trace_and_isolation_are_kept(world: World) -> None:
    await rooms.get_or_create(world.control, world.me, world.profile_id(), "r")
    await world.control.later.flush(world.control)
    found = await world.control.database.read(store.get, world.profile_id(), "r")
    assert found is not None
    for instance in (found[1], (await rooms.find(world.control, world.me, world.profile_id(), "r")).instance):
        assert instance.state is InstanceState.READY
        assert [step.step for step in instance.boot_trace][-1] == "ready"
        assert instance.isolation is not None
        assert instance.isolation.platform == "systrap"


async def test_a_failed_room_restarts_on_its_disk(world: World) -> None:
    world.host.ensure_error = InstanceFailedError("the guest did not answer")
    with pytest.raises(InstanceFailedError, match="the guest did not answer"):
        await rooms.get_or_create(world.control, world.me, world.profile_id(), "r")
    failed = await rooms.find(world.control, world.me, world.profile_id(), "r")
    assert failed.instance.state is InstanceState.FAILED
    assert failed.instance.failure == "the guest did not answer"
    world.host.ensure_error = None
    view = await rooms.get_or_create(world.control, world.me, world.profile_id(), "r")
    assert view.instance.id == failed.instance.id
    assert view.instance.public_id == failed.instance.public_id
    assert view.instance.failure is None


async def test_a_machine_that_fails_later_is_restarted_by_the_next_request(world: World) -> None:
    view = await rooms.get_or_create(world.control, world.me, world.profile_id(), "r")
    world.host.machines.clear()
    world.host.publish({"type": "machine.failed", "instance_id": str(view.instance.id), "failure": "out of memory"})
    entry = world.control.live.by_instance(view.instance.id)
    await world.until(lambda: entry.instance.state is InstanceState.FAILED)
    assert entry.view.instance.failure == "out of memory"
    again = await rooms.get_or_create(world.control, world.me, world.profile_id(), "r")
    assert again.instance.id == view.instance.id
    assert world.host.count(EnsureMachine) == 2


async def test_a_full_host_leaves_no_room(world: World) -> None:
    world.host.ensure_error = UnavailableError("not enough memory")
    with pytest.raises(NoHostError, match=r"^No available hosts for instance provisioning$"):
        await rooms.get_or_create(world.control, world.me, world.profile_id(), "r")
    assert await world.control.database.read(store.every) == []
    with pytest.raises(InstanceNotFoundError):
        await rooms.find(world.control, world.me, world.profile_id(), "r")


async def test_hosts_asked_for(world: World) -> None:
    with pytest.raises(NoHostError):
        await rooms.get_or_create(world.control, world.me, world.profile_id(), "r", host_id=uuid4())
    await rooms.get_or_create(world.control, world.me, world.profile_id(), "r", host_id=world.host.id)
    with pytest.raises(HostMismatchError):
        await rooms.get_or_create(world.control, world.me, world.profile_id(), "r", host_id=uuid4())


async def test_an_image_that_is_being_built_is_said_so(world: World) -> None:
    world.host.images[2] = dataclasses.replace(world.host.images[2], status=ImageStatus.BUILDING, digest="")
    world.host.publish({"type": "image.changed", "name": "node", "status": "building"})
    await world.until(lambda: world.control.images.own(None, "node").status is ImageStatus.BUILDING)
    with pytest.raises(UnavailableError, match="'node' is still being built"):
        await rooms.get_or_create(world.control, world.me, world.profile_id("node"), "r")


async def test_room_ids(world: World) -> None:
    for room_id in ("x", "é/ü ?#", "名" * 255, "a b"):
        view = await rooms.get_or_create(world.control, world.me, world.profile_id(), room_id)
        assert view.room_id == room_id
    for room_id in ("", "x" * 256, "a\0b", "\ud800"):
        with pytest.raises(InvalidRequestError):
            await rooms.get_or_create(world.control, world.me, world.profile_id(), room_id)


async def test_destroy_answers_when_the_guest_is_gone(world: World) -> None:
    view = await rooms.get_or_create(world.control, world.me, world.profile_id(), "r")
    await rooms.destroy(world.control, world.me, world.profile_id(), "r")
    assert view.instance.id not in world.host.machines
    assert await world.control.database.read(store.get, world.profile_id(), "r") is None
    kept = await world.control.database.read(instances.get, view.instance.id)
    assert kept is not None
    assert kept.state is InstanceState.DESTROYED
    with pytest.raises(InstanceNotFoundError):
        await rooms.destroy(world.control, world.me, world.profile_id(), "r")
    again = await rooms.get_or_create(world.control, world.me, world.profile_id(), "r")
    assert again.instance.id != view.instance.id
    assert again.instance.public_id != view.instance.public_id


async def test_many_destroy_and_create_at_once(world: World) -> None:
    await rooms.get_or_create(world.control, world.me, world.profile_id(), "r")
    world.host.hold.clear()
    destroying = [
        asyncio.create_task(rooms.destroy(world.control, world.me, world.profile_id(), "r")) for _ in range(5)
    ]
    await world.until(lambda: world.host.count(DestroyMachine) == 1)
    creating = [
        asyncio.create_task(rooms.get_or_create(world.control, world.me, world.profile_id(), "r")) for _ in range(5)
    ]
    await asyncio.sleep(0)
    world.host.hold.set()
    await asyncio.gather(*destroying)
    views = await asyncio.gather(*creating)
    assert len({view.instance.id for view in views}) == 1
    assert world.host.count(DestroyMachine) == 1
    assert list(world.host.machines) == [views[0].instance.id]


async def test_a_destruction_that_the_host_refuses_is_finished_later(world: World) -> None:
    view = await rooms.get_or_create(world.control, world.me, world.profile_id(), "r")
    world.host.destroy_error = UnavailableError("busy")
    with pytest.raises(UnavailableError):
        await rooms.destroy(world.control, world.me, world.profile_id(), "r")
    with pytest.raises(InstanceNotFoundError):
        await rooms.find(world.control, world.me, world.profile_id(), "r")
    world.host.destroy_error = None
    world.control.reconcile_hint.set()
    await world.until(lambda: world.control.live.by_instance(view.instance.id) is None)
    assert view.instance.id not in world.host.machines


async def test_limits_of_the_organization(world: World) -> None:
    await organizations.set_limits(world.control, world.operator, "default", {"max_instances": 2})
    results = await asyncio.gather(
        *(rooms.get_or_create(world.control, world.me, world.profile_id(), f"r{n}") for n in range(5)),
        return_exceptions=True,
    )
    refused = [result for result in results if isinstance(result, BaseException)]
    assert len(refused) == 3
    assert all(isinstance(error, RateLimitedError) and "limit of 2 instances" in error.message for error in refused)
    limits = {"max_instances": None, "max_memory_mb": 3_000}
    await organizations.set_limits(world.control, world.operator, "default", limits)
    with pytest.raises(RateLimitedError, match="3000 MiB of memory"):
        await rooms.get_or_create(world.control, world.me, world.profile_id(), "more")


async def test_another_organization_sees_nothing(world: World) -> None:
    profile_id = world.profile_id()
    view = await rooms.get_or_create(world.control, world.me, profile_id, "r")
    stranger = await world.stranger()
    for call in (rooms.get_or_create, rooms.find, rooms.destroy):
        with pytest.raises(ProfileNotFoundError):
            await call(world.control, stranger, profile_id, "r")
    with pytest.raises(ProfileNotFoundError):
        await rooms.list_of_profile(world.control, stranger, profile_id)
    with pytest.raises(InstanceNotFoundError):
        await rooms.find_instance(world.control, stranger, view.instance.public_id)
    assert await rooms.list_all(world.control, stranger) == []
    assert len(world.host.machines) == 1


async def test_scopes(world: World) -> None:
    await rooms.get_or_create(world.control, world.me, world.profile_id(), "r")
    weak = Principal(world.me.organization_id, None, frozenset({Scope.AUDIT}), "weak")
    for call in (rooms.get_or_create, rooms.find, rooms.destroy):
        with pytest.raises(ForbiddenError, match="'rooms'"):
            await call(world.control, weak, world.profile_id(), "r")


async def test_lists_and_audit(world: World) -> None:
    for name in ("a", "b", "c"):
        await rooms.get_or_create(world.control, world.me, world.profile_id(), name)
    await rooms.get_or_create(world.control, world.me, world.profile_id("node"), "n")
    await rooms.destroy(world.control, world.me, world.profile_id(), "b")
    views = await rooms.list_of_profile(world.control, world.me, world.profile_id())
    assert [view.room_id for view in views] == ["a", "c"]
    first = await rooms.list_all(world.control, world.me, limit=2)
    rest = await rooms.list_all(world.control, world.me, after=first[-1].instance.id)
    assert [view.room_id for view in (*first, *rest)] == ["a", "c", "n"]
    page = await audit.list_events(world.control, world.me, limit=3)
    assert [event.action for event in page.events] == ["room.destroy", "room.create", "room.create"]
    assert page.next_cursor is not None
    more = await audit.list_events(world.control, world.me, cursor=page.next_cursor)
    assert [event.action for event in more.events] == ["room.create", "room.create", "organization.create"]
    assert more.next_cursor is None


async def test_who_asks_while_a_room_ends_gets_the_next_one(world: World) -> None:
    """What would begin in the one that ends would be killed with it."""
    control, me, profile_id = world.control, world.me, world.profile_id()
    before = await rooms.ready_entry(control, me, profile_id, "r")
    # The decision waits for what is written behind.
    async with control.later._lock:
        ending = asyncio.create_task(rooms.destroy(control, me, profile_id, "r"))
        await world.until(lambda: control.flights.get(before.key) is not None)
        asking = asyncio.create_task(rooms.ready_entry(control, me, profile_id, "r"))
    await ending
    assert (await asking).instance.id != before.instance.id
