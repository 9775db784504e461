"""Leaks: what exists on the host in this server's name and belongs to nothing that lives. The number must read 0."""

from __future__ import annotations

import os
from collections.abc import Set as AbstractSet

from innkeeper.host.directories import Directories
from innkeeper.host.disks.disk_pool import DiskPool
from innkeeper.host.linux.mounts import mounts_under
from innkeeper.host.network.network import Network


def find_leaks(
    *,
    directories: Directories,
    found_by_driver: AbstractSet[str],
    network: Network,
    disks: DiskPool,
    living: AbstractSet[str],
    slots: AbstractSet[int],
    owned_disks: AbstractSet[str],
) -> list[str]:
    """A line per leaked resource.

    `found_by_driver` is what the driver's `found` says. `living` are machines that somebody holds, those on their way up
    and down included; `slots` and `owned_disks` are theirs and their instances'.
    """
    found = [f"driver state of machine {machine_id}" for machine_id in found_by_driver - living]
    found += [
        f"folder of machine {entry.name}" for entry in os.scandir(directories.machines) if entry.name not in living
    ]
    for entry in os.scandir(directories.changes):
        if entry.name not in living and not (directories.instances / entry.name).exists():
            found.append(f"baseline folder {entry.name}")
    prefix = os.path.realpath(directories.mounts) + "/"
    for mount in mounts_under(directories.mounts):
        machine_id = mount.target.removeprefix(prefix).partition("/")[0]
        if machine_id not in living:
            found.append(f"mount {mount.target}")
    found += [f"disk {name}" for name in disks.disks() if name not in owned_disks and name not in living]
    found += [f"network slot {index}" for index in network.unaccounted(slots)]
    return sorted(found)
