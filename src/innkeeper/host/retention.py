"""What commands left goes after a while: output, records and lists of changed files. One instance at a time, with pauses."""

from __future__ import annotations

import asyncio
import time

import structlog

from innkeeper.errors import InnkeeperError
from innkeeper.host.executions import Executions
from innkeeper.host.fleet import Fleet
from innkeeper.host.instance_logs import InstanceLogs

log = structlog.stdlib.get_logger(__name__)

POLL_SECONDS = 3_600.0
PAUSE_SECONDS = 0.2
DAY_SECONDS = 86_400


async def run(fleet: Fleet, executions: Executions, logs: InstanceLogs, *, days: int, log_days: int) -> None:
    """Look at every instance again and again, until cancelled."""
    while True:
        await asyncio.sleep(POLL_SECONDS)
        try:
            known = frozenset(fleet.disks())
            logs.expire(time.time() - log_days * DAY_SECONDS, living=known.__contains__)
        except OSError:
            log.exception("old logs could not be removed")
        await forget(fleet, executions, older_than=time.time() - days * DAY_SECONDS, pause_seconds=PAUSE_SECONDS)


async def forget(fleet: Fleet, executions: Executions, *, older_than: float, pause_seconds: float = 0.0) -> int:
    """Drop the executions of every instance that ended before `older_than` (Unix time); how many went."""
    gone = 0
    for instance_id in fleet.disks():
        # Asked for anew each time: commands begin while this goes on.
        keep = next(
            (frozenset(m.journals) for m in fleet.machines() if m.record.instance_id == instance_id), frozenset()
        )
        try:
            gone += await executions.prune_old(
                instance_id, fleet.journals(instance_id), running=keep, older_than=older_than
            )
        except (InnkeeperError, OSError):
            log.exception("old executions could not be removed", instance_id=str(instance_id))
        await asyncio.sleep(pause_seconds)
    if gone:
        log.info("removed executions that are older than their retention", executions=gone)
    return gone
