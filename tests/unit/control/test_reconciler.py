"""What a restart finds, what was cut short, what belongs to nobody; idle rooms; warm pools; hosts."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa

from innkeeper.control import executions, expiry, hosts, profiles, reconciler, rooms, tools, warm_pools
from innkeeper.core.host_verbs import DestroyMachine, EnsureMachine, Execute
from innkeeper.core.image import ImageStatus
from innkeeper.core.instance import InstanceState
from innkeeper.errors import ForbiddenError, HostDrainingError
from innkeeper.store import tables

pytestmark = pytest.mark.anyio
World = Any


async def test_a_restart_adopts_what_runs(still_world: World) -> None:
    async with still_world.running() as control:
        still_world.control = control
        me, profile_id = still_world.me, still_world.profile_id()
        kept, lost, broken, gone = [
            (await rooms.get_or_create(control, me, profile_id, name)).instance
            for name in ("kept", "lost", "broken", "gone")
        ]
    del still_world.host.machines[lost.id]
    still_world.host.machines[broken.id]["failure"] = "oom"
    del still_world.host.machines[gone.id]
    still_world.host.disks.discard(gone.id)
    orphans = {uuid4(), uuid4()}
    machine = dict(still_world.host.machines[kept.id])
    for orphan in orphans:
        still_world.host.machines[orphan] = {**machine, "instance_id": str(orphan)}
    still_world.host.disks |= {*orphans, leftover := uuid4()}
    still_world.host.asked.clear()
    async with still_world.running() as control:
        still_world.control = control
        states = {view.instance.id: view.instance.state for view in await rooms.list_all(control, me)}
        assert states[kept.id] is InstanceState.READY
        assert states[lost.id] is InstanceState.STOPPED
        assert states[broken.id] is InstanceState.FAILED
        assert states[gone.id] is InstanceState.STOPPED
        assert set(still_world.host.machines) == {kept.id, broken.id}
        destroyed = {r.instance_id for r in still_world.host.asked if isinstance(r, DestroyMachine)}
        assert destroyed == {*orphans, leftover}
        assert control.metrics.orphans_destroyed == 3
        assert still_world.host.count(EnsureMachine) == 0
        for name, instance in (("kept", kept), ("lost", lost), ("broken", broken), ("gone", gone)):
            view = await rooms.get_or_create(control, me, profile_id, name)
            assert view.instance.id == instance.id
            assert view.instance.state is InstanceState.READY
        assert still_world.host.count(EnsureMachine) == 3


async def test_an_instance_that_came_after_the_hosts_answer_is_not_judged_by_it(still_world: World) -> None:
    answer, armed = still_world.host._list, False

    async def replaced_meanwhile(request: Any, call: Any) -> Any:
        nonlocal armed
        listed = await answer(request, call)
        if armed:
            armed = False
            await rooms.destroy(control, me, profile_id, "r")
            await rooms.get_or_create(control, me, profile_id, "r")
        return listed

    still_world.host._list = replaced_meanwhile
    async with still_world.running() as control:
        still_world.control = control
        me, profile_id = still_world.me, still_world.profile_id()
        before = (await rooms.get_or_create(control, me, profile_id, "r")).instance
        armed = True
        await reconciler.adopt(control, still_world.host.id)
        after = control.live.find((profile_id, "r")).instance
        assert after.id != before.id and not armed
        assert after.state is InstanceState.READY
        assert control.metrics.machines_lost == 0


async def test_a_killed_server_resumes_what_was_half_made(still_world: World) -> None:
    """Without a clean end: the rows stay leased and provisioning, as after kill -9."""
    async with still_world.running() as control:
        still_world.control = control
        me, profile_id = still_world.me, still_world.profile_id()
        still_world.host.hold.clear()
        asking = asyncio.create_task(rooms.get_or_create(control, me, profile_id, "half"))
        await still_world.until(lambda: still_world.host.count(EnsureMachine) == 1)
        asking.cancel()
        await asyncio.wait({asking})
    still_world.host.hold.set()
    async with still_world.running() as control:
        still_world.control = control
        entry = control.live.find((profile_id, "half"))
        await still_world.until(lambda: entry.ready)
        assert still_world.host.count(EnsureMachine) == 2


async def test_a_killed_server_finishes_a_destruction(still_world: World) -> None:
    async with still_world.running() as control:
        still_world.control = control
        me, profile_id = still_world.me, still_world.profile_id()
        view = await rooms.get_or_create(control, me, profile_id, "r")
        still_world.host.hold.clear()
        asking = asyncio.create_task(rooms.destroy(control, me, profile_id, "r"))
        await still_world.until(lambda: still_world.host.count(DestroyMachine) == 1)
    asking.cancel()
    await asyncio.wait({asking})
    still_world.host.hold.set()
    assert view.instance.id in still_world.host.machines
    async with still_world.running() as control:
        await still_world.until(lambda: not still_world.host.machines and len(control.live) == 0)


async def test_a_ready_state_that_was_never_written_is_found_out(world: World) -> None:
    view = await rooms.get_or_create(world.control, world.me, world.profile_id(), "r")
    await world.control.later.flush(world.control)

    def forget(connection: sa.Connection) -> None:
        connection.execute(sa.update(tables.instances).values(state="vm_booted", revision=0))

    def state(connection: sa.Connection) -> str:
        return connection.execute(sa.select(tables.instances.c.state)).scalar_one()

    await world.control.database.write(forget)
    world.control.reconcile_hint.set()
    async with asyncio.timeout(20):
        while await world.control.database.read(state) != "ready":
            await asyncio.sleep(0.01)
    assert world.host.count(EnsureMachine) == 1
    assert (await rooms.find(world.control, world.me, world.profile_id(), "r")).instance == view.instance


async def test_a_room_that_comes_up_while_the_host_is_asked_stays_ready(still_world: World) -> None:
    """The host's answer is older than the room's machine."""
    listed, meanwhile = still_world.host._list, []

    async def slow(request: Any, call: Any) -> Any:
        answer = await listed(request, call)
        for work in meanwhile:
            await work()
        return answer

    still_world.host._list = slow
    async with still_world.running() as control:
        still_world.control = control
        me, profile_id = still_world.me, still_world.profile_id()
        view = await rooms.get_or_create(control, me, profile_id, "r")
        del still_world.host.machines[view.instance.id]
        await reconciler.adopt(control, still_world.host.id)
        entry = control.live.find((profile_id, "r"))
        assert entry.instance.state is InstanceState.STOPPED
        meanwhile.append(lambda: rooms.get_or_create(control, me, profile_id, "r"))
        await reconciler.adopt(control, still_world.host.id)
        assert entry.ready
        assert control.metrics.machines_lost == 1


async def idle_room(world: World, name: str = "r", *, seconds: float = 1_000) -> Any:
    await profiles.update(world.control, world.me, world.profile_id(), {"idle_seconds": 600})
    view = await rooms.get_or_create(world.control, world.me, world.profile_id(), name)
    entry = world.control.live.by_instance(view.instance.id)
    entry.last_active = time.time() - seconds
    world.host.machines[view.instance.id]["idle_seconds"] = seconds
    return entry


async def test_idle_rooms_expire(world: World) -> None:
    entry = await idle_room(world)
    busy = await idle_room(world, "busy", seconds=500)
    assert await expiry.expire(world.control) == [entry.instance.id]
    assert list(world.host.machines) == [busy.instance.id]
    assert await expiry.expire(world.control) == []


async def test_rooms_without_a_machine_expire_too(world: World) -> None:
    entry = await idle_room(world)
    del world.host.machines[entry.instance.id]
    assert await expiry.expire(world.control) == [entry.instance.id]
    assert not world.host.disks


async def test_what_keeps_an_idle_room(world: World) -> None:
    entry = await idle_room(world)
    machine = world.host.machines[entry.instance.id]
    machine["user_processes"] = 1
    assert await expiry.expire(world.control) == []
    machine["user_processes"] = 0
    machine["idle_seconds"] = 1.0
    assert await expiry.expire(world.control) == []
    machine["idle_seconds"] = 1_000.0
    request = executions.ExecutionRequest("x")
    async with executions.start(world.control, world.me, entry, request) as execution:
        entry.last_active = time.time() - 1_000
        assert await expiry.expire(world.control) == []
        await execution.result()
    assert await expiry.expire(world.control) == []
    entry.last_active = time.time() - 1_000
    await profiles.update(world.control, world.me, world.profile_id(), {"idle_seconds": None})
    assert await expiry.expire(world.control) == []
    await profiles.update(world.control, world.me, world.profile_id(), {"idle_seconds": 600})
    assert await expiry.expire(world.control) == [entry.instance.id]


async def test_last_use_survives_a_restart(still_world: World) -> None:
    async with still_world.running() as control:
        still_world.control = control
        entry = await idle_room(still_world)
        control.live.touch(entry)
        used = entry.last_active
    async with still_world.running() as control:
        (entry,) = list(control.live)
        assert entry.last_active == pytest.approx(used, abs=0.001)


async def pools_of(world: World) -> dict[str, int]:
    host = world.control.hosts.get(world.host.id)
    return {pool.shape.image_digest: pool.size for pool in warm_pools.desired(world.control, host)}


async def test_pools_follow_profiles_and_images(world: World) -> None:
    assert await pools_of(world) == {"d-base": 2, "d-python-data-science": 2, "d-node": 2}
    await profiles.update(world.control, world.me, world.profile_id("node"), {"warm_pool_size": 0})
    await profiles.update(world.control, world.me, world.profile_id("base"), {"warm_pool_size": 5})
    world.host.images[1] = dataclasses.replace(world.host.images[1], status=ImageStatus.BUILDING, digest="")
    world.host.publish({"type": "image.changed", "name": "python-data-science", "status": "building"})
    await world.until(lambda: len(world.host.pools[-1].pools) == 1 if world.host.pools else False)
    assert {pool.shape.image_digest: pool.size for pool in world.host.pools[-1].pools} == {"d-base": 5}


async def test_profiles_of_others_get_a_pool_when_they_are_used(world: World) -> None:
    stranger = await world.stranger()
    assert len(await pools_of(world)) == 3
    host = world.control.hosts.get(world.host.id)
    assert len(warm_pools.desired(world.control, host)) == 3
    await rooms.get_or_create(world.control, stranger, world.profile_id(of=stranger), "r")
    assert len(warm_pools.desired(world.control, host)) == 4
    await world.until(lambda: len(world.host.pools[-1].pools) == 4)


async def test_a_draining_host_takes_no_new_rooms(world: World) -> None:
    await rooms.get_or_create(world.control, world.me, world.profile_id(), "old")
    with pytest.raises(ForbiddenError):
        await hosts.set_draining(world.control, world.me, world.host.id, draining=True)
    assert (await hosts.set_draining(world.control, world.operator, world.host.id, draining=True)).host.draining
    with pytest.raises(HostDrainingError):
        await rooms.get_or_create(world.control, world.me, world.profile_id(), "new")
    view = await rooms.get_or_create(world.control, world.me, world.profile_id(), "old")
    assert view.host is not None
    assert view.host.draining
    (seen,) = await hosts.list_hosts(world.control, world.operator)
    assert (seen.reachable, seen.status["name"], seen.rooms, seen.open_calls) == (True, "scripted", 1, 0)
    await world.until(lambda: world.host.pools[-1].pools == ())
    await hosts.set_draining(world.control, world.operator, world.host.id, draining=False)
    await rooms.get_or_create(world.control, world.me, world.profile_id(), "new")
    await world.until(lambda: world.host.pools[-1].pools != ())


async def test_after_its_deadline_a_drained_host_finishes_what_runs_and_takes_nothing(world: World) -> None:
    profile_id = world.profile_id()
    await rooms.get_or_create(world.control, world.me, profile_id, "old")

    async def drain(seconds: float | None) -> None:
        await hosts.set_draining(world.control, world.operator, world.host.id, draining=True, deadline_seconds=seconds)

    async def run() -> int:
        entry = await rooms.ready_entry(world.control, world.me, profile_id, "old")
        request = executions.ExecutionRequest("true")
        async with executions.start(world.control, world.me, entry, request) as execution:
            return (await execution.result()).exit_code

    await drain(3_600)
    assert await run() == 0
    world.host.hold_execute.clear()
    running = asyncio.create_task(run())
    await world.until(lambda: world.host.count(Execute) == 2)
    await drain(0)
    (seen,) = await hosts.list_hosts(world.control, world.operator)
    assert (seen.open_calls, running.done()) == (1, False)
    with pytest.raises(HostDrainingError) as caught:
        await run()
    assert caught.value.retry_after_seconds == 30
    world.host.hold_execute.set()
    assert await running == 0
    await drain(None)
    assert await run() == 0
    await drain(0)
    await rooms.destroy(world.control, world.me, profile_id, "old")


async def test_a_drain_outlives_the_process(still_world: World) -> None:
    world = still_world
    async with world.running() as control:
        world.control = control
        operator = world.operator
        await hosts.set_draining(control, operator, world.host.id, draining=True, deadline_seconds=60)
        (before,) = control.hosts
    async with world.running() as control:
        (after,) = control.hosts
        assert after.host == before.host and after.host.draining and after.host.drain_deadline is not None


async def test_tools_name_what_the_image_has(world: World) -> None:
    await rooms.get_or_create(world.control, world.me, world.profile_id(), "r")
    described = await tools.describe(world.control, world.me, world.profile_id(), "r")
    assert [tool.name for tool in described.tools] == ["execute", "read_file", "write_file"]
    assert "python 3.11" in described.tools[0].description
    for tool in described.tools:
        assert tool.parameters["additionalProperties"] is False
        assert set(tool.parameters["required"]) == set(tool.parameters["properties"])
