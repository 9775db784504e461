"""Instances that nobody needs go away.

Idle ones after their spec's `idle_seconds`, never while a process of the user runs or a call is open; VMs at the end of their lifetime, whatever runs.
Both ends of a VM are announced before they come.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import structlog

from innkeeper.control import clock, lifecycle, suspension, vms
from innkeeper.control.live_table import Entry
from innkeeper.control.reconciler import system_principal
from innkeeper.control.tasks import wait_for_hint
from innkeeper.control.vm_entry import VmEntry
from innkeeper.core.host_verbs import ListMachines, to_wire
from innkeeper.core.instance import InstanceState
from innkeeper.core.token import Principal
from innkeeper.errors import InnkeeperError
from innkeeper.ids import parse_uuid

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

POLL_SECONDS = 30.0
# A VM's end is announced this long before, or after half of its time where that is later.
NOTICE_SECONDS = 60.0
# Two readings of how long a guest has been idle differ by less, where nothing was done in it meanwhile.
SLACK_SECONDS = 2.0
# What could not be ended is tried again after this long.
SOON_SECONDS = 0.5
# A VM that could not be suspended.
AGAIN_SECONDS = 60.0
HOST_SECONDS = 30.0
# Where nothing is going on in the control side; an instance in any other state has a flight that will end.
RESTING = (InstanceState.READY, InstanceState.STOPPED, InstanceState.FAILED)


async def step(control: Control) -> None:
    """Wait until the next poll, or the next end of a VM or its announcement, then look once."""
    await wait_for_hint(control.expiry_hint, at_most_seconds=_patience(control, time.time()))
    announce(control)
    await asyncio.gather(*(_expire(control, entry) for entry in control.live if _over(control, entry)))
    await expire(control)


def announce(control: Control) -> None:
    """Tell of the ends of VMs that are near, each once: their users may hold them."""
    now = time.time()
    for entry in control.live:
        if isinstance(entry, VmEntry) and not entry.doomed and not entry.lasts:
            ends_at = entry.vm.expires_at
            if entry.announced != ends_at and now >= ends_at.timestamp() - notice_seconds(entry.vm.lifetime_seconds):
                entry.announced = ends_at
                entry.note("expiring", "lifetime", at=ends_at.isoformat())


def notice_seconds(of_seconds: float) -> float:
    """How long before the end of a time it is announced."""
    return min(NOTICE_SECONDS, of_seconds / 2)


def _patience(control: Control, now: float) -> float:
    due = [POLL_SECONDS]
    for entry in control.live:
        if isinstance(entry, VmEntry) and not entry.doomed and not entry.lasts:
            ends_at = entry.vm.expires_at
            notice = notice_seconds(entry.vm.lifetime_seconds) if entry.announced != ends_at else 0.0
            due.append(ends_at.timestamp() - notice - now)
            if entry.spec.idle_seconds is not None:
                idle_at = entry.last_active + entry.spec.idle_seconds
                # A moment after it, so that it is over by every reading.
                idle = (idle_at - notice_seconds(entry.spec.idle_seconds), (entry.announced_idle or idle_at) + 0.1)
                # One that is overdue is at work, as far as is known; the polls look whether it still is.
                due += (moment - now for moment in idle if moment > now)
    return max(SOON_SECONDS, min(due))


def _over(control: Control, entry: Entry) -> bool:
    """Whether a VM's lifetime is over, whatever runs in it; one that is coming up ends when it is up."""
    return (
        isinstance(entry, VmEntry)
        and not entry.doomed
        and not entry.lasts
        and clock.now() >= entry.vm.expires_at
        and control.flights.get(entry.key) is None
    )


async def expire(control: Control) -> list[UUID]:
    """Destroy the instances that are idle for too long now, their ids; and announce it of the VMs that soon will be."""
    now = time.time()
    idle = [entry for entry in control.live if _overdue(control, entry, now + _notice(entry))]
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
        if machine is not None and machine["user_processes"] > 0:
            if isinstance(entry, VmEntry):
                # What was announced does not come; the next announcement is a new one.
                entry.announced_idle = None
            continue
        # The host took its time to answer: what began meanwhile counts.
        now = time.time()
        idle_seconds = now - entry.last_active
        if machine is not None:
            idle_seconds = min(idle_seconds, machine["idle_seconds"])
        if isinstance(entry, VmEntry) and not _announced_idle(control, entry, now, idle_seconds):
            continue
        if _past(entry, idle_seconds) and _overdue(control, entry, now) and await _end(control, entry, "idle"):
            gone.append(entry.instance.id)
    return gone


async def _expire(control: Control, entry: Entry) -> None:
    # Looked at once more, since a task begins a moment after it was made, and the VM may have been held in that moment.
    if _over(control, entry):
        await _end(control, entry, "expired")


def _announced_idle(control: Control, entry: VmEntry, now: float, idle_seconds: float) -> bool:
    """Whether the moment is over at which an announcement said that the VM would end for being idle; it is announced now where it was not."""
    limit = entry.spec.idle_seconds
    if limit is None or not _overdue(control, entry, now + _notice(entry)):
        return False
    ends_at = now + limit - idle_seconds
    if entry.announced_idle is None or ends_at > entry.announced_idle + SLACK_SECONDS:
        if idle_seconds + _notice(entry) < limit:
            return False
        # Whoever looks late owes the notice all the same.
        entry.announced_idle = max(ends_at, now + _notice(entry))
        at = datetime.fromtimestamp(entry.announced_idle, UTC)
        entry.note("expiring", "idle", at=at.isoformat())
        control.expiry_hint.set()
    return now >= entry.announced_idle


def _notice(entry: Entry) -> float:
    """How long before its end for being idle that is announced; 0 where there is nobody to tell."""
    limit = entry.spec.idle_seconds
    return notice_seconds(limit) if isinstance(entry, VmEntry) and limit is not None else 0.0


async def _end(control: Control, entry: Entry, reason: str) -> bool:
    principal = system_principal(entry.instance.organization_id, "expiry")
    if isinstance(entry, VmEntry) and entry.vm.auto_suspend:
        await _suspend(control, principal, entry, reason)
        return False
    try:
        await lifecycle.destroy(control, principal, entry, verb="expire", reason=reason)
    except InnkeeperError as error:
        log.warning(
            "an instance could not be ended", instance_id=str(entry.instance.id), why=reason, reason=error.message
        )
        return False
    control.metrics.instances_expired += 1
    return True


async def _suspend(control: Control, principal: Principal, entry: VmEntry, reason: str) -> None:
    """Suspend a VM where it would end. One that cannot be suspended lives on, with what it holds, and that is tried again."""
    try:
        await suspension.sleep(control, principal, entry, reason)
    except InnkeeperError as error:
        log.warning("a VM could not be suspended", instance_id=str(entry.instance.id), reason=error.message)
        if not entry.doomed:
            await vms.put_off_end(control, entry, timedelta(seconds=AGAIN_SECONDS))


def _overdue(control: Control, entry: Entry, now: float) -> bool:
    return (
        entry.instance.state in RESTING
        and entry.open_streams == 0
        and control.flights.get(entry.key) is None
        and _past(entry, now - entry.last_active)
        and not (isinstance(entry, VmEntry) and (entry.held or entry.lasts))
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
