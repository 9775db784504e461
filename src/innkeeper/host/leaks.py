"""Leaks: what exists on the host in this server's name and belongs to nothing that lives. The number must read 0.

Whatever the server makes on a host is looked for here, by its kind; a running daemon says what is in use, and `inn doctor` finds out without one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from innkeeper.core.leak import Leak, LeakKind
from innkeeper.host.directories import Directories
from innkeeper.host.disks.disk_pool import DiskPool
from innkeeper.host.drivers.registry import DriverRegistry
from innkeeper.host.linux.loop_device import clears_itself, devices_backed_by
from innkeeper.host.linux.mounts import all_mounts, mounts_under
from innkeeper.host.network import router
from innkeeper.host.network.addressing import ServerPlan
from innkeeper.host.temporary import abandoned

SERVER = "server"
# Where the memory of suspended instances lies, in the disk pool.
SUSPENDED = "suspended"


@dataclass(frozen=True, slots=True)
class InUse:
    """What somebody holds at one moment: machines (also those on their way up and down), the disks of these and of instances, network slots."""

    machines: AbstractSet[str]
    disks: AbstractSet[str]
    slots: AbstractSet[int]

    def __or__(self, other: InUse) -> InUse:
        return InUse(self.machines | other.machines, self.disks | other.disks, self.slots | other.slots)


async def find_leaks(
    in_use: InUse, *, directories: Directories, drivers: DriverRegistry, plan: ServerPlan | None, disks: DiskPool | None
) -> list[Leak]:
    """Every leaked resource, sorted. What is being made or taken apart at this moment may be among them: whoever must be sure looks twice.

    `plan` None: the server never had a network; `disks` None: it has no pool, or none that is mounted.
    """
    found = [
        Leak(kind, name, f"machine {machine_id}")
        for kind, name, machine_id in await asyncio.to_thread(drivers.leftovers, in_use.machines)
    ]
    found += await asyncio.to_thread(lambda: list(_on_disk(in_use, directories, disks)))
    if plan is not None:
        present = {slot.index for slot in router.slots_present(plan)}
        found += [
            Leak(LeakKind.NETWORK_NAMESPACE, plan.slot(index).netns, f"slot {index}")
            for index in present - in_use.slots
        ]
        named = await router.slots_in_firewall(plan)
        found += [
            Leak(LeakKind.FIREWALL_ELEMENT, plan.slot(index).router_interface, f"slot {index}")
            for index in named - present - in_use.slots
        ]
    return sorted(found)


def _on_disk(in_use: InUse, directories: Directories, disks: DiskPool | None) -> Iterator[Leak]:
    for entry in _entries(directories.machines):
        if entry.name not in in_use.machines:
            yield Leak(LeakKind.FOLDER, entry.path, f"machine {entry.name}")
    for entry in _entries(directories.changes):
        if entry.name not in in_use.machines and not (directories.instances / entry.name).exists():
            yield Leak(LeakKind.FOLDER, entry.path, f"instance {entry.name}")
    for entry in _entries(directories.trash):
        yield Leak(LeakKind.FOLDER, entry.path, SERVER)
    prefix = os.path.realpath(directories.mounts) + "/"
    for mount in mounts_under(directories.mounts):
        machine_id = mount.target.removeprefix(prefix).partition("/")[0]
        if machine_id not in in_use.machines:
            yield Leak(LeakKind.MOUNT, mount.target, f"machine {machine_id}")
    for device, backing in unmounted_devices(directories.host).items():
        if backing.stem not in in_use.disks:
            yield Leak(LeakKind.LOOP_DEVICE, f"{device} of {backing}", f"disk {backing.stem}")
    for name in disks.disks() if disks is not None else ():
        if name not in in_use.disks and name not in in_use.machines:
            yield Leak(LeakKind.DISK, name, f"disk {name}")
    for entry in _entries(disks.directory / SUSPENDED) if disks is not None else ():
        if not entry.name.startswith(".") and not (directories.instances / entry.name).exists():
            yield Leak(LeakKind.FOLDER, entry.path, f"instance {entry.name}")
    for path in abandoned(directories.host):
        yield Leak(LeakKind.TEMPORARY_FILE, str(path), SERVER)


def unmounted_devices(host: Path) -> dict[Path, Path]:
    """Loop device -> file below `host`, of those that nothing needs: no mount of ours, nor somebody who makes an image in namespaces of its own."""
    mounted = {mount.source for mount in all_mounts()}
    return {
        device: file
        for device, file in devices_backed_by(host).items()
        # One that clears itself is there because somebody has it open or mounted: whoever that is counts.
        if str(device) not in mounted and not clears_itself(device)
    }


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(directory))
    except FileNotFoundError:
        return []
