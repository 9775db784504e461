"""Volumes of VMs: given with their making, and given and taken while they live; attached again whenever a VM gets a machine.

A row says that the VM has the volume, and keeps others from it; the host's attachment follows. A VM that does not run has its volumes all the same.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa
import structlog

from innkeeper.control import audit, mount_work, vms, volumes
from innkeeper.control.access import require
from innkeeper.control.vm_entry import VmEntry
from innkeeper.core.event import AuditEvent
from innkeeper.core.token import Principal, Scope
from innkeeper.core.volume import Mount, MountRequest, MountState, Volume
from innkeeper.core.volume_verbs import VOLUMES_MAX
from innkeeper.errors import (
    ConflictError,
    InvalidRequestError,
    VmNotFoundError,
    VolumeInUseError,
    VolumeNotFoundError,
)
from innkeeper.ids import uuid7
from innkeeper.store import audit_events
from innkeeper.store import vms as vm_store
from innkeeper.store import volumes as store

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Planned:
    """Mounts that are to be stored with a new VM, on the host that has all their volumes; None where there are none."""

    mounts: tuple[Mount, ...] = ()
    host_id: UUID | None = None


async def plan(control: Control, principal: Principal, requests: Sequence[MountRequest]) -> Planned:
    """What a new VM is to have; `of_instance` makes it that VM's.

    Raises:
        VolumeNotFoundError, CheckpointNotFoundError.
        ConflictError: a volume is not ready, or they are on different hosts.
        InvalidRequestError: too many, or two at one path or above one another.

    """
    if len(requests) > VOLUMES_MAX:
        raise InvalidRequestError(f"volumes: at most {VOLUMES_MAX}")
    planned: list[Mount] = []
    hosts: set[UUID] = set()
    for request in requests:
        disk = await _disk_of(control, principal, request)
        mount = _mount_of(request, disk, UUID(int=0))
        if any(mount.disk_id == other.disk_id or overlap(mount.path, other.path) for other in planned):
            raise InvalidRequestError("volumes: the same volume twice, or one at, above or below another's path")
        planned.append(mount)
        hosts.add(disk.host_id)
    if len(hosts) > 1:
        raise ConflictError("The volumes are on different hosts")
    return Planned(tuple(planned), next(iter(hosts), None))


def of_instance(planned: Planned, instance_id: UUID) -> list[Mount]:
    """The planned mounts as a new instance's; the host attaches them when it has a machine."""
    return [dataclasses.replace(mount, instance_id=instance_id, state=MountState.ATTACHED) for mount in planned.mounts]


def insert(connection: sa.Connection, mounts: Sequence[Mount]) -> None:
    """Store new mounts. Raises VolumeInUseError, naming the VMs that have the volumes; VolumeNotFoundError."""
    for mount in mounts:
        others = store.mounts_of_disk(connection, mount.disk_id)
        volumes.refuse_mounted(connection, [one for one in others if not (one.read_only and mount.read_only)])
        # Whoever deletes it from here on is told of this mount.
        found = store.get(connection, mount.disk_id)
        if found is None:
            raise VolumeNotFoundError
        volumes.check_ready(found)
        store.insert_mount(connection, mount)


async def attach(control: Control, principal: Principal, vm_id: str, request: MountRequest) -> Mount:
    """The volume, mounted in a VM that runs; one that sleeps is woken. Repeated it is mounted already.

    Raises:
        VmNotFoundError, VolumeNotFoundError, CheckpointNotFoundError.
        VolumeInUseError: others have it, who are named; or this VM has it elsewhere.
        ConflictError: something is at the path; another volume is at, above or below it; too many; the VM's driver must not read it.
        InvalidRequestError, VolumeFailedError, UnavailableError.

    """
    require(principal, Scope.ROOMS)
    entry = await vms.ready_entry(control, principal, vm_id)
    disk = await _disk_of(control, principal, request)
    return await control.tasks.finish(_attach(control, principal, entry, request, disk), name="mount")


async def _attach(control: Control, principal: Principal, entry: VmEntry, request: MountRequest, disk: Volume) -> Mount:
    async with entry.mounting:
        mount = _mount_of(request, disk, entry.instance.id)
        known = entry.mounts.get(mount.disk_id)
        if known is not None:
            if (known.path, known.read_only, known.state) == (mount.path, mount.read_only, MountState.ATTACHED):
                return known
            raise VolumeInUseError(f"The VM has the volume at {known.path} ({known.mode}, {known.state})")
        _check_fits(entry, mount, disk)
        event = _event(principal, entry, mount, "volume.attach")

        def begin(connection: sa.Connection) -> None:
            found = vm_store.get(connection, mount.instance_id)
            if found is None or found[1].desired == "destroyed":
                raise VmNotFoundError
            insert(connection, [mount])
            audit_events.insert(connection, event)

        await control.database.write(begin)
        entry.mounts[mount.disk_id] = mount
        try:
            await mount_work.ask(control, entry, mount)
        except BaseException:
            # Whatever the host made of it.
            await asyncio.shield(mount_work.let_go(control, entry, mount))
            raise
        await control.database.write(store.set_mount_state, mount.id, MountState.ATTACHED)
        attached = dataclasses.replace(mount, state=MountState.ATTACHED)
        entry.mounts[mount.disk_id] = attached
        return attached


def _check_fits(entry: VmEntry, mount: Mount, disk: Volume) -> None:
    if disk.host_id != entry.instance.host_id:
        raise ConflictError("The volume is on another host than the VM")
    if any(overlap(other.path, mount.path) for other in entry.mounts.values()):
        raise ConflictError("Another volume is mounted at that path, above it or below it")
    if len(entry.mounts) >= VOLUMES_MAX:
        raise ConflictError(f"A VM has at most {VOLUMES_MAX} volumes")


async def detach(
    control: Control, principal: Principal, vm_id: str, volume_id: UUID, *, path: str | None = None
) -> Mount:
    """The mount that is no more; everything that was written is on the volume. `path` tells a volume's own mount from those of its checkpoints.

    Raises:
        VmNotFoundError.
        VolumeNotFoundError: the VM has none of that id, or none there.
        VolumeInUseError: programs of the VM have it open, which are named as far as it says so; it is mounted as before.
        VolumeFailedError, UnavailableError.

    """
    require(principal, Scope.ROOMS)
    entry = await vms.existing_entry(control, principal, vm_id)
    return await control.tasks.finish(_detach(control, principal, entry, volume_id, path), name="mount")


async def _detach(control: Control, principal: Principal, entry: VmEntry, volume_id: UUID, path: str | None) -> Mount:
    async with entry.mounting:
        mount = _mounted(entry, volume_id, path)
        event = _event(principal, entry, mount, "volume.detach")
        detaching = dataclasses.replace(mount, state=MountState.DETACHING)
        await control.database.write(store.set_mount_state, mount.id, MountState.DETACHING)
        entry.mounts[mount.disk_id] = detaching
        try:
            await mount_work.release(control, entry, detaching)
        except VolumeInUseError:
            await control.database.write(store.set_mount_state, mount.id, MountState.ATTACHED)
            entry.mounts[mount.disk_id] = dataclasses.replace(mount, state=MountState.ATTACHED)
            raise
        await control.database.write(audit_events.insert, event)
        return detaching


def _mounted(entry: VmEntry, volume_id: UUID, path: str | None) -> Mount:
    found = [
        mount
        for mount in entry.mounts.values()
        if volume_id in (mount.volume_id, mount.checkpoint_id) and path in (None, mount.path)
    ]
    if not found:
        raise VolumeNotFoundError("The VM has no such volume there" if path else "The VM has no such volume")
    if len(found) > 1:
        raise ConflictError("The VM has the volume and its checkpoints at several paths: say which with mount_path")
    return found[0]


def overlap(path: str, other: str) -> bool:
    """Whether one is the other, or above it."""
    return f"{path}/".startswith(f"{other}/") or f"{other}/".startswith(f"{path}/")


async def _disk_of(control: Control, principal: Principal, request: MountRequest) -> Volume:
    volume = await volumes.own(control, principal, request.volume_id)
    if request.checkpoint is not None:
        volume = await volumes.checkpoint(control, volume.id, request.checkpoint)
    volumes.check_ready(volume)
    return volume


def _mount_of(request: MountRequest, disk: Volume, instance_id: UUID) -> Mount:
    return Mount(
        id=uuid7(),
        instance_id=instance_id,
        volume_id=request.volume_id,
        path=request.path,
        read_only=request.read_only,
        state=MountState.ATTACHING,
        checkpoint_id=None if disk.checkpoint_of is None else disk.id,
    )


def _event(principal: Principal, entry: VmEntry, mount: Mount, action: str) -> AuditEvent:
    details = {"vm_id": entry.vm.vm_id, "path": mount.path, "mode": mount.mode, **entry.marks}
    return audit.event(principal, action, "volume", mount.disk_id, details)
