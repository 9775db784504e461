"""What is written behind, when the one who writes it goes away."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from innkeeper.control import audit, clock, rooms, session_vm
from innkeeper.control.vm_entry import event_of
from innkeeper.core.execution import ExecutionRow
from innkeeper.core.token import Scope
from innkeeper.core.vm import VmRequest
from innkeeper.errors import UnavailableError
from innkeeper.ids import uuid7
from innkeeper.store import executions
from innkeeper.store import vms as store

pytestmark = pytest.mark.anyio


async def test_a_flush_that_is_cut_short_loses_nothing(world: Any) -> None:
    control, me, gate = world.control, world.me, threading.Event()
    entry = await rooms.ready_entry(control, me, world.profile_id(), "r")
    await control.later.flush(control)
    held = asyncio.create_task(control.database.write(lambda _: gate.wait(20)))
    await world.until(lambda: control.database.load.waiting == 1)
    # Two parts, of which the first waits for the database.
    control.live.touch(entry)
    control.later.audit(audit.event(me, "token.rename", "token", "last"))
    writing = asyncio.create_task(control.later.flush(control))
    await world.until(lambda: control.database.load.waiting == 2)
    writing.cancel()
    await asyncio.wait({writing})
    assert writing.cancelled()
    gate.set()
    await held
    await control.later.flush(control)
    reader = type(me)(me.organization_id, None, frozenset({Scope.AUDIT}), "reader")
    assert (await audit.list_events(control, reader)).events[0].object_id == "last"


async def test_what_a_full_disk_did_not_take_is_written_later_and_once(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    control, me = world.control, world.me
    view = await session_vm.create(control, me, VmRequest())
    await control.later.flush(control)
    row = ExecutionRow(uuid7(), me.organization_id, view.vm.instance_id, "exec", clock.now())
    happened = event_of(view.vm, "held", "r")
    done = audit.event(me, "token.rename", "token", "last")
    write = control.database.write

    def attempt(lets: int) -> Any:
        left = lets

        async def limited(query: Any, *args: Any) -> Any:
            nonlocal left
            if not left:
                raise UnavailableError("full")
            left -= 1
            return await write(query, *args)

        return limited

    control.later.vm_event(happened)
    control.later.execution(row)
    control.later.audit(done)
    # Each time one more of what there is to write finds its place.
    for lets in (0, 1, 1):
        with monkeypatch.context() as patch:
            patch.setattr(control.database, "write", attempt(lets))
            await control.later.flush(control)
    assert control.metrics.failed_writes >= 3
    await control.later.flush(control)
    assert await control.database.read(executions.get, row.id) == row
    events = await control.database.read(store.events, view.vm.instance_id, after=None, limit=100)
    assert [one.id for one in events].count(happened.id) == 1
    reader = type(me)(me.organization_id, None, frozenset({Scope.AUDIT}), "reader")
    assert [one.object_id for one in (await audit.list_events(control, reader)).events].count("last") == 1
