"""How a snapshot comes to be and goes: its row and its host's checkpoint of the same id, and which of the two a crash may leave behind.

The row is committed before the host hears of it, and goes after the host's part: so a checkpoint that no row names is an orphan, and a row that nobody
works on says what is to be done.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import sqlalchemy as sa
import structlog

from innkeeper.control import audit, clock, guest_probe, mount_work
from innkeeper.control.live_table import Entry
from innkeeper.control.vm_entry import VmEntry
from innkeeper.core.checkpoint_verbs import DropCheckpoint, ListCheckpoints, SnapshotDisk, TakeCheckpoint
from innkeeper.core.event import AuditEvent
from innkeeper.core.host_verbs import to_wire
from innkeeper.core.instance import InstanceState
from innkeeper.core.snapshot import Mark, Snapshot, SnapshotStatus
from innkeeper.core.token import Principal
from innkeeper.errors import CheckpointFailedError, ConflictError, InnkeeperError, RateLimitedError, UnavailableError
from innkeeper.ids import parse_uuid, uuid7
from innkeeper.store import audit_events, leases
from innkeeper.store import snapshots as store
from innkeeper.store.tables import snapshots as table

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

# Gigabytes of memory are written and read once more for their checksum.
TAKE_SECONDS = 900.0
DROP_SECONDS = 60.0
LIST_SECONDS = 30.0
SETTLE_SECONDS = 120.0
INTERRUPTED = "The server was stopped while it was taken"
LOST = "The host does not have it any more"


async def begin(
    control: Control, principal: Principal, entry: VmEntry, *, name: str, memory: bool, passing: bool = False
) -> tuple[Snapshot, UUID]:
    """A new snapshot's row with its lease, committed before the host hears of it.

    Raises:
        RateLimitedError: the organization has as many as it may.
        UnavailableError: the VM has never been on a host, or the database cannot be written.

    """
    instance = entry.instance
    if instance.host_id is None or instance.isolation is None:
        raise UnavailableError("The VM has not come up yet")
    snapshot = Snapshot(
        id=uuid7(),
        organization_id=instance.organization_id,
        instance_id=instance.id,
        host_id=instance.host_id,
        name=name,
        status=SnapshotStatus.CREATING,
        created_at=clock.now(),
        memory=memory,
        passing=passing,
        driver=instance.isolation.driver,
        image=instance.image,
        image_digest=instance.image_digest,
        image_config=instance.image_config,
        vcpu_count=instance.vcpu_count,
        memory_mb=instance.memory_mb,
        disk_mb=instance.disk_mb,
        egress_policy=entry.vm.egress_policy,
        parent_id=entry.vm.snapshot_id,
        volumes=tuple(sorted({mount.volume_id for mount in entry.mounts.values()})),
    )
    lease = uuid4()
    limit = control.settings.max_snapshots
    event = _event(principal, "snapshot.create", snapshot)

    def insert(connection: sa.Connection) -> None:
        if store.count(connection, snapshot.organization_id) >= limit:
            raise RateLimitedError(
                f"The organization has {limit} snapshots, which is the limit; delete one first", retry_after_seconds=10
            )
        ttl_seconds = TAKE_SECONDS + 30
        store.insert(connection, snapshot, lock_token=lease, now=snapshot.created_at, ttl_seconds=ttl_seconds)
        audit_events.insert(connection, event)

    await control.database.write(insert)
    return snapshot, lease


async def capture(control: Control, entry: VmEntry, snapshot: Snapshot, lease: UUID) -> Snapshot:
    """The snapshot, ready. Where that cannot be, nothing is left of it on the host, and its row says why.

    Raises:
        CheckpointFailedError, UnavailableError, InnkeeperError: why not; the VM goes on.

    """
    verb = (TakeCheckpoint if snapshot.memory else SnapshotDisk)(entry.instance.id, snapshot.id)
    # It is being used: it must not end for being idle meanwhile.
    entry.open_streams += 1
    try:
        async with asyncio.timeout(TAKE_SECONDS), contextlib.AsyncExitStack() as aside:
            # One that sleeps can be asked nothing, and has no volumes attached.
            if snapshot.memory and entry.instance.state is not InstanceState.SUSPENDED:
                snapshot = dataclasses.replace(snapshot, mark=await _mark(control, entry, snapshot))
                # They go on changing, and are somewhere else, or gone, where the memory is restored.
                await aside.enter_async_context(mount_work.set_aside(control, entry))
            async with control.bus.open(snapshot.host_id, verb.verb, to_wire(verb)) as call:
                answer = await call.result()
        ready = _taken(snapshot, answer)
    except Exception as error:
        reason = error.message if isinstance(error, InnkeeperError) else "The host did not take it in time"
        if not isinstance(error, (InnkeeperError, TimeoutError)):
            log.exception("a snapshot failed", snapshot_id=str(snapshot.id))
            reason = "The server could not take it"
        await fail(control, snapshot, lease, reason)
        if isinstance(error, InnkeeperError):
            raise
        raise CheckpointFailedError(reason) from error
    finally:
        entry.open_streams -= 1
    if not await control.database.write(leases.apply, table, snapshot.id, lease, store.outcome(ready), release=True):
        raise ConflictError("The snapshot was deleted meanwhile")
    control.metrics.snapshots_taken += 1
    control.snapshots_hint.set()
    entry.note("snapshot", ready.name, snapshot_id=str(ready.id))
    return ready


async def _mark(control: Control, entry: VmEntry, snapshot: Snapshot) -> Mark | None:
    """What a guest says of itself, with something left in its memory: what a verification compares. None where it has no shell to be asked with."""
    nonce = secrets.token_hex(16)
    try:
        told = await guest_probe.probe(control, snapshot.host_id, entry.instance.id, leave=nonce)
    except (InnkeeperError, TimeoutError) as error:
        log.info("a snapshot goes without a mark", vm_id=entry.vm.vm_id, reason=str(error))
        return None
    if told.nonce != nonce:
        return None
    return Mark(nonce=nonce, machine_id=told.machine_id, hostname=told.hostname, entropy=told.entropy)


async def keep_last(control: Control, principal: Principal, entry: Entry) -> None:
    """Take the snapshot that a VM is to leave, before it ends: with its memory where that can be, else of its disk.

    Raises InnkeeperError where neither can be: then it must not end.
    """
    if not isinstance(entry, VmEntry) or not entry.vm.snapshot_on_terminate or entry.doomed:
        return
    if entry.origin is not None or entry.instance.isolation is None:
        # It has never come up: there is nothing to keep.
        return
    name = entry.vm.snapshot_name or entry.vm.vm_id
    if entry.ready:
        try:
            await capture(control, entry, *await begin(control, principal, entry, name=name, memory=True))
        except CheckpointFailedError as error:
            log.info("a last snapshot is one of the disk alone", vm_id=entry.vm.vm_id, reason=error.message)
        else:
            return
    await capture(control, entry, *await begin(control, principal, entry, name=name, memory=False))


async def fail(control: Control, snapshot: Snapshot, lease: UUID, reason: str) -> None:
    """Note why a snapshot could not be taken, and have the host forget what there may be of it."""
    failed = dataclasses.replace(snapshot, status=SnapshotStatus.FAILED, error=reason)
    await control.database.write(leases.apply, table, snapshot.id, lease, store.outcome(failed), release=True)
    try:
        await drop_from_host(control, snapshot)
    except InnkeeperError as error:
        # No row names it: it is garbage.
        log.info("what was left of a snapshot stays for now", snapshot_id=str(snapshot.id), reason=error.message)


async def drop(control: Control, snapshot: Snapshot) -> None:
    """Have the host and then the database forget it. Idempotent. Raises ConflictError while a machine is started from it, UnavailableError."""
    await drop_from_host(control, snapshot)
    await control.database.write(store.delete, snapshot.id)


async def drop_from_host(control: Control, snapshot: Snapshot) -> None:
    """Have the host forget it. Idempotent."""
    verb = DropCheckpoint(snapshot.id)
    await control.bus.request(snapshot.host_id, verb.verb, to_wire(verb), timeout_seconds=DROP_SECONDS)


async def settle(control: Control, host_id: UUID) -> None:
    """Finish what was cut short of a host's snapshots, and note of those that it has lost that they are."""
    known = await control.database.read(store.on_host, host_id)
    if not known:
        return
    # Before the host is asked: what it says of these is then said of rows that nobody works on.
    leased = {
        snapshot.id: lease
        for snapshot in known
        if snapshot.status in (SnapshotStatus.CREATING, SnapshotStatus.DELETING)
        and (lease := await control.database.write(_take_over, snapshot)) is not None
    }
    answer = await control.bus.request(
        host_id, ListCheckpoints.verb, to_wire(ListCheckpoints()), timeout_seconds=LIST_SECONDS
    )
    there = {parse_uuid(str(one["checkpoint_id"])): one for one in answer["checkpoints"]}
    for snapshot in known:
        try:
            await _settle(control, snapshot, there.get(snapshot.id), leased.get(snapshot.id))
        except InnkeeperError as error:
            # The next look tries again; the other snapshots must not wait for it.
            log.warning("a snapshot could not be settled", snapshot_id=str(snapshot.id), reason=error.message)


def _take_over(connection: sa.Connection, snapshot: Snapshot) -> UUID | None:
    """The lease of a row that is as it was and that nobody works on."""
    lease = leases.take(connection, table, snapshot.id, now=clock.now(), ttl_seconds=SETTLE_SECONDS)
    now = store.get(connection, snapshot.id)
    if lease is not None and (now is None or now.status is not snapshot.status):
        leases.apply(connection, table, snapshot.id, lease, {}, release=True)
        return None
    return lease


async def _settle(control: Control, snapshot: Snapshot, checkpoint: dict[str, Any] | None, lease: UUID | None) -> None:
    if snapshot.status is SnapshotStatus.FAILED:
        if checkpoint is not None:
            await drop_from_host(control, snapshot)
    elif snapshot.status in (SnapshotStatus.READY, SnapshotStatus.DAMAGED):
        if checkpoint is None and await control.database.write(store.fail_ready, snapshot.id, LOST):
            log.warning("a snapshot is lost", snapshot_id=str(snapshot.id), host_id=str(snapshot.host_id))
    elif lease is None:
        # Somebody works on it.
        return
    elif snapshot.status is SnapshotStatus.DELETING:
        await drop(control, snapshot)
    elif checkpoint is None:
        await fail(control, snapshot, lease, INTERRUPTED)
    else:
        ready = _taken(snapshot, checkpoint)
        await control.database.write(leases.apply, table, snapshot.id, lease, store.outcome(ready), release=True)


def deletion_event(principal: Principal, snapshot: Snapshot, reason: str | None = None) -> AuditEvent:
    """What the audit log says of its end."""
    return _event(principal, "snapshot.delete", snapshot, reason)


def _taken(snapshot: Snapshot, checkpoint: dict[str, Any]) -> Snapshot:
    memory = checkpoint["memory"]
    downtime = checkpoint.get("downtime_ms")
    return dataclasses.replace(
        snapshot,
        status=SnapshotStatus.READY,
        memory=memory is not None,
        disk_bytes=int(checkpoint["disk_bytes"]),
        memory_bytes=None if memory is None else int(memory["size_bytes"]),
        downtime_ms=None if downtime is None else float(downtime),
        error=None,
    )


def _event(principal: Principal, action: str, snapshot: Snapshot, reason: str | None = None) -> AuditEvent:
    details = {"instance_id": str(snapshot.instance_id), "name": snapshot.name, "memory": str(snapshot.memory).lower()}
    if reason is not None:
        details["reason"] = reason
    return audit.event(principal, action, "snapshot", snapshot.id, details)
