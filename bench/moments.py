"""Rows about checkpoints of guests by how much they have: memory that holds something, and a disk that was written just before.

Each microVM beside a gVisor guest in turn, asked of a host daemon over its bus: `python -m bench.moments TRIES`, as `bench.drivers`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any
from uuid import UUID, uuid4

import structlog
from tests.integration.daemon_fixture import running_host

from bench.checkpoints import checkpoint
from bench.drivers import DRIVERS, START_SECONDS, Samples, home_for_both, sampled
from bench.rows import Budget, Row
from innkeeper.core import checkpoint_verbs
from innkeeper.core.host_verbs import EnsureMachine

MEMORY_MB = 1_024
DISK_MB = 8_192
HELD_MB = (50, 500)
WRITTEN_MB = (100, 1_000, 5_000)
# Bytes that are not alike: a hypervisor saves pages of zeros for nothing.
HOLD = (
    'nohup python3 -c \'import os, time; held = os.urandom({mb} << 20); open("held", "w"); time.sleep(1e6)\''
    " > /dev/null 2>&1 &\nwhile [ ! -e held ]; do sleep 0.1; done"
)
WRITE = "head -c {mb}000000 /dev/zero > written"


def measure(*, tries: int) -> list[Row]:
    """Guests of 1 GB of memory and an 8 GB disk. What was written is not synced: the guest has as much of it in memory as it likes."""
    rows = []
    for kind, title in _kinds():
        rows += [
            Row(f"{kind}-down", f"microVM with {title}: checkpoint: the guest does not answer", budget=Budget(200)),
            Row(f"{kind}-took", f"microVM with {title}: checkpoint, to its answer"),
            Row(f"{kind}-restore", f"microVM with {title}: restore of it to ready"),
        ]
    return sampled(rows, "bench.moments", tries)


def _kinds() -> list[tuple[str, str]]:
    held = [(f"held-{mb}", f"{mb} MB held in memory") for mb in HELD_MB]
    return [*held, *((f"written-{mb}", f"{mb} MB of disk just written") for mb in WRITTEN_MB)]


class Moments(Samples):
    """The rows, kind by kind."""

    async def all(self) -> None:
        """Every row: a guest of its own for each kind on each driver."""
        for kind, _ in _kinds():
            self.guests = {driver: await self._guest(driver) for driver in DRIVERS}
            line, _, mb = kind.partition("-")
            if line == "held":
                for driver in DRIVERS:
                    await self.ok(driver, HOLD.format(mb=mb))
            await self.each(kind, lambda driver, kind=kind: self._moment(driver, kind))  # type: ignore[misc]
            for guest in self.guests.values():
                await self.host.destroy(guest)

    async def _guest(self, driver: str) -> UUID:
        return await self.ensure(driver, memory_mb=MEMORY_MB, disk_mb=DISK_MB)

    async def _moment(self, driver: str, kind: str) -> None:
        line, _, mb = kind.partition("-")
        if line == "written":
            await self.ok(driver, WRITE.format(mb=mb))
        guest = self.guests[driver]
        kept, took, told = await checkpoint(self.host, checkpoint_verbs.TakeCheckpoint(guest, uuid4()))
        self.note(driver, f"{kind}-down", told["downtime_ms"])
        self.note(driver, f"{kind}-took", took)
        machine = EnsureMachine(uuid4(), self.shape(driver, memory_mb=MEMORY_MB, disk_mb=DISK_MB), "restored")
        self.host.instances.add(machine.instance_id)
        verb = checkpoint_verbs.RestoreCheckpoint(kept, machine)
        await self.timed(driver, f"{kind}-restore", self.host.request(verb, timeout_seconds=START_SECONDS))
        await self.host.destroy(machine.instance_id)
        await self.host.request(checkpoint_verbs.DropCheckpoint(kept))

    def shape(self, driver: str, **more: Any) -> Any:
        """As large as it is asked for, whatever the other rows' guests are."""
        return self.host.shape(driver=driver, **more)


async def sample(tries: int) -> None:
    """Print all samples so far after each kind."""
    with home_for_both() as home:
        async with running_host(home, pool_disk_mb=65_536) as host:
            await Moments(host, tries).all()


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    asyncio.run(sample(int(sys.argv[1])))
