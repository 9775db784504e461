"""What a server that does not run has left on this host: guests that the next start adopts are none of it."""

from __future__ import annotations

import fcntl

from innkeeper.core.leak import Leak
from innkeeper.errors import UnavailableError
from innkeeper.host.directories import Directories
from innkeeper.host.disks.disk_pool import DiskPool
from innkeeper.host.drivers.registry import known_drivers
from innkeeper.host.leaks import InUse, find_leaks
from innkeeper.host.machine import MachineRecord, load_machine_record
from innkeeper.host.network import router
from innkeeper.settings import Settings


def server_runs(settings: Settings) -> bool:
    """Whether a server holds the state directory."""
    try:
        with (settings.host_dir / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


async def find_leftovers(settings: Settings) -> list[Leak]:
    """The leaks of a server that does not run. Slots that it had ready are among them after `kill -9`: the next start takes them away."""
    directories = Directories(settings.host_dir)
    if not directories.machines.is_dir():
        return []
    drivers = known_drivers(settings, directories)
    records = [record for entry in directories.machines.iterdir() if (record := load_machine_record(entry))]
    living = [
        record
        for record in records
        if (driver := drivers.of(record)) is not None
        and driver.runs(record.machine_id, directories.machines / record.machine_id)
    ]
    pool = settings.host_dir / "pool"
    disks = DiskPool(pool, backing=None) if (pool / "disks").is_dir() else None
    return await find_leaks(
        InUse(
            machines={record.machine_id for record in living},
            disks=_owned(directories, living, disks),
            slots={record.slot_index for record in living},
        ),
        directories=directories,
        drivers=drivers,
        plan=router.known_plan(settings.server_id, settings.host_dir / "run"),
        disks=disks,
    )


def _owned(directories: Directories, living: list[MachineRecord], disks: DiskPool | None) -> set[str]:
    """Names of disks that are somebody's: all of them while a record cannot be read."""
    try:
        return directories.owned_disks() | {record.disk for record in living}
    except UnavailableError:
        return set(disks.disks()) if disks is not None else set()
