"""The beginning: load, adopt, then the loops that go on until the end."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa

from innkeeper.control import (
    backup,
    expiry,
    hosts,
    image_builds,
    images,
    reconciler,
    retention,
    retention_policies,
    snapshot_builds,
    snapshot_checks,
    usage,
    warm_pools,
)
from innkeeper.control import rooms as control_rooms
from innkeeper.control import vms as control_vms
from innkeeper.control.image_table import ImageTable
from innkeeper.control.share_table import ShareTable
from innkeeper.control.tasks import wait_for_hint
from innkeeper.control.vm_entry import VmEntry
from innkeeper.control.volume_guests import LABEL as VOLUME_LABEL
from innkeeper.control.write_behind import FLUSH_SECONDS
from innkeeper.store import images as image_store
from innkeeper.store import instances, leases, organizations, profiles, rooms, shares, tables
from innkeeper.store import vms as vm_store
from innkeeper.store import volumes as volume_store

if TYPE_CHECKING:
    from innkeeper.control.context import Control

# The bus has no event for a new host; looking costs nothing.
LOOK_FOR_HOSTS_SECONDS = 0.5
FIRST_ADOPTION_SECONDS = 15.0
SETTLE_SECONDS = 0.1
COLLECT_IMAGES_SECONDS = 600.0


async def begin(control: Control) -> None:
    """Load the database into memory, adopt the hosts that are there, and start the loops."""
    if control.default_organization_id is None:
        raise RuntimeError("organizations.bootstrap has not run")
    backup.sweep(control)
    await _load(control)
    watched: set[UUID] = set()
    adopted = _watch_new(control, watched)
    if adopted:
        # So that the first request finds its room; a host that is slow to answer is waited for by its own rooms only.
        await asyncio.wait(adopted, timeout=FIRST_ADOPTION_SECONDS)

    async def write_behind() -> None:
        await wait_for_hint(control.later.hint, at_most_seconds=FLUSH_SECONDS)
        # The request that gave the hint goes first: the writer thread would take the interpreter from it.
        await asyncio.sleep(SETTLE_SECONDS)
        await control.later.flush(control)

    async def look_for_hosts() -> None:
        await asyncio.sleep(LOOK_FOR_HOSTS_SECONDS)
        _watch_new(control, watched)

    control.tasks.spawn(control.vitals.watch(), name="event loop lag")
    control.tasks.forever(write_behind, name="write behind")
    control.tasks.forever(look_for_hosts, name="look for hosts")
    control.tasks.forever(lambda: reconciler.step(control), name="reconciler")
    control.tasks.forever(lambda: warm_pools.step(control), name="warm pools")
    control.tasks.forever(lambda: expiry.step(control), name="expiry")
    control.tasks.forever(lambda: retention.step(control), name="retention")
    control.tasks.forever(lambda: retention_policies.step(control), name="retention policies")
    control.tasks.forever(lambda: usage.step(control), name="usage")
    control.tasks.forever(lambda: snapshot_checks.step(control), name="snapshot checks")

    async def collect_images() -> None:
        # What a removed image left because a disk still stood on it.
        await asyncio.sleep(COLLECT_IMAGES_SECONDS)
        await images.collect_everywhere(control)

    control.tasks.forever(collect_images, name="collect images")


def _watch_new(control: Control, watched: set[UUID]) -> list[asyncio.Future[None]]:
    """Start to watch the hosts that nobody watches; one future each that is done when the host is taken in, or failed to be."""
    adopted = []
    for host_id in control.bus.hosts():
        if host_id not in watched:
            watched.add(host_id)
            connected = asyncio.get_running_loop().create_future()
            adopted.append(connected)
            control.tasks.spawn(_watch(control, host_id, connected, watched), name="host watch")
    return adopted


async def _watch(control: Control, host_id: UUID, connected: asyncio.Future[None], watched: set[UUID]) -> None:
    try:
        await hosts.watch(control, host_id, connected)
    finally:
        watched.discard(host_id)


async def _load(control: Control) -> None:
    def clear(connection: sa.Connection) -> None:
        # Those of the process that was here before: it cannot come back for them.
        for table in (tables.instances, tables.snapshots, tables.volumes):
            leases.break_all(connection, table)
        instances.delete_labelled(connection, VOLUME_LABEL)

    if control.database.exclusive:
        await control.database.write(clear)
    control.organizations = {found.id: found for found in await control.database.read(organizations.every)}
    control.profiles = {found.profile.id: found for found in await control.database.read(profiles.every)}
    control.shares = ShareTable(await control.database.read(shares.every))
    control.images = ImageTable(await control.database.read(image_store.every))
    if control.database.exclusive:
        await images.fail_interrupted(control)
        await image_builds.recover(control)
        await snapshot_builds.recover(control)
        await snapshot_checks.recover(control)
    now = time.time()
    for room, instance in await control.database.read(rooms.every):
        stored = control.profiles.get(room.profile_id)
        if stored is not None:
            entry = control_rooms.remember(control, stored, room, instance)
            warm_pools.note_loaded(control, room.profile_id, now - entry.last_active)
    for vm, instance in await control.database.read(vm_store.living):
        warm_pools.note_used(control, control_vms.remember(control, vm, instance))
    for mount in await control.database.read(volume_store.every_mount):
        having = control.live.by_instance(mount.instance_id)
        if isinstance(having, VmEntry):
            having.mounts[mount.disk_id] = mount
