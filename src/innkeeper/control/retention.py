"""History goes after a while: audit events, VMs' executions, instances that were destroyed, sessions, which machine used what.

A little at a time: no request waits for it.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import structlog

from innkeeper.control import clock, idempotency
from innkeeper.store import audit_events, executions, idempotency_keys, instances, sessions, usage

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

POLL_SECONDS = 600.0
# A transaction of this many rows takes the one writer for some 10 ms; a pass of them leaves most of its time to others.
BATCH_ROWS = 500
BATCHES = 40
PAUSE_SECONDS = 0.25


async def step(control: Control) -> None:
    """Wait for the next pass, then make it."""
    await asyncio.sleep(POLL_SECONDS)
    await forget(control)


async def forget(control: Control) -> int:
    """Delete what is older than the settings allow, at most BATCHES × BATCH_ROWS rows of each kind; how many went. The next pass goes on."""
    before = clock.now() - timedelta(days=control.settings.audit_retention_days)
    gone = 0
    for delete in (
        audit_events.delete_older,
        executions.delete_older,
        instances.delete_destroyed,
        sessions.delete_old,
        usage.merge_older,
    ):
        for _ in range(BATCHES):
            count: int = await control.database.write(delete, before, limit=BATCH_ROWS)
            gone += count
            if count < BATCH_ROWS:
                break
            await asyncio.sleep(PAUSE_SECONDS)
    keys_before = clock.now() - timedelta(seconds=idempotency.KEPT_SECONDS)
    gone += await control.database.write(idempotency_keys.delete_old, keys_before, limit=BATCHES * BATCH_ROWS)
    control.metrics.rows_forgotten += gone
    if gone:
        log.info("forgot what is older than its retention", rows=gone, before=_day(before))
    return gone


def _day(moment: datetime) -> str:
    return moment.date().isoformat()
