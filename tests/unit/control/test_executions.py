"""Executions: output, result, retry on a lost machine, what is kept, and who may."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest

from innkeeper.control import audit, executions, rooms
from innkeeper.control.executions import ExecutionRequest
from innkeeper.control.room_entry import RoomEntry
from innkeeper.core.host_verbs import EnsureMachine, Execute
from innkeeper.core.instance import InstanceState
from innkeeper.errors import (
    ExecutionNotFoundError,
    InstanceNotFoundError,
    InvalidRequestError,
    ProfileNotFoundError,
    UnavailableError,
)

pytestmark = pytest.mark.anyio
World = Any


async def room(world: World) -> RoomEntry:
    return await rooms.ready_entry(world.control, world.me, world.profile_id(), "r")


async def run(world: World, command: str = "true", **fields: Any) -> tuple[bytes, executions.ExecutionResult]:
    request = ExecutionRequest(command, **fields)
    async with executions.start(world.control, world.me, await room(world), request) as execution:
        output = b"".join([piece.data async for piece in execution.output])
        return output, await execution.result()


async def test_output_and_result(world: World) -> None:
    world.host.output = [b"a", b"b\n"]
    output, result = await run(world, "echo", cwd="/tmp", env={"A": "1"}, timeout_seconds=7)
    assert output == b"ab\n"
    assert (result.exit_code, result.files_changed_total) == (0, 1)
    assert result.files_changed == (executions.FileChange("/tmp/a", "created", 1, "text/plain"),)
    asked = next(request for request in world.host.asked if isinstance(request, Execute))
    assert (asked.command, asked.cwd, asked.env, asked.timeout_seconds) == ("echo", "/tmp", {"A": "1"}, 7)


async def test_the_profile_says_the_time_limit(world: World) -> None:
    await run(world)
    assert next(r for r in world.host.asked if isinstance(r, Execute)).timeout_seconds == 120


async def test_input_larger_than_the_credit(world: World) -> None:
    data = bytes(range(256)) * 20_000
    world.host.output = []
    output, _ = await run(world, "cat", stdin=data)
    assert output == data


async def test_the_result_alone(world: World) -> None:
    request = ExecutionRequest("true")
    async with executions.start(world.control, world.me, await room(world), request) as execution:
        assert (await execution.result()).exit_code == 0


async def test_nothing_is_written_before_the_command_starts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await rooms.get_or_create(world.control, world.me, world.profile_id(), "r")
    await world.control.later.flush(world.control)

    async def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the database was asked")

    # The writer of what nobody waits for stays outside meanwhile: on a slow machine its time may come.
    async with asyncio.timeout(60), world.control.later._lock:
        with monkeypatch.context() as patch:
            patch.setattr(world.control.database, "read", refuse)
            patch.setattr(world.control.database, "write", refuse)
            await run(world)
    await world.control.later.flush(world.control)
    page = await audit.list_events(world.control, world.me, limit=1)
    assert page.events[0].action == "execution.start"
    assert "true" not in str(page.events[0].details)


@pytest.mark.parametrize("read_output", [True, False])
async def test_a_lost_machine_is_brought_up_once_and_the_command_sent_again(world: World, read_output: bool) -> None:
    view = await rooms.get_or_create(world.control, world.me, world.profile_id(), "r")
    world.host.machines.clear()
    request = ExecutionRequest("cat", stdin=b"input")
    world.host.output = []
    async with executions.start(world.control, world.me, await room(world), request) as execution:
        if read_output:
            assert b"".join([piece.data async for piece in execution.output]) == b"input"
        assert (await execution.result()).exit_code == 0
        assert execution.instance.id == view.instance.id
    assert world.host.count(EnsureMachine) == 2
    assert world.host.count(Execute) == 2
    assert world.control.metrics.execution_retries == 1


async def test_a_machine_that_stays_lost_is_not_asked_for_ever(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(instance_id: Any) -> None:
        raise InstanceNotFoundError

    monkeypatch.setattr(world.host, "_there", never)
    with pytest.raises(UnavailableError):
        await run(world)
    assert world.host.count(Execute) == 2


async def test_an_open_command_counts_as_use(world: World) -> None:
    async with executions.start(world.control, world.me, await room(world), ExecutionRequest("true")) as execution:
        entry = world.control.live.by_instance(execution.instance.id)
        assert entry.open_streams == 1
        await execution.result()
    assert entry.open_streams == 0


async def test_a_caller_that_leaves_ends_the_call(world: World) -> None:
    async def endless() -> None:
        request = ExecutionRequest("sleep", stream=True)
        async with executions.start(world.control, world.me, await room(world), request) as execution:
            async for _ in execution.output:
                started.set()
                await asyncio.Event().wait()

    started = asyncio.Event()
    running = asyncio.create_task(endless())
    await started.wait()
    running.cancel()
    await asyncio.wait({running})
    entry = world.control.live.find((world.profile_id(), "r"))
    assert entry.open_streams == 0
    assert entry.instance.state is InstanceState.READY


async def test_output_and_changes_can_be_read_again(world: World) -> None:
    entry = await room(world)
    async with executions.start(world.control, world.me, entry, ExecutionRequest("x")) as execution:
        await execution.result()
    args = (world.control, entry, execution.execution_id)
    page = await executions.read_output(*args, offset=1, limit=3)
    assert (page.data, page.next_offset, page.total_bytes, page.ended) == (b"ell", 4, 6, True)
    changes = await executions.files_changed(*args)
    assert (changes.total, changes.next_cursor, changes.files_changed[0].path) == (1, None, "/tmp/a")
    with pytest.raises(ExecutionNotFoundError):
        await executions.read_output(world.control, entry, uuid4())


@pytest.mark.parametrize(
    "fields",
    [
        {"command": ""},
        {"command": "  \n"},
        {"command": "a\0b"},
        {"command": "\ud800"},
        {"command": "x" * 1_048_577},
        {"command": "x", "timeout_seconds": 0},
        {"command": "x", "timeout_seconds": 3_601},
        {"command": "x", "timeout_seconds": float("nan")},
        {"command": "x", "cwd": "tmp"},
        {"command": "x", "env": {"A B": "x"}},
    ],
)
async def test_bad_requests(world: World, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        await run(world, **fields)
    assert world.host.count(EnsureMachine) == 0


async def test_another_organization_does_not_reach_the_room(world: World) -> None:
    await run(world)
    stranger = await world.stranger()
    for find in (rooms.ready_entry, rooms.existing_entry):
        with pytest.raises(ProfileNotFoundError):
            await find(world.control, stranger, world.profile_id(), "r")
    assert world.host.count(EnsureMachine) == 1


async def test_a_room_that_is_destroyed_meanwhile_is_not_made_again(world: World) -> None:
    entry = await room(world)
    await rooms.destroy(world.control, world.me, world.profile_id(), "r")
    with pytest.raises(UnavailableError, match="removed meanwhile"):
        async with executions.start(world.control, world.me, entry, ExecutionRequest("x")) as execution:
            await execution.result()
    assert world.host.count(EnsureMachine) == 1
