"""Idle instances go away after their spec's `idle_seconds`; never while a process of the user runs or a call is open."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any
from uuid import UUID

import structlog

from innkeeper.control import lifecycle
from innkeeper.control.live_table import Entry
from innkeeper.control.reconciler import system_principal
from innkeeper.core.host_verbs import ListMachines, to_wire
from innkeeper.core.instance import InstanceState
from innkeeper.errors import InnkeeperError
from innkeeper.ids import parse_uuid

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

POLL_SECONDS = 30.0
HOST_SECONDS = 30.0
# Where nothing is going on in the control side; an instance in any other state has a flight that will end.
RESTING = (InstanceState.READY, InstanceState.STOPPED, InstanceState.FAILED)


async def step(control: Control) -> None:
    """Wait for the next poll, then look once."""
    await asyncio.sleep(POLL_SECONDS)
    await expire(control)


async def expire(control: Control) -> list[UUID]:
    """Destroy the instances that are idle for too long now; their ids."""
    now = time.time()
    idle = [entry for entry in control.live if _overdue(control, entry, now)]
    if not idle:
        return []
    gone = []
    machines = await _machines(
        control, {entry.instance.host_id for entry in idle if entry.instance.host_id is not None}
    )
    for entry in idle:
        host_id = entry.instance.host_id
        if host_id is None or host_id not in machines:
            continue
        machine = machines[host_id].get(entry.instance.id)
        if machine is not None and (machine["user_processes"] > 0 or not _past(entry, machine["idle_seconds"])):
            continue
        # The host took its time to answer: what began meanwhile counts.
        if not _overdue(control, entry, time.time()):
            continue
        principal = system_principal(entry.instance.organization_id, "expiry")
        try:
            await lifecycle.destroy(control, principal, entry, verb="expire")
        except InnkeeperError as error:
            log.warning(
                "an idle instance could not be destroyed", instance_id=str(entry.instance.id), reason=error.message
            )
        else:
            control.metrics.rooms_expired += 1
            gone.append(entry.instance.id)
    return gone


def _overdue(control: Control, entry: Entry, now: float) -> bool:
    return (
        entry.instance.state in RESTING
        and entry.open_streams == 0
        and control.flights.get(entry.key) is None
        and _past(entry, now - entry.last_active)
    )


def _past(entry: Entry, idle_seconds: float) -> bool:
    limit = entry.spec.idle_seconds
    return limit is not None and idle_seconds > limit


async def _machines(control: Control, host_ids: set[UUID]) -> dict[UUID, dict[UUID, dict[str, Any]]]:
    """What the hosts say of their machines; a host that does not answer is absent, and its instances stay."""
    found = {}
    for host_id in host_ids:
        try:
            answer = await control.bus.request(
                host_id, ListMachines.verb, to_wire(ListMachines()), timeout_seconds=HOST_SECONDS
            )
        except InnkeeperError as error:
            log.warning("a host could not be asked for its machines", host_id=str(host_id), reason=error.message)
            continue
        found[host_id] = {
            instance_id: machine
            for machine in answer["machines"]
            if (instance_id := parse_uuid(str(machine["instance_id"]))) is not None
        }
    return found
