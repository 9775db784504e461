"""At start: adopt what an earlier daemon left running, and remove what belongs to nothing."""

from __future__ import annotations

import asyncio
import shutil
import time
from dataclasses import dataclass

import structlog

from innkeeper.errors import InnkeeperError
from innkeeper.host import temporary
from innkeeper.host.directories import Directories
from innkeeper.host.disks import rootfs
from innkeeper.host.disks.disk_pool import DiskPool
from innkeeper.host.drivers.registry import DriverRegistry
from innkeeper.host.fleet import Fleet
from innkeeper.host.leaks import unmounted_devices
from innkeeper.host.linux import loop_device
from innkeeper.host.machine import MachineRecord, load_machine_record
from innkeeper.host.machine_builder import MachineBuilder
from innkeeper.host.network.network import Network
from innkeeper.host.suspensions import Suspensions
from innkeeper.host.usage import UsageLedger

log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a start found: machines adopted, and leftovers removed; and how long that took."""

    adopted: int
    removed: int
    seconds: float


async def recover(
    *,
    directories: Directories,
    drivers: DriverRegistry,
    network: Network,
    disks: DiskPool,
    builder: MachineBuilder,
    fleet: Fleet,
    suspensions: Suspensions,
    usage: UsageLedger,
) -> Recovered:
    """Adopt live machines and clean the rest. Safe to repeat and to be killed at any point."""
    began = time.monotonic()
    removed = 0
    records: dict[str, MachineRecord | None] = {
        entry.name: load_machine_record(entry) for entry in directories.machines.iterdir()
    }
    adopted: set[str] = set()
    try:
        owned = fleet.owned_disks()
    except InnkeeperError:
        # Somebody's disk is not known: no guest is taken for a spare one, and no disk is removed.
        log.exception("the records of instances cannot all be read; nothing is removed that may be theirs")
        owned = None
    for machine_id, record in records.items():
        machine = None
        suspended = record is not None and not suspensions.may_be_adopted(record, directories.machines / machine_id)
        if record is not None and not suspended and _may_be_adopted(record, owned):
            try:
                machine = await builder.adopt(record)
            except (InnkeeperError, OSError):
                log.exception("a machine could not be adopted", machine=machine_id)
        if machine is not None:
            fleet.adopt(machine)
            adopted.add(machine_id)
    leftovers = set(records) - adopted
    # Again after strays: a start that an earlier daemon began goes on, and makes more, until its own process is ended.
    strays = True
    while strays:
        leftovers |= await drivers.found() - adopted
        for machine_id in leftovers:
            record = records.get(machine_id)
            driver = None if record is None else drivers.of(record)
            if record is not None and driver is not None:
                usage.note_end(record, driver.usage(machine_id))
            await drivers.stop(machine_id)
        strays = await drivers.end_strays(adopted) > 0
    for machine_id in leftovers:
        removed += 1
        await rootfs.release(directories.mounts / machine_id)
        await asyncio.to_thread(shutil.rmtree, directories.machines / machine_id, ignore_errors=True)
    for entry in directories.mounts.iterdir():
        if entry.name not in adopted:
            await rootfs.release(entry)
            removed += entry.name not in leftovers
    for entry in directories.changes.iterdir():
        if entry.name not in adopted and not (directories.instances / entry.name).exists():
            removed += entry.name not in leftovers
            await asyncio.to_thread(shutil.rmtree, entry, ignore_errors=True)
    running = {machine.record.instance_id for machine in fleet.machines() if machine.record.instance_id is not None}
    removed += await suspensions.settle(directories.instances, running)
    removed += await network.sweep()
    if owned is not None:
        removed += await _remove_unowned_disks(disks, fleet)
    for entry in directories.trash.iterdir():
        removed += 1
        await asyncio.to_thread(shutil.rmtree, entry, ignore_errors=True)
    for path in await asyncio.to_thread(temporary.abandoned, directories.host):
        removed += 1
        await asyncio.to_thread(temporary.remove, path)
    for device in unmounted_devices(directories.host):
        loop_device.detach(device)
    seconds = time.monotonic() - began
    if adopted or removed:
        log.info("recovered", adopted=len(adopted), removed=removed, seconds=round(seconds, 3))
    return Recovered(adopted=len(adopted), removed=removed, seconds=seconds)


def _may_be_adopted(record: MachineRecord, owned_disks: set[str] | None) -> bool:
    """A machine that was still on its way up was acknowledged to nobody; a spare one on somebody's disk was being claimed."""
    if record.instance_id is not None:
        return record.configured
    return record.primed and owned_disks is not None and record.disk not in owned_disks


async def _remove_unowned_disks(disks: DiskPool, fleet: Fleet) -> int:
    owned = fleet.owned_disks()
    unowned = [name for name in disks.disks() if name not in owned]
    for name in unowned:
        await disks.remove_disk(name)
    return len(unowned)
