"""Retention policies: what an organization has said about its snapshots and checkpoints of volumes, and carrying it out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa
import structlog

from innkeeper.control import audit, clock, snapshots, volumes
from innkeeper.control.access import require
from innkeeper.control.reconciler import system_principal
from innkeeper.core.retention_policy import Kept, KeptKind, Reason, RetentionPolicy, excess
from innkeeper.core.snapshot import SnapshotStatus
from innkeeper.core.token import Principal, Scope
from innkeeper.core.volume import VolumeStatus
from innkeeper.errors import InnkeeperError, NotFoundError
from innkeeper.store import audit_events
from innkeeper.store import retention_policies as store

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

POLL_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Excess:
    """One that goes by a policy. `stays` says why it is still there after it was to be removed; None where it went, or was not to."""

    kept: Kept
    reason: Reason
    stays: str | None = None


async def get(control: Control, principal: Principal) -> RetentionPolicy:
    """The organization's policy."""
    require(principal, Scope.ROOMS)
    return await control.database.read(store.get, principal.organization_id)


async def put(control: Control, principal: Principal, policy: RetentionPolicy) -> RetentionPolicy:
    """The policy that counts from now on; what goes by it goes with the next pass, which is some minutes away."""
    require(principal, Scope.ROOMS)
    details = {
        f"{kind.value}.{reason.value}": str(value)
        for kind in KeptKind
        for reason in Reason
        if (value := getattr(policy.rule(kind), reason.value)) is not None
    }
    event = audit.event(principal, "retention.change", "organization", principal.organization_id, details)

    def change(connection: sa.Connection) -> None:
        store.put(connection, principal.organization_id, policy)
        audit_events.insert(connection, event)

    await control.database.write(change)
    return policy


async def apply(
    control: Control, principal: Principal, *, remove: bool, policy: RetentionPolicy | None = None
) -> list[Excess]:
    """What goes by the organization's policy, or by one that it thinks about; with `remove` it is gone, but for what cannot go now, which says why.

    Sizes change with each that goes, since what two share is the last one's own: by bytes one is removed at a time.
    """
    require(principal, Scope.ROOMS)
    chosen: RetentionPolicy = (
        await control.database.read(store.get, principal.organization_id) if policy is None else policy
    )
    found: list[Excess] = []
    for kind in KeptKind:
        tried: set[UUID] = set()
        while True:
            rows = excess(chosen.rule(kind), await _kept(control, principal, kind, chosen), now=clock.now())
            rows = [(one, reason) for one, reason in rows if one.id not in tried]
            if not remove:
                found += [Excess(one, reason) for one, reason in rows]
                break
            turn = [row for row in rows if row[1] is not Reason.MAX_BYTES] or rows[:1]
            if not turn:
                break
            for one, reason in turn:
                tried.add(one.id)
                found.append(Excess(one, reason, await _remove(control, principal, one, reason)))
    return found


async def _kept(control: Control, principal: Principal, kind: KeptKind, policy: RetentionPolicy) -> Sequence[Kept]:
    """Those of a kind that are whole; what is being made, or has failed, is not counted and does not go. Nor do snapshots of images: they are no moments."""
    if not policy.rule(kind).limits:
        return ()
    if kind is KeptKind.SNAPSHOTS:
        return [
            Kept(kind, one.id, instance_id, one.name, one.created_at, _bytes(view.own_bytes, one.memory_bytes))
            for view in await snapshots.list_snapshots(control, principal)
            if (instance_id := (one := view.snapshot).instance_id) is not None
            and one.status in (SnapshotStatus.READY, SnapshotStatus.DAMAGED)
        ]
    found = []
    for volume in await volumes.list_volumes(control, principal):
        for view in await volumes.list_checkpoints(control, principal, volume.volume.id):
            if (made := view.volume).status is VolumeStatus.READY:
                size = _bytes(view.own_bytes)
                found.append(Kept(kind, made.id, volume.volume.id, made.name, made.created_at, size))
    return found


def _bytes(own: int | None, otherwise: int | None = None) -> int:
    """Of what a host does not tell now, no more is counted than is certain: nothing goes because a host is away."""
    return own if own is not None else otherwise or 0


async def _remove(control: Control, principal: Principal, one: Kept, reason: Reason) -> str | None:
    """Why it is still there; None: it is gone."""
    try:
        if one.kind is KeptKind.SNAPSHOTS:
            await snapshots.delete(control, principal, one.id, reason=reason.value)
        else:
            await volumes.delete_checkpoint(control, principal, one.of, one.id, reason=reason.value)
    except NotFoundError:
        # Somebody was faster.
        return None
    except InnkeeperError as error:
        return error.message
    control.metrics.kept_removed += 1
    return None


async def step(control: Control) -> None:
    """Wait for the next pass, then carry out every organization's policy."""
    await asyncio.sleep(POLL_SECONDS)
    await enforce(control)


async def enforce(control: Control) -> int:
    """Carry out every organization's policy; how many went."""
    gone = 0
    for organization_id, policy in await control.database.read(store.every):
        principal = system_principal(organization_id, "retention")
        try:
            found = await apply(control, principal, remove=True, policy=policy)
        except InnkeeperError as error:
            log.warning("a policy could not be carried out", organization_id=str(organization_id), reason=error.message)
            continue
        went = [one for one in found if one.stays is None]
        gone += len(went)
        for one in found:
            if one.stays is not None:
                log.info("kept beyond its policy", kind=one.kept.kind.value, id=str(one.kept.id), reason=one.stays)
        if went:
            log.info("removed by policy", organization_id=str(organization_id), count=len(went))
    return gone
