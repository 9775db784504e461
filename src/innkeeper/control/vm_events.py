"""What happened to a VM and what is announced: listed, and followed as it happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING
from uuid import UUID

from innkeeper.control import vms
from innkeeper.control.vm_entry import VmEntry
from innkeeper.core.token import Principal
from innkeeper.core.vm import VmEvent
from innkeeper.store import vms as store

if TYPE_CHECKING:
    from innkeeper.control.context import Control

PAGE_MAX = 1_000


async def list_events(
    control: Control, principal: Principal, vm_id: str, *, after: UUID | None = None, limit: int = PAGE_MAX
) -> list[VmEvent]:
    """What happened to the VM, and what is announced, oldest first. Raises VmNotFoundError."""
    view = await vms.find(control, principal, vm_id)
    return await _read(control, view.vm.instance_id, after, limit)


async def follow(
    control: Control, principal: Principal, vm_id: str, *, after: UUID | None = None
) -> AsyncIterator[VmEvent]:
    """What happened to the VM after the event `after`, then what happens, until it has ended. It is no use of the VM. Raises VmNotFoundError."""
    view = await vms.find(control, principal, vm_id)
    return _follow(control, view.vm.instance_id, after)


async def _follow(control: Control, instance_id: UUID, after: UUID | None) -> AsyncIterator[VmEvent]:
    more = asyncio.Event()
    entry = control.live.by_instance(instance_id)
    if isinstance(entry, VmEntry):
        entry.followers.add(more)
    try:
        while True:
            more.clear()
            lives = control.live.by_instance(instance_id) is not None
            page = await _read(control, instance_id, after, PAGE_MAX)
            for event in page:
                yield event
                after = event.id
            if not page:
                if not lives:
                    return
                await more.wait()
    finally:
        if isinstance(entry, VmEntry):
            entry.followers.discard(more)


async def _read(control: Control, instance_id: UUID, after: UUID | None, limit: int) -> list[VmEvent]:
    await control.later.flush(control)
    return await control.database.read(store.events, instance_id, after=after, limit=limit)
