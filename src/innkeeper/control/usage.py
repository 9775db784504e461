"""What organizations use: processor and memory time of their guests, counted from the hosts' own sums."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa
import structlog

from innkeeper.control import clock
from innkeeper.control.access import require
from innkeeper.core.host_verbs import ReadUsage, to_wire
from innkeeper.core.token import Principal, Scope
from innkeeper.core.usage import Used
from innkeeper.errors import InnkeeperError, InvalidRequestError
from innkeeper.ids import parse_uuid
from innkeeper.store import instances
from innkeeper.store import usage as store
from innkeeper.store.usage import UsedOnDay

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

POLL_SECONDS = 60.0
HOST_SECONDS = 30.0
DAYS_MAX = 365
# A host that says more of one machine is wrong: ten years of a thousand processors, ten years of a TiB.
CPU_US_MAX = 10**6 * 315_576_000 * 1_000
MEMORY_MIB_SECONDS_MAX = 315_576_000.0 * 1_048_576


@dataclass(frozen=True, slots=True)
class DayOfUse:
    """A day (UTC) and what was used on it."""

    day: date
    used: Used


async def step(control: Control) -> None:
    """Wait for the next count, then count."""
    await asyncio.sleep(POLL_SECONDS)
    await count(control)


async def count(control: Control) -> None:
    """Add what the hosts' guests used since the last count to the sums of today."""
    for host_id in control.bus.hosts():
        try:
            await count_host(control, host_id)
        except InnkeeperError as error:
            log.warning("a host could not be asked for its usage", host_id=str(host_id), reason=error.message)


async def count_host(control: Control, host_id: UUID) -> None:
    """`count` of one host. What has ended is forgotten there when it is stored here. Raises the host's errors."""
    async with control.counting:
        counted: tuple[str, ...] = ()
        while True:
            request = ReadUsage(counted)
            answer = await control.bus.request(host_id, ReadUsage.verb, to_wire(request), timeout_seconds=HOST_SECONDS)
            sums = _sums([*answer["running"], *answer["ended"]])
            await control.database.write(_add, sums, today=clock.now().date())
            counted = tuple(str(one["machine_id"]) for one in answer["ended"])
            if not counted:
                return


def _sums(told: list[dict[str, Any]]) -> dict[str, tuple[UUID, Used]]:
    """What a host told of each machine; of one that it told twice, the last."""
    found = {}
    for one in told:
        instance_id = parse_uuid(str(one["instance_id"]))
        if instance_id is not None:
            cpu_us = min(max(0, int(one["cpu_us"])), CPU_US_MAX)
            memory = min(max(0.0, float(one["memory_mb"]) * float(one["seconds"])), MEMORY_MIB_SECONDS_MAX)
            found[str(one["machine_id"])] = (instance_id, Used(cpu_us, memory))
    return found


def _add(connection: sa.Connection, sums: dict[str, tuple[UUID, Used]], *, today: date) -> None:
    more = []
    for machine_id, (instance_id, total) in sums.items():
        instance = instances.get(connection, instance_id)
        if instance is None:
            continue
        known = store.of_machine(connection, machine_id)
        # A clock that was set back, or a group that is half gone, takes nothing away.
        rest = Used(max(0, total.cpu_us - known.cpu_us), max(0.0, total.memory_mib_seconds - known.memory_mib_seconds))
        if rest != Used():
            more.append(UsedOnDay(machine_id, today, instance.organization_id, instance_id, rest))
    store.add(connection, more)


async def by_day(
    control: Control, principal: Principal, *, first: date | None = None, last: date | None = None, days: int = 30
) -> list[DayOfUse]:
    """What the organization used on each day from `first` to `last`, the last `days` days where those are None; up to this moment.

    Raises:
        InvalidRequestError: a span of no days or of more than DAYS_MAX.

    """
    require(principal, Scope.ROOMS)
    if not 1 <= days <= DAYS_MAX:
        raise InvalidRequestError(f"days: must be between 1 and {DAYS_MAX}")
    last = last or clock.now().date()
    try:
        first = first or last - timedelta(days=days - 1)
    except OverflowError:
        raise InvalidRequestError(f"end_date: not {days} days after the first of all days") from None
    if not 0 <= (last - first).days < DAYS_MAX:
        raise InvalidRequestError(f"start_date: must not be after end_date, and at most {DAYS_MAX} days together")
    await count(control)
    used = await control.database.read(store.by_day, principal.organization_id, first, last)
    span = (first + timedelta(days=n) for n in range((last - first).days + 1))
    return [DayOfUse(day, used.get(day, Used())) for day in span]


async def of_instance(control: Control, instance_id: UUID, *, host_id: UUID | None) -> Used:
    """What an instance used until now; the caller has checked whose it is."""
    if host_id is not None and host_id in control.bus.hosts():
        try:
            await count_host(control, host_id)
        except InnkeeperError as error:
            log.warning("a host could not be asked for its usage", host_id=str(host_id), reason=error.message)
    return await control.database.read(store.of_instance, instance_id)
