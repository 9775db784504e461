"""What is written behind, when the one who writes it goes away."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from innkeeper.control import audit, rooms
from innkeeper.core.token import Scope

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
