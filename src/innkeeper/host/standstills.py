"""Guests that stand still because there was no room on the host for what they wrote: they go on when there is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from innkeeper.errors import InnkeeperError
from innkeeper.host.drivers.contract import standing_still
from innkeeper.host.fleet import Fleet

log = structlog.stdlib.get_logger(__name__)

# A question to each guest that is not frozen, of a tenth of a millisecond.
POLL_SECONDS = 5.0
# As much as a command needs to begin. With less it would stand still again at once.
ROOM_BYTES = 16 * 1_048_576


async def run(fleet: Fleet, free_bytes: Callable[[], int]) -> None:
    """Look at every guest again and again, until cancelled. Those of an earlier daemon are found like any other."""
    told: set[str] = set()
    while True:
        await asyncio.sleep(POLL_SECONDS)
        told = {machine_id for machine_id in told if machine_id in {machine.id for machine in fleet.held()}}
        for machine in fleet.held():
            if machine.frozen or not machine.driver.capabilities.stands_still:
                continue
            driver = standing_still(machine.driver)
            try:
                if not await driver.stands_still(machine.id):
                    continue
                if machine.id not in told:
                    told.add(machine.id)
                    log.warning("a guest stands still: there is no room for what it writes", machine=machine.id)
                if free_bytes() >= ROOM_BYTES:
                    await driver.go_on(machine.id)
                    told.discard(machine.id)
                    log.info("a guest goes on: there is room for what it writes", machine=machine.id)
            except (InnkeeperError, OSError):
                # What ends it otherwise tells its end.
                log.exception("a guest that stands still could not be looked after", machine=machine.id)
