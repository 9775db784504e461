"""The end of a VM against what is asked of it at that moment."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from innkeeper.control import expiry, lifecycle
from innkeeper.core.vm import parse_vm_id
from innkeeper.errors import InstanceNotFoundError, UnavailableError

pytestmark = pytest.mark.anyio


def entry_of(api: Any, vm_id: str) -> Any:
    parsed = parse_vm_id(vm_id)
    assert parsed is not None
    return api.world.control.live.by_instance(parsed[0])


@asynccontextmanager
async def ending(api: Any, made: dict[str, Any]) -> AsyncIterator[asyncio.Task[Any]]:
    """The VM's end has begun, and its decision is not written yet."""
    control = api.world.control
    async with control.later._lock:
        ends = asyncio.create_task(api.client.delete(f"/v1/vms/{made['vm_id']}"))
        await api.world.until(lambda: control.flights.get(entry_of(api, made["vm_id"]).key) is not None)
        yield ends


async def make(api: Any, **body: Any) -> dict[str, Any]:
    answer = await api.client.post("/v1/vms", json=body)
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def test_nothing_is_promised_of_a_vm_that_ends(api: Any) -> None:
    made = await make(api)
    path = f"/v1/vms/{made['vm_id']}"
    async with ending(api, made) as ends:
        answers = [
            await api.client.post(f"{path}/hold", json={"seconds": 100}),
            await api.client.patch(path, json={"idle_seconds": 100}),
            await api.client.post(f"{path}/exec", json={"command": "true"}),
            await api.client.post("/v1/shares", json={"port": 80, "vm_id": made["vm_id"]}),
        ]
    assert [answer.status_code for answer in answers] == [404] * 4
    assert (await ends).json()["end_reason"] == "deleted"


async def test_a_change_that_waits_while_the_end_is_decided_does_not_take_its_reason_away(api: Any) -> None:
    made = await make(api)
    path, gate, control = f"/v1/vms/{made['vm_id']}", threading.Event(), api.world.control
    await control.later.flush(control)
    held = asyncio.create_task(control.database.write(lambda _: gate.wait(20)))
    await api.world.until(lambda: control.database.load.waiting >= 1)
    # More memory is written before anything else of the change is.
    changing = asyncio.create_task(api.client.patch(path, json={"memory_mb": 1024, "metadata": {"a": "b"}}))
    await api.world.until(lambda: control.database.load.waiting >= 2)
    ends = asyncio.create_task(api.client.delete(path))
    await api.world.until(lambda: control.database.load.waiting >= 3)
    gate.set()
    await held
    assert (await ends).json()["end_reason"] == "deleted"
    assert (await changing).status_code == 404
    record = (await api.client.get(path)).json()
    assert (record["status"], record["end_reason"]) == ("killed", "deleted")


async def test_a_session_gets_its_next_vm_when_the_one_before_has_ended(api: Any) -> None:
    made = await make(api)
    async with ending(api, made) as ends:
        body = {"code": "1", "session_id": made["session_id"]}
        asking = [
            asyncio.create_task(api.client.post("/execute", json=body)),
            asyncio.create_task(api.client.post("/v1/vms?wait=false", json={"session_id": made["session_id"]})),
        ]
        killing = asyncio.create_task(api.client.post("/kill", json={"session_id": made["session_id"]}))
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in (*asking, killing))
    assert (await ends).status_code == (await killing).status_code == 200
    executed, attached = [(await task).json()["vm_id"] for task in asking]
    assert executed == attached != made["vm_id"]


async def test_who_means_a_vm_does_not_get_its_sessions_next_one(api: Any) -> None:
    made = await make(api)
    before = entry_of(api, made["vm_id"])
    await api.client.delete(f"/v1/vms/{made['vm_id']}")
    await make(api, session_id=made["session_id"])
    with pytest.raises(InstanceNotFoundError):
        await lifecycle.ready(api.world.control, api.world.me, before)


async def test_an_end_that_could_not_be_stored_is_none(api: Any) -> None:
    made = await make(api)
    control = api.world.control
    # So that the row's lease is free.
    await control.later.flush(control)
    write = control.database.write

    async def full(query: Any, *args: Any, **kwargs: Any) -> Any:
        def then_full(connection: Any) -> None:
            query(connection, *args, **kwargs)
            raise UnavailableError("full")

        return await write(then_full)

    control.database.write = full
    assert (await api.client.delete(f"/v1/vms/{made['vm_id']}")).status_code == 503
    control.database.write = write
    record = (await api.client.get(f"/v1/vms/{made['vm_id']}")).json()
    assert (record["status"], record["end_reason"]) == ("active", None)


async def test_a_vm_that_was_held_in_the_last_moment_lives(api: Any) -> None:
    entry = entry_of(api, (await make(api))["vm_id"])
    await expiry._expire(api.world.control, entry)
    assert entry.ready
    entry.change_vm(dataclasses.replace(entry.vm, expires_at=datetime.now(UTC)))
    await expiry._expire(api.world.control, entry)
    assert entry.doomed
