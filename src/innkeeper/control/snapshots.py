"""Snapshots: take one of a VM, find, list, rename, delete; those of images are built elsewhere."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa
import structlog

from innkeeper.control import audit, clock, lifecycle, snapshot_builds, snapshot_taking, vms
from innkeeper.control.access import require
from innkeeper.core.checkpoint_verbs import MeasureCheckpoints
from innkeeper.core.host_verbs import to_wire
from innkeeper.core.instance import InstanceState
from innkeeper.core.snapshot import Snapshot, SnapshotStatus, validate_name
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import ConflictError, InnkeeperError, SnapshotNotFoundError
from innkeeper.ids import parse_uuid
from innkeeper.store import audit_events, images, leases
from innkeeper.store import snapshots as store
from innkeeper.store import vms as vm_store
from innkeeper.store.tables import snapshots as table

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

MEASURE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class SnapshotView:
    """A snapshot as a caller sees it. `own_bytes` would be free without it, None where its host cannot be asked; `children` are known of a single one."""

    snapshot: Snapshot
    own_bytes: int | None = None
    children: tuple[UUID, ...] = ()


async def take(
    control: Control, principal: Principal, vm_id: str, *, name: str, memory: bool, wait: bool, passing: bool = False
) -> Snapshot:
    """A snapshot of a VM, which goes on; without `wait` it is still being taken. A `passing` one is for a fork.

    One of a VM that sleeps is of what is kept of it, and lets it sleep; but one of the disk alone wakes it.

    Raises:
        VmNotFoundError, InvalidRequestError.
        CheckpointFailedError: why it cannot be taken; the VM goes on.
        RateLimitedError, UnavailableError: it cannot be taken now.

    """
    require(principal, Scope.ROOMS)
    validate_name(name)
    entry = await vms.existing_entry(control, principal, vm_id)
    if memory:
        entry = await vms.remembering_entry(control, principal, vm_id)
    elif entry.instance.state not in (InstanceState.READY, InstanceState.STOPPED, InstanceState.FAILED):
        entry = await vms.ready_entry(control, principal, vm_id)
    else:
        lifecycle.use(control, entry)
    snapshot, lease = await snapshot_taking.begin(control, principal, entry, name=name, memory=memory, passing=passing)
    outcome = control.tasks.begin(snapshot_taking.capture(control, entry, snapshot, lease), name="snapshot")
    if not wait:
        return snapshot
    # The one who asked may go away; the snapshot is the VM's, and goes on.
    return await asyncio.shield(outcome)


async def find(control: Control, principal: Principal, snapshot_id: UUID) -> SnapshotView:
    """The snapshot, with its size now and those that were taken of VMs that began with it. Raises SnapshotNotFoundError."""
    require(principal, Scope.ROOMS)
    snapshot = await _own(control, principal, snapshot_id)
    own = await _measured(control, [snapshot])
    children = await control.database.read(store.children, snapshot_id)
    return SnapshotView(snapshot, own.get(snapshot_id), tuple(children))


async def list_snapshots(control: Control, principal: Principal) -> list[SnapshotView]:
    """The organization's snapshots, newest first."""
    require(principal, Scope.ROOMS)
    found = await control.database.read(store.of_organization, principal.organization_id)
    own = await _measured(control, found)
    return [
        SnapshotView(one, own.get(one.id))
        for one in found
        if one.status is not SnapshotStatus.DELETING and not one.passing
    ]


async def rename(control: Control, principal: Principal, snapshot_id: UUID, name: str) -> SnapshotView:
    """The snapshot by another name. Raises SnapshotNotFoundError, InvalidRequestError."""
    require(principal, Scope.ROOMS)
    validate_name(name)
    await _own(control, principal, snapshot_id)
    event = audit.event(principal, "snapshot.rename", "snapshot", snapshot_id, {"name": name})

    def change(connection: sa.Connection) -> None:
        if not store.rename(connection, snapshot_id, name):
            raise SnapshotNotFoundError
        audit_events.insert(connection, event)

    await control.database.write(change)
    return await find(control, principal, snapshot_id)


async def delete(control: Control, principal: Principal, snapshot_id: UUID, *, reason: str | None = None) -> Snapshot:
    """The snapshot that is no more; VMs that began with it keep what they have. A `reason` is for the audit log.

    Raises:
        SnapshotNotFoundError.
        ConflictError: it is being taken, or a VM is still to begin with it, which is named.
        UnavailableError: its host cannot be asked now; it is of no use any more, and goes when the host is there.

    """
    require(principal, Scope.ROOMS)
    snapshot = await _own(control, principal, snapshot_id)
    if snapshot.of_image:
        return await snapshot_builds.delete(control, principal, snapshot, reason=reason)
    event = snapshot_taking.deletion_event(principal, snapshot, reason)

    def doom(connection: sa.Connection) -> UUID:
        waiting = vm_store.beginning_with(connection, snapshot_id)
        if waiting:
            raise ConflictError(f"The VM {waiting[0].vm_id} is still to begin with the snapshot")
        ttl_seconds = snapshot_taking.DROP_SECONDS + 30
        lease = leases.take(connection, table, snapshot_id, now=clock.now(), ttl_seconds=ttl_seconds)
        if lease is None:
            raise ConflictError("The snapshot is being worked on")
        leases.apply(connection, table, snapshot_id, lease, {"status": SnapshotStatus.DELETING.value}, release=False)
        audit_events.insert(connection, event)
        return lease

    lease = await control.database.write(doom)
    try:
        await snapshot_taking.drop(control, snapshot)
    except ConflictError:
        # A machine is being started from it at this moment: it stays what it was.
        back = store.outcome(snapshot)
        await control.database.write(leases.apply, table, snapshot_id, lease, back, release=True)
        raise
    except BaseException:
        await control.database.write(leases.apply, table, snapshot_id, lease, {}, release=True)
        control.reconcile_hint.set()
        raise
    return dataclasses.replace(snapshot, status=SnapshotStatus.DELETING)


async def events(
    control: Control, principal: Principal, snapshot_id: UUID, *, after: int = 0
) -> AsyncGenerator[dict[str, Any] | None, None]:
    """What the build of a snapshot says, see `snapshot_builds.events`; of one that was taken of a VM nothing. Raises SnapshotNotFoundError."""
    require(principal, Scope.ROOMS)
    return snapshot_builds.events(control, await _own(control, principal, snapshot_id), after=after)


async def usable(control: Control, principal: Principal, snapshot_id: UUID) -> Snapshot:
    """The snapshot, of which VMs can be made. Raises SnapshotNotFoundError, ConflictError."""
    snapshot = await _own(control, principal, snapshot_id)
    snapshot.check_ready()
    return snapshot


async def _own(control: Control, principal: Principal, snapshot_id: UUID) -> Snapshot:
    snapshot = await control.database.read(store.get, snapshot_id)
    if snapshot is None or snapshot.organization_id != principal.organization_id:
        raise SnapshotNotFoundError
    return snapshot


async def _measured(control: Control, snapshots: Sequence[Snapshot]) -> Mapping[UUID, int]:
    """What each takes for itself now; of a host that does not answer in time nothing is known."""
    by_host: dict[UUID, list[UUID]] = {}
    found: dict[UUID, int] = {}
    for one in snapshots:
        if one.of_image:
            if one.image_digest:
                # Of a file that something else stands on, nothing would be free.
                users = await control.database.read(images.count_users, one.image_digest)
                found[one.id] = (one.disk_bytes or 0) if users == 1 else 0
        elif one.status in (SnapshotStatus.READY, SnapshotStatus.DAMAGED):
            by_host.setdefault(one.host_id, []).append(one.id)
    for host_id, ids in by_host.items():
        verb = MeasureCheckpoints(tuple(ids))
        try:
            answer: dict[str, Any] = await control.bus.request(
                host_id, verb.verb, to_wire(verb), timeout_seconds=MEASURE_SECONDS
            )
        except InnkeeperError as error:
            log.warning("a host could not be asked for sizes", host_id=str(host_id), reason=error.message)
            continue
        sizes = {parse_uuid(str(key)): int(size) for key, size in answer["own_bytes"].items()}
        found.update({one: sizes[one] for one in ids if one in sizes})
    return found
