"""Volumes and their checkpoints: create, find, list, rename, grow, delete."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa
import structlog

from innkeeper.control import clock, placement, volume_work
from innkeeper.control.access import require
from innkeeper.core.token import Principal, Scope
from innkeeper.core.volume import LATEST, MIB, Mount, Volume, VolumeStatus, size_mb_of, validate_name
from innkeeper.core.volume_verbs import GrowVolume
from innkeeper.errors import (
    CheckpointNotFoundError,
    ConflictError,
    InnkeeperError,
    InvalidRequestError,
    VolumeInUseError,
    VolumeNotFoundError,
)
from innkeeper.ids import parse_uuid, uuid7
from innkeeper.store import audit_events, leases
from innkeeper.store import vms as vm_store
from innkeeper.store import volumes as store
from innkeeper.store.tables import volumes as table

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class VolumeView:
    """A volume as a caller sees it. `used_bytes` are the blocks that it takes, `own_bytes` those of its own; None where its host cannot be asked."""

    volume: Volume
    used_bytes: int | None = None
    own_bytes: int | None = None
    guest_written: bool | None = None
    mounts: tuple[tuple[str, Mount], ...] = ()
    """With the ids of the VMs."""


async def create(
    control: Control, principal: Principal, *, name: str, quota_bytes: int, volume_id: UUID | None = None
) -> VolumeView:
    """A new, empty volume; with the `volume_id` of an earlier attempt what that made.

    Raises:
        InvalidRequestError: naming the field.
        RateLimitedError, NoHostError, UnavailableError: it cannot be made now; nothing is left of it.

    """
    require(principal, Scope.ROOMS)
    validate_name(name)
    size_mb = size_mb_of(quota_bytes)
    limit = control.settings.max_volume_mb
    if size_mb > limit:
        raise InvalidRequestError(f"quota_bytes: at most {limit * MIB} on this server")
    if volume_id is not None and (made := await control.database.read(store.get, volume_id)) is not None:
        if made.status is VolumeStatus.READY:
            return await find(control, principal, volume_id)
        raise ConflictError("The volume is being made")
    volume = Volume(
        id=volume_id or uuid7(),
        organization_id=principal.organization_id,
        host_id=placement.choose_for_volume(control).host.id,
        name=name,
        size_mb=size_mb,
        status=VolumeStatus.CREATING,
        created_at=clock.now(),
    )
    made = await control.tasks.finish(
        volume_work.make(control, principal, volume, action="volume.create"), name="volume"
    )
    return await find(control, principal, made.id)


async def find(control: Control, principal: Principal, volume_id: UUID) -> VolumeView:
    """The volume as it is now. Raises VolumeNotFoundError."""
    require(principal, Scope.ROOMS)
    return (await _views(control, [await own(control, principal, volume_id)]))[0]


async def list_volumes(control: Control, principal: Principal) -> list[VolumeView]:
    """The organization's volumes, newest first."""
    require(principal, Scope.ROOMS)
    return await _views(control, await control.database.read(store.of_organization, principal.organization_id))


async def change(
    control: Control, principal: Principal, volume_id: UUID, *, name: str | None = None, quota_bytes: int | None = None
) -> VolumeView:
    """The volume by another name, or with a larger quota.

    Raises:
        VolumeNotFoundError, InvalidRequestError: naming the field; a quota does not shrink.
        VolumeInUseError: a VM has it, and only one that nobody has can grow.
        ConflictError, UnavailableError.

    """
    require(principal, Scope.ROOMS)
    volume = await own(control, principal, volume_id)
    if name is not None:
        validate_name(name)
    if quota_bytes is not None:
        size_mb = size_mb_of(quota_bytes)
        if size_mb < volume.size_mb:
            raise InvalidRequestError("quota_bytes: the volume has more already, and volumes do not shrink")
        if size_mb > control.settings.max_volume_mb:
            raise InvalidRequestError(f"quota_bytes: at most {control.settings.max_volume_mb * MIB} on this server")
        if size_mb > volume.size_mb:
            check_ready(volume)
            await control.tasks.finish(_grow(control, principal, volume, size_mb), name="volume")
    if name is not None:
        event = volume_work.event_of(principal, "volume.rename", dataclasses.replace(volume, name=name))

        def rename(connection: sa.Connection) -> None:
            if not store.rename(connection, volume_id, name):
                raise VolumeNotFoundError
            audit_events.insert(connection, event)

        await control.database.write(rename)
    return await find(control, principal, volume_id)


async def delete(control: Control, principal: Principal, volume_id: UUID) -> Volume:
    """The volume that is no more.

    Raises:
        VolumeNotFoundError.
        VolumeInUseError: VMs have it or one of its checkpoints; they are named.
        ConflictError: it has checkpoints, which go first; or it is being worked on.
        UnavailableError: its host cannot be asked now; it is of no use any more, and goes when the host is there.

    """
    require(principal, Scope.ROOMS)
    return await _delete(control, principal, await own(control, principal, volume_id), action="volume.delete")


# --- checkpoints -------------------------------------------------------------------------------------------------------


async def create_checkpoint(
    control: Control,
    principal: Principal,
    volume_id: UUID,
    *,
    name: str | None = None,
    checkpoint_id: UUID | None = None,
) -> VolumeView:
    """An immutable moment of the volume; a VM that may write it waits meanwhile. With the `checkpoint_id` of an earlier attempt what that made.

    Raises:
        VolumeNotFoundError, InvalidRequestError.
        ConflictError: the volume is not ready.
        VolumeFailedError: the VM that may write it does not hold it still.
        RateLimitedError, UnavailableError: it cannot be made now; nothing is left of it.

    """
    require(principal, Scope.ROOMS)
    volume = await own(control, principal, volume_id)
    check_ready(volume)
    now = clock.now()
    name = now.strftime("%Y-%m-%d %H:%M:%S") if name is None else name
    validate_name(name)
    if checkpoint_id is not None and (made := await control.database.read(store.get, checkpoint_id)) is not None:
        check_ready(made)
        return (await _views(control, [made]))[0]
    new = dataclasses.replace(
        volume,
        id=checkpoint_id or uuid7(),
        name=name,
        status=VolumeStatus.CREATING,
        created_at=now,
        checkpoint_of=volume.id,
    )
    return (
        await _views(
            control,
            [
                await control.tasks.finish(
                    volume_work.make(control, principal, new, action="volume_checkpoint.create"), name="volume"
                )
            ],
        )
    )[0]


async def list_checkpoints(control: Control, principal: Principal, volume_id: UUID) -> list[VolumeView]:
    """The volume's checkpoints, newest first. Raises VolumeNotFoundError."""
    require(principal, Scope.ROOMS)
    await own(control, principal, volume_id)
    return await _views(control, await control.database.read(store.checkpoints_of, volume_id))


async def delete_checkpoint(
    control: Control, principal: Principal, volume_id: UUID, checkpoint_id: UUID, *, reason: str | None = None
) -> Volume:
    """The checkpoint that is no more; a `reason` is for the audit log. Raises VolumeNotFoundError, CheckpointNotFoundError, and as `delete`."""
    require(principal, Scope.ROOMS)
    await own(control, principal, volume_id)
    found = await checkpoint(control, volume_id, str(checkpoint_id))
    return await _delete(control, principal, found, action="volume_checkpoint.delete", reason=reason)


async def checkpoint(control: Control, volume_id: UUID, wanted: str) -> Volume:
    """A volume's checkpoint by its id, or its latest one. Raises CheckpointNotFoundError."""
    found = await control.database.read(store.checkpoints_of, volume_id)
    if wanted == LATEST:
        ready = [one for one in found if one.status is VolumeStatus.READY]
        if not ready:
            raise CheckpointNotFoundError("The volume has no checkpoint")
        return ready[0]
    by_id = {one.id: one for one in found}
    try:
        return by_id[UUID(wanted)]
    except (KeyError, ValueError):
        raise CheckpointNotFoundError from None


async def own(control: Control, principal: Principal, volume_id: UUID) -> Volume:
    """The organization's volume. Raises VolumeNotFoundError, also for a checkpoint's id."""
    volume = await control.database.read(store.get, volume_id)
    if volume is None or volume.organization_id != principal.organization_id or volume.checkpoint_of is not None:
        raise VolumeNotFoundError
    return volume


def check_ready(volume: Volume) -> None:
    """Raises ConflictError for one that is of no use, saying why."""
    if volume.status is not VolumeStatus.READY:
        why = f": {volume.error}" if volume.error else ""
        raise ConflictError(f"The volume is {volume.status}, not ready{why}")


def refuse_mounted(connection: sa.Connection, mounts: Sequence[Mount]) -> None:
    """Raises VolumeInUseError, naming the VMs, where one that lives has a mount."""
    names = vm_store.names(connection, [one.instance_id for one in mounts])
    if names:
        raise VolumeInUseError(f"The volume is attached to {', '.join(sorted(names.values()))}")


async def _delete(
    control: Control, principal: Principal, volume: Volume, *, action: str, reason: str | None = None
) -> Volume:
    event = volume_work.event_of(principal, action, volume, {} if reason is None else {"reason": reason})

    def doom(connection: sa.Connection) -> UUID:
        refuse_mounted(connection, store.mounts_of_disk(connection, volume.id))
        standing = store.checkpoints_of(connection, volume.id)
        if standing:
            raise ConflictError(f"The volume has checkpoints, the latest {standing[0].id}; delete them first")
        lease = _leased(connection, volume, volume_work.DROP_SECONDS)
        leases.apply(
            connection, table, volume.id, lease, {"status": VolumeStatus.DELETING.value, "error": None}, release=False
        )
        audit_events.insert(connection, event)
        return lease

    lease = await control.database.write(doom)
    try:
        await control.tasks.finish(volume_work.drop(control, volume), name="volume")
    except VolumeInUseError:
        # A machine of an instance that has just ended lets go of it in a moment.
        await control.database.write(leases.apply, table, volume.id, lease, store.outcome(volume), release=True)
        raise
    except BaseException:
        await control.database.write(leases.apply, table, volume.id, lease, {}, release=True)
        control.reconcile_hint.set()
        raise
    return dataclasses.replace(volume, status=VolumeStatus.DELETING)


async def _grow(control: Control, principal: Principal, volume: Volume, size_mb: int) -> None:
    event = volume_work.event_of(principal, "volume.grow", volume, {"size_mb": str(size_mb)})

    def begin(connection: sa.Connection) -> UUID:
        refuse_mounted(connection, store.mounts_of_disk(connection, volume.id))
        return _leased(connection, volume, volume_work.WORK_SECONDS)

    lease = await control.database.write(begin)
    values: dict[str, Any] = {}
    try:
        await control.volume_guests.let_go(volume.id)
        await volume_work.ask(control, volume.host_id, GrowVolume(volume.id, size_mb), seconds=volume_work.WORK_SECONDS)
        values = {"size_mb": size_mb}
        await control.database.write(audit_events.insert, event)
    finally:
        await control.database.write(leases.apply, table, volume.id, lease, values, release=True)


def _leased(connection: sa.Connection, volume: Volume, seconds: float) -> UUID:
    lease = leases.take(connection, table, volume.id, now=clock.now(), ttl_seconds=seconds + 30)
    if lease is None:
        raise ConflictError("The volume is being worked on")
    return lease


async def _views(control: Control, volumes: Sequence[Volume]) -> list[VolumeView]:
    """With what their hosts say now; of a host that does not answer nothing is known."""
    there: dict[UUID, dict[str, Any]] = {}
    for host_id in {volume.host_id for volume in volumes}:
        try:
            wanted = tuple(volume.id for volume in volumes if volume.host_id == host_id)
            there.update(await volume_work.on_host(control, host_id, wanted))
        except InnkeeperError as error:
            log.warning("a host could not be asked for its volumes", host_id=str(host_id), reason=error.message)

    def mounts(connection: sa.Connection) -> tuple[list[Mount], dict[UUID, str]]:
        found = store.mounts_of_volumes(connection, [volume.checkpoint_of or volume.id for volume in volumes])
        return found, vm_store.names(connection, [one.instance_id for one in found])

    found, names = await control.database.read(mounts)
    views = []
    for volume in volumes:
        if volume.status is VolumeStatus.DELETING:
            continue
        told = there.get(volume.id)
        views.append(
            VolumeView(
                volume,
                used_bytes=None if told is None else int(told["used_bytes"]),
                own_bytes=None if told is None else int(told["own_bytes"]),
                guest_written=None if told is None else bool(told["guest_written"]),
                mounts=tuple(
                    (names[one.instance_id], one)
                    for one in found
                    if one.instance_id in names
                    and (one.disk_id == volume.id if volume.checkpoint_of else one.volume_id == volume.id)
                ),
            )
        )
    return views


def parse_volume_id(text: str) -> UUID:
    """The id of a volume. Raises VolumeNotFoundError for what is none."""
    value = parse_uuid(text)
    if value is None:
        raise VolumeNotFoundError
    return value
