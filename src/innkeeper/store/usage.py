"""What guests used: sums per machine and day (UTC)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.usage import Used
from innkeeper.store.tables import usage


@dataclass(frozen=True, slots=True)
class UsedOnDay:
    """What a machine of an instance used more on a day."""

    machine_id: str
    day: date
    organization_id: UUID
    instance_id: UUID
    used: Used


def add(connection: sa.Connection, more: Iterable[UsedOnDay], *, merged: bool = False) -> None:
    """Add to the sums. `merged` rows are of no machine any more."""
    for one in more:
        row = (usage.c.machine_id == one.machine_id) & (usage.c.day == one.day)
        found = connection.execute(
            sa.update(usage)
            .where(row)
            .values(
                cpu_us=usage.c.cpu_us + one.used.cpu_us,
                memory_mib_seconds=usage.c.memory_mib_seconds + one.used.memory_mib_seconds,
            )
        )
        if found.rowcount == 0:
            connection.execute(
                sa.insert(usage).values(
                    machine_id=one.machine_id,
                    day=one.day,
                    organization_id=one.organization_id,
                    instance_id=one.instance_id,
                    cpu_us=one.used.cpu_us,
                    memory_mib_seconds=one.used.memory_mib_seconds,
                    merged=merged,
                )
            )


def of_machine(connection: sa.Connection, machine_id: str) -> Used:
    """All that is counted of a machine."""
    return _sum(connection, usage.c.machine_id == machine_id)


def of_instance(connection: sa.Connection, instance_id: UUID) -> Used:
    """All that is counted of an instance's machines."""
    return _sum(connection, usage.c.instance_id == instance_id)


def by_day(connection: sa.Connection, organization_id: UUID, first: date, last: date) -> dict[date, Used]:
    """What an organization used on each day of a span that it used something on."""
    query = (
        sa.select(usage.c.day, sa.func.sum(usage.c.cpu_us), sa.func.sum(usage.c.memory_mib_seconds))
        .where(usage.c.organization_id == organization_id, usage.c.day.between(first, last))
        .group_by(usage.c.day)
    )
    return {day: Used(int(cpu_us), float(memory)) for day, cpu_us, memory in connection.execute(query)}


def merge_older(connection: sa.Connection, before: datetime, *, limit: int) -> int:
    """Make one row a day and organization of what machines used that ended before a time's day, at most `limit` rows at once; how many went.

    A machine that goes on keeps its rows: what it says of itself is compared with their sum.
    """
    later = usage.alias("later")
    lives = sa.exists().where(later.c.machine_id == usage.c.machine_id, later.c.day >= before.date())
    old = sa.select(usage).where(usage.c.day < before.date(), usage.c.merged.is_(False), ~lives).limit(limit)
    rows = connection.execute(old).all()
    for row in rows:
        connection.execute(sa.delete(usage).where(usage.c.machine_id == row.machine_id, usage.c.day == row.day))
        used = Used(row.cpu_us, row.memory_mib_seconds)
        whole = str(row.organization_id)
        add(connection, [UsedOnDay(whole, row.day, row.organization_id, row.organization_id, used)], merged=True)
    return len(rows)


def _sum(connection: sa.Connection, which: sa.ColumnElement[bool]) -> Used:
    query = sa.select(
        sa.func.coalesce(sa.func.sum(usage.c.cpu_us), 0), sa.func.coalesce(sa.func.sum(usage.c.memory_mib_seconds), 0.0)
    )
    cpu_us, memory = connection.execute(query.where(which)).one()
    return Used(int(cpu_us), float(memory))
