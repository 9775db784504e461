"""Clones of VMs: one moment of a VM, and others that go on from there, each as somebody else."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import sqlalchemy as sa
import structlog

from innkeeper.control import provisioning, session_vm, snapshots, vms
from innkeeper.control.access import require
from innkeeper.control.vm_entry import VmEntry, VmView
from innkeeper.core.snapshot import Snapshot, SnapshotStatus
from innkeeper.core.token import Principal, Scope
from innkeeper.core.vm import VmRequest
from innkeeper.errors import ConflictError, InnkeeperError, InvalidRequestError
from innkeeper.store import sessions as session_store
from innkeeper.store import snapshots as store

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

COUNT_MAX = 100
# Of those that are being started; the host has turns of its own.
AT_ONCE = 4
# When it is looked again whether the last one has begun, where nobody waits for that: ever later, since one that has failed may never.
POLL_SECONDS = (1.0, 60.0)
PASSING_NAME = "of a fork"


@dataclass(frozen=True, slots=True)
class Forked:
    """What came of a fork: a VM or what it failed by, each; the snapshot that is kept of it, and the volumes that are no part of it."""

    vms: tuple[VmView | InnkeeperError, ...]
    snapshot: Snapshot
    kept: bool


async def fork(
    control: Control,
    principal: Principal,
    vm_id: str,
    *,
    count: int = 1,
    snapshot_name: str | None = None,
    wait: bool = True,
    new_sessions: Sequence[UUID] | None = None,
) -> Forked:
    """So many VMs that go on from where a VM is now, which goes on, too; one that sleeps sleeps on. Each has a session of its own.

    They have its sizes, image, egress policy, variables, metadata and lifetime, which begins anew; no shares and no volumes. With a `snapshot_name` the moment
    is kept as a snapshot. `new_sessions` are the ids that their sessions get.

    Raises:
        VmNotFoundError, InvalidRequestError.
        CheckpointFailedError: why its memory cannot be kept; it goes on.
        RateLimitedError: the organization's limits have no room for all of them; nothing was begun.
        InnkeeperError: what the first failed by, where none came up.

    """
    require(principal, Scope.ROOMS)
    if not 1 <= count <= COUNT_MAX:
        raise InvalidRequestError(f"count: must be between 1 and {COUNT_MAX}")
    entry = await vms.remembering_entry(control, principal, vm_id)
    sessions = list(new_sessions or (uuid4() for _ in range(count)))
    if any([await control.database.read(session_store.get, one) for one in sessions]):
        raise ConflictError("An earlier attempt with this Idempotency-Key was cut short: look which VMs it made")
    await _check_limits(control, entry, count)
    kept = snapshot_name is not None
    snapshot = await snapshots.take(
        control, principal, vm_id, name=snapshot_name or PASSING_NAME, memory=True, wait=True, passing=not kept
    )
    control.forking.add(snapshot.id)
    try:
        turns = asyncio.Semaphore(AT_ONCE)

        async def make(session_id: UUID) -> VmView:
            async with turns:
                return await _make(control, principal, entry, snapshot, session_id, wait=wait)

        found = await asyncio.gather(*map(make, sessions), return_exceptions=True)
    finally:
        if kept:
            control.forking.discard(snapshot.id)
        else:
            # Also where whoever asked has gone.
            with contextlib.suppress(RuntimeError):
                # A server that stops leaves it to the next one.
                control.tasks.spawn(_let_go(control, principal, snapshot.id), name="fork")
    made = tuple(_told(one) for one in found)
    if not any(isinstance(one, VmView) for one in made):
        raise next(one for one in made if isinstance(one, InnkeeperError))
    return Forked(made, snapshot, kept)


def _told(found: VmView | BaseException) -> VmView | InnkeeperError:
    if isinstance(found, (VmView, InnkeeperError)):
        return found
    raise found


async def _check_limits(control: Control, entry: VmEntry, count: int) -> None:
    organization = await provisioning.organization_of(control, entry.instance.organization_id)

    def check(connection: sa.Connection) -> None:
        provisioning.check_limits(connection, organization, entry.instance.memory_mb, count=count)

    await control.database.read(check)


async def _make(
    control: Control, principal: Principal, entry: VmEntry, snapshot: Snapshot, session_id: UUID, *, wait: bool
) -> VmView:
    vm = entry.vm
    request = VmRequest(
        vm_lifetime_seconds=vm.lifetime_seconds,
        metadata=vm.metadata,
        env=control.box.open_env(vm.env_sealed, organization_id=vm.organization_id, object_id=vm.session_id),
        idle_seconds=vm.idle_seconds,
        egress_policy=vm.egress_policy,
        min_isolation=vm.wish.min_isolation,
        snapshot_id=snapshot.id,
        auto_suspend=vm.auto_suspend,
        auto_resume=vm.auto_resume,
    )
    return await session_vm.create(
        control,
        principal,
        request,
        new_session=session_id,
        # Its next VM is what the first one's would be: the moment is gone by then.
        later=dataclasses.replace(await _request_of(control, vm.session_id), volumes=None),
        wait=wait,
    )


async def _request_of(control: Control, session_id: UUID) -> VmRequest:
    session = await control.database.read(session_store.get, session_id)
    return VmRequest() if session is None else session.request


async def _let_go(control: Control, principal: Principal, snapshot_id: UUID) -> None:
    """Delete a passing snapshot once all that begin with it have begun."""
    pause, longest = POLL_SECONDS
    try:
        while not await _gone(control, principal, snapshot_id):
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)
    finally:
        control.forking.discard(snapshot_id)


async def _gone(control: Control, principal: Principal, snapshot_id: UUID) -> bool:
    try:
        await snapshots.delete(control, principal, snapshot_id)
    except ConflictError:
        return False
    except InnkeeperError as error:
        # The reconciler goes on with it.
        log.info("a fork's snapshot is left to the reconciler", snapshot_id=str(snapshot_id), reason=error.message)
    return True


async def settle(control: Control, host_id: UUID) -> None:
    """Delete the passing snapshots of a host that an earlier process has left; those that VMs are still to begin with a little later."""
    for snapshot in await control.database.read(store.on_host, host_id):
        if snapshot.passing and snapshot.status is SnapshotStatus.READY and snapshot.id not in control.forking:
            host = Principal(snapshot.organization_id, None, frozenset({Scope.ROOMS}), "system:reconciler")
            await _gone(control, host, snapshot.id)
