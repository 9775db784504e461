"""Makes actual equal desired: adopts what hosts run, finishes what was begun, and takes away what belongs to no row.

Requests do their own work at once; this is for what they could not finish: a crash, a lost host, a write that was never
made. It is woken by hints; the polling is a safety net.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from uuid import UUID

import structlog

from innkeeper.control import clock, forks, mount_work, provisioning, snapshot_taking, suspension, volume_work
from innkeeper.control.live_table import Entry
from innkeeper.control.tasks import wait_for_hint
from innkeeper.core.host_verbs import DestroyMachine, ListMachines, to_wire
from innkeeper.core.instance import InstanceState
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import InnkeeperError
from innkeeper.ids import parse_uuid
from innkeeper.store import instances

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

POLL_SECONDS = 30.0
HOST_SECONDS = 60.0


def system_principal(organization_id: UUID, part: str) -> Principal:
    """The server itself, acting within an organization."""
    return Principal(organization_id, None, frozenset({Scope.ROOMS}), f"system:{part}")


async def step(control: Control) -> None:
    """Wait for a hint or the next poll, then settle what is unsettled and nobody works on."""
    await wait_for_hint(control.reconcile_hint, at_most_seconds=POLL_SECONDS)
    await control.later.flush(control)
    for host_id in control.bus.hosts():
        if control.hosts.get(host_id) is not None:
            try:
                await adopt(control, host_id)
                await snapshot_taking.settle(control, host_id)
                await forks.settle(control, host_id)
                await volume_work.settle(control, host_id)
                await mount_work.settle(control, host_id)
            except InnkeeperError as error:
                log.warning("a host could not be asked for what it has", host_id=str(host_id), reason=error.message)


async def adopt(control: Control, host_id: UUID) -> None:
    """Compare a host with the rows: keep what fits, note what is lost, finish what is half done, destroy what has no row."""
    # What changes between the host's answer and the comparison is not to be judged by that answer.
    before = {
        entry.instance.id: entry.instance.revision for entry in control.live if control.flights.get(entry.key) is None
    }
    answer = await control.bus.request(
        host_id, ListMachines.verb, to_wire(ListMachines()), timeout_seconds=HOST_SECONDS
    )
    machines = {
        instance_id: machine
        for machine in answer["machines"]
        if (instance_id := parse_uuid(str(machine["instance_id"]))) is not None
    }
    # The rows are read after the host was asked, and a row is committed before its host hears of it: so what the host
    # has and the rows have not can only be an orphan.
    alive = await control.database.read(instances.alive_on_host, host_id)
    for entry in control.live:
        same = before.get(entry.instance.id) == entry.instance.revision
        unchanged = same and control.flights.get(entry.key) is None
        if unchanged and entry.instance.host_id == host_id:
            _compare(control, entry, machines.get(entry.instance.id))
    await _resume(control, host_id)
    disks = (parse_uuid(str(disk)) for disk in answer["disks"])
    orphans = {*machines, *(disk for disk in disks if disk is not None)} - alive
    await asyncio.gather(*(_destroy_orphan(control, host_id, orphan) for orphan in orphans))


async def _destroy_orphan(control: Control, host_id: UUID, orphan: UUID) -> None:
    log.warning("destroying a machine or disk that belongs to nothing", instance_id=str(orphan))
    try:
        await control.bus.request(
            host_id, DestroyMachine.verb, to_wire(DestroyMachine(orphan)), timeout_seconds=HOST_SECONDS
        )
    except InnkeeperError as error:
        # The next look tries again; the rooms of the host must not wait for it.
        log.warning("an orphan could not be destroyed", instance_id=str(orphan), reason=error.message)
    else:
        control.metrics.orphans_destroyed += 1


def _compare(control: Control, entry: Entry, machine: dict[str, Any] | None) -> None:
    if not entry.ready:
        return
    if machine is None:
        provisioning.mark_lost(control, entry)
    elif machine["failure"]:
        provisioning.mark_failed(control, entry, str(machine["failure"]))


async def _resume(control: Control, host_id: UUID) -> None:
    """Begin again, each in its own flight, with what was cut short."""
    for instance_id in await control.database.read(instances.unsettled, now=clock.now()):
        entry = control.live.by_instance(instance_id)
        if entry is None or entry.instance.host_id != host_id or control.flights.get(entry.key) is not None:
            continue
        principal = system_principal(entry.instance.organization_id, "reconciler")
        if entry.instance.desired == "destroyed":
            control.flights.start(entry.key, "down", _down(control, principal, entry))
        elif entry.instance.state is InstanceState.SUSPENDING:
            control.flights.start(entry.key, "suspend", _sleep(control, principal, entry))
        elif entry.ready:
            # Memory knows better: the write that would have said so was lost.
            control.later.state(entry.instance, None)
        elif entry.instance.state is not InstanceState.FAILED:
            control.flights.start(entry.key, "up", _up(control, principal, entry))


def _down(control: Control, principal: Principal, entry: Entry) -> Any:
    return lambda: provisioning.take_down(control, principal, entry)


def _sleep(control: Control, principal: Principal, entry: Entry) -> Any:
    return lambda: suspension.put_to_sleep(control, principal, entry, "")


def _up(control: Control, principal: Principal, entry: Entry) -> Any:
    return lambda: provisioning.bring_up(control, principal, entry)
