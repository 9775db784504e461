"""How a volume comes to be and goes: its row and its host's volume of the same id, and which of the two a crash may leave behind.

The row is committed before the host hears of it, and goes after the host's part. A volume of the host that no row names is not removed: it may be all
that is left of somebody's data after an older database was restored. The operator's garbage collection lists it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import sqlalchemy as sa
import structlog

from innkeeper.control import audit, clock
from innkeeper.core.event import AuditEvent
from innkeeper.core.host_verbs import to_wire
from innkeeper.core.token import Principal
from innkeeper.core.volume import Volume, VolumeStatus
from innkeeper.core.volume_verbs import CreateVolume, ListVolumes, RemoveVolume
from innkeeper.errors import InnkeeperError, RateLimitedError, VolumeInUseError
from innkeeper.ids import parse_uuid
from innkeeper.store import audit_events, leases
from innkeeper.store import volumes as store
from innkeeper.store.tables import volumes as table

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

# A file system is made, or one of any size is checked and grown.
WORK_SECONDS = 600.0
DROP_SECONDS = 60.0
LIST_SECONDS = 30.0
SETTLE_SECONDS = 120.0
LOST = "The host does not have it any more"


async def make(control: Control, principal: Principal, volume: Volume, *, action: str) -> Volume:
    """The volume, stored and made on its host; nothing is left of one that could not be made.

    Raises:
        RateLimitedError: the organization has as many as it may.
        InnkeeperError: why the host did not make it.

    """
    lease = uuid4()
    limit = control.settings.max_volumes
    event = event_of(principal, action, volume, {"size_mb": str(volume.size_mb)})

    def insert(connection: sa.Connection) -> None:
        if store.count(connection, volume.organization_id) >= limit:
            raise RateLimitedError(
                f"The organization has {limit} volumes and checkpoints, which is the limit; delete one first",
                retry_after_seconds=10,
            )
        store.insert(connection, volume, lock_token=lease, now=volume.created_at, ttl_seconds=WORK_SECONDS + 30)
        audit_events.insert(connection, event)

    await control.database.write(insert)
    verb = CreateVolume(
        volume.id, volume.size_mb, copy_of=volume.checkpoint_of, immutable=volume.checkpoint_of is not None
    )
    ready = dataclasses.replace(volume, status=VolumeStatus.READY)
    try:
        await ask(control, volume.host_id, verb, seconds=WORK_SECONDS)
    except InnkeeperError:
        # Nobody was told of it.
        await drop(control, dataclasses.replace(volume, status=VolumeStatus.DELETING))
        raise
    except BaseException:
        await control.database.write(leases.apply, table, volume.id, lease, {}, release=True)
        control.reconcile_hint.set()
        raise
    await control.database.write(leases.apply, table, volume.id, lease, store.outcome(ready), release=True)
    return ready


async def drop(control: Control, volume: Volume) -> None:
    """Remove a volume from its host, and then its row. Raises VolumeInUseError, UnavailableError."""
    await control.volume_guests.let_go(volume.id)
    await ask(control, volume.host_id, RemoveVolume(volume.id), seconds=DROP_SECONDS)
    await control.database.write(store.delete, volume.id)


async def on_host(
    control: Control, host_id: UUID, volume_ids: tuple[UUID, ...] | None = None
) -> dict[UUID, dict[str, Any]]:
    """What a host says of its volumes, or of these, by id. Raises UnavailableError."""
    answer = await ask(control, host_id, ListVolumes(volume_ids), seconds=LIST_SECONDS)
    found = {parse_uuid(str(one["volume_id"])): one for one in answer["volumes"]}
    return {volume_id: one for volume_id, one in found.items() if volume_id is not None}


async def ask(control: Control, host_id: UUID, verb: Any, *, seconds: float) -> dict[str, Any]:
    """The host's answer to a verb of volumes. Raises what the host says, and UnavailableError."""
    return await control.bus.request(host_id, verb.verb, to_wire(verb), timeout_seconds=seconds)


async def settle(control: Control, host_id: UUID) -> None:
    """Finish what was cut short of a host's volumes, and note of those that it has lost that they are."""
    known = await control.database.read(store.on_host, host_id)
    if not known:
        return
    # Before the host is asked: what it says of these is then said of rows that nobody works on.
    taken_over = {
        volume.id
        for volume in known
        if volume.status in (VolumeStatus.CREATING, VolumeStatus.DELETING)
        and await control.database.write(_take_over, volume)
    }
    there = await on_host(control, host_id)
    for volume in known:
        try:
            if volume.id in taken_over:
                # Of one that was not ready nobody was told.
                await drop(control, volume)
            elif volume.status is VolumeStatus.READY and volume.id not in there:
                log.warning("a volume is lost", volume_id=str(volume.id), host_id=str(host_id))
                await control.database.write(store.fail_ready, volume.id, LOST)
        except VolumeInUseError:
            log.warning("a volume that was deleted is in use", volume_id=str(volume.id))
        except InnkeeperError as error:
            # The next look tries again; the other volumes must not wait for it.
            log.warning("a volume could not be settled", volume_id=str(volume.id), reason=error.message)


def _take_over(connection: sa.Connection, volume: Volume) -> bool:
    """Whether a row is as it was, and nobody works on it."""
    lease = leases.take(connection, table, volume.id, now=clock.now(), ttl_seconds=SETTLE_SECONDS)
    now = store.get(connection, volume.id)
    if lease is not None and (now is None or now.status is not volume.status):
        leases.apply(connection, table, volume.id, lease, {}, release=True)
        return False
    return lease is not None


def event_of(principal: Principal, action: str, volume: Volume, details: dict[str, str] | None = None) -> AuditEvent:
    """What the audit log says of it."""
    of = {} if volume.checkpoint_of is None else {"volume_id": str(volume.checkpoint_of)}
    kind = action.partition(".")[0]
    return audit.event(principal, action, kind, volume.id, {"name": volume.name, **of, **(details or {})})
