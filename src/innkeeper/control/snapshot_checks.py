"""Whether snapshots are still what was taken: checksums of their disks, and verifications, each of which starts one in a guest that goes afterwards."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa
import structlog

from innkeeper.control import audit, clock
from innkeeper.control.access import require
from innkeeper.control.guest_probe import Told, probe
from innkeeper.control.passing_guest import passing_guest
from innkeeper.control.reconciler import system_principal
from innkeeper.control.tasks import wait_for_hint
from innkeeper.core.checkpoint_verbs import DigestCheckpoint, RestoreCheckpoint
from innkeeper.core.host_verbs import EnsureMachine, MachineShape, to_wire
from innkeeper.core.instance import Instance, InstanceState
from innkeeper.core.snapshot import Check, Snapshot, SnapshotStatus
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    ConflictError,
    InnkeeperError,
    InstanceFailedError,
    MemoryUnusableError,
    SnapshotNotFoundError,
    UnavailableError,
)
from innkeeper.ids import public_key_id, uuid7
from innkeeper.store import audit_events, instances, leases
from innkeeper.store import snapshots as store
from innkeeper.store.tables import snapshots as table

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

# What marks the row of a guest that a snapshot is started in: such a guest has no VM.
LABEL = "snapshot_check"
POLL_SECONDS = 60.0
DIGEST_SECONDS = 900.0
VERIFY_SECONDS = 1_800.0
# How far a guest's clock may be from the server's while it is read, beside the time that takes.
CLOCK_SECONDS = 5.0


async def recover(control: Control) -> None:
    """At the start: guests that an earlier process had for a verification are nobody's."""
    await control.database.write(instances.delete_labelled, LABEL)


async def step(control: Control) -> None:
    """Wait for a new snapshot or the next poll; note the checksums that are missing, then verify one snapshot if one is due."""
    await wait_for_hint(control.snapshots_hint, at_most_seconds=POLL_SECONDS)
    for snapshot in await control.database.read(store.undigested):
        try:
            digest = await _digest(control, snapshot)
        except CheckpointDamagedError as error:
            await control.database.write(store.mark_damaged, snapshot.id, error.message)
        except (InnkeeperError, TimeoutError) as error:
            # Its host is away, or it is: the next look tries again.
            log.info("a snapshot has no checksum yet", snapshot_id=str(snapshot.id), reason=str(error))
        else:
            await control.database.write(store.set_digest, snapshot.id, digest)
    await verify_next(control)


async def verify_next(control: Control) -> Snapshot | None:
    """Verify the snapshot that has waited longest, if that is as long as the setting says; None where there is none."""
    hours = control.settings.snapshot_verify_hours
    if not hours:
        return None
    due = await control.database.read(store.least_verified, clock.now() - timedelta(hours=hours))
    if due is None:
        return None
    principal = system_principal(due.organization_id, "snapshot-checks")
    try:
        return await verify(control, principal, due.id)
    except InnkeeperError as error:
        log.warning("a snapshot could not be verified now", snapshot_id=str(due.id), reason=error.message)
        return None


async def verify(control: Control, principal: Principal, snapshot_id: UUID) -> Snapshot:
    """The snapshot with what its verification says; it is damaged when a check failed, and ready when none did.

    Raises:
        SnapshotNotFoundError.
        ConflictError: it is not ready, is being worked on, or is an image.
        UnavailableError, RateLimitedError: it cannot be verified now, which says nothing of it.

    """
    require(principal, Scope.ROOMS)
    lease = await control.database.write(_begin, principal, snapshot_id)
    outcome: asyncio.Future[Snapshot] = asyncio.get_running_loop().create_future()
    outcome.add_done_callback(lambda future: future.cancelled() or future.exception())

    async def work() -> None:
        try:
            outcome.set_result(await _work(control, snapshot_id, lease))
        except InnkeeperError as error:
            outcome.set_exception(error)
        except BaseException:
            outcome.set_exception(UnavailableError("The snapshot could not be verified"))
            raise

    try:
        control.tasks.spawn(work(), name="snapshot verification")
    except RuntimeError:
        raise UnavailableError("The server is stopping") from None
    # The one who asked may go away; the guest must not stay.
    return await asyncio.shield(outcome)


def _begin(connection: sa.Connection, principal: Principal, snapshot_id: UUID) -> UUID:
    snapshot = store.get(connection, snapshot_id)
    if snapshot is None or snapshot.organization_id != principal.organization_id:
        raise SnapshotNotFoundError
    if snapshot.of_image:
        raise ConflictError("The snapshot is an image: there is no moment of a VM to be verified")
    if snapshot.status is not SnapshotStatus.DAMAGED:
        snapshot.check_ready()
    lease = leases.take(connection, table, snapshot_id, now=clock.now(), ttl_seconds=VERIFY_SECONDS)
    if lease is None:
        raise ConflictError("The snapshot is being worked on")
    details = {"name": snapshot.name}
    audit_events.insert(connection, audit.event(principal, "snapshot.verify", "snapshot", snapshot_id, details))
    return lease


async def _work(control: Control, snapshot_id: UUID, lease: UUID) -> Snapshot:
    snapshot = await control.database.read(store.get, snapshot_id)
    if snapshot is None:
        raise SnapshotNotFoundError
    values = {}
    try:
        async with asyncio.timeout(VERIFY_SECONDS - 60):
            checks = [await _check_disk(control, snapshot), *await _check_started(control, snapshot)]
        values = store.verification(checks, clock.now())
        control.metrics.snapshots_verified += 1
        control.metrics.snapshots_damaged += values["status"] == SnapshotStatus.DAMAGED.value
    except TimeoutError:
        raise UnavailableError("The host did not verify the snapshot in time") from None
    finally:
        await control.database.write(leases.apply, table, snapshot_id, lease, values, release=True)
    done = await control.database.read(store.get, snapshot_id)
    if done is None:
        raise SnapshotNotFoundError
    if done.status is SnapshotStatus.DAMAGED:
        log.warning("a snapshot is damaged", snapshot_id=str(snapshot_id), reason=done.error)
    return done


async def _digest(control: Control, snapshot: Snapshot) -> str:
    verb = DigestCheckpoint(snapshot.id)
    answer = await control.bus.request(snapshot.host_id, verb.verb, to_wire(verb), timeout_seconds=DIGEST_SECONDS)
    return str(answer["disk_digest"])


async def _check_disk(control: Control, snapshot: Snapshot) -> Check:
    try:
        digest = await _digest(control, snapshot)
    except CheckpointDamagedError as error:
        return Check("disk", False, error.message)
    if snapshot.disk_digest is None:
        await control.database.write(store.set_digest, snapshot.id, digest)
        return Check("disk", None, "It had no checksum before; it has one now")
    if digest != snapshot.disk_digest:
        return Check("disk", False, "The checksum of the saved disk does not hold")
    return Check("disk", True, "The checksum holds")


async def _check_started(control: Control, snapshot: Snapshot) -> list[Check]:
    """Start it and ask the guest. What cannot be told is not taken for damage."""
    instance, machine = guest_of(snapshot)
    memory = Check("memory", None, "The snapshot is of the disk alone")
    if snapshot.memory:
        try:
            async with passing_guest(control, instance, RestoreCheckpoint(snapshot.id, machine)):
                memory = Check("memory", True, "The checksums hold, and it goes on")
                return [memory, *await _ask(control, snapshot, instance, restored=True)]
        except CheckpointDamagedError as error:
            return [Check("memory", False, error.message)]
        except CheckpointNotFoundError:
            return [Check("memory", False, "The host does not have it any more")]
        except MemoryUnusableError as error:
            memory = Check("memory", None, error.message)
        except InstanceFailedError as error:
            return [memory, Check("agent", False, f"The guest did not come up: {error.message}")]
        instance, machine = guest_of(snapshot)
    try:
        async with passing_guest(control, instance, RestoreCheckpoint(snapshot.id, machine, disk_only=True)):
            return [memory, *await _ask(control, snapshot, instance, restored=False)]
    except CheckpointNotFoundError:
        return [memory, Check("agent", False, "The host does not have it any more")]
    except InstanceFailedError as error:
        return [memory, Check("agent", False, f"The guest did not come up: {error.message}")]


def guest_of(snapshot: Snapshot) -> tuple[Instance, EnsureMachine]:
    """An instance for it: without a network, so that what goes on in it reaches nobody."""
    instance = Instance(
        id=uuid7(),
        organization_id=snapshot.organization_id,
        public_id=public_key_id(),
        profile_id=snapshot.id,
        image=snapshot.image,
        # It has no VM, so nobody looks at its state: this one says that nothing is left to be done.
        state=InstanceState.READY,
        created_at=clock.now(),
        host_id=snapshot.host_id,
        labels={LABEL: str(snapshot.id)},
        image_digest=snapshot.image_digest,
        vcpu_count=snapshot.vcpu_count,
        memory_mb=snapshot.memory_mb,
        disk_mb=snapshot.disk_mb,
    )
    shape = MachineShape(
        pool_key="",
        image_digest=snapshot.image_digest,
        # Only those of images have none, which are not verified.
        driver=snapshot.driver or "",
        vcpu_count=snapshot.vcpu_count,
        memory_mb=snapshot.memory_mb,
        disk_mb=snapshot.disk_mb,
        egress_mode="none",
    )
    return instance, EnsureMachine(instance.id, shape, f"check-{instance.id.hex[-8:]}")


async def _ask(control: Control, snapshot: Snapshot, instance: Instance, *, restored: bool) -> list[Check]:
    began = time.time()
    try:
        told = await probe(control, snapshot.host_id, instance.id)
    except TimeoutError:
        return [Check("agent", False, "It did not answer")]
    except UnavailableError:
        raise
    except InnkeeperError as error:
        return [Check("agent", None, f"It answers, and has no shell to be asked with: {error.message}")]
    return [Check("agent", True, "It answers"), *judged(snapshot, told, began, time.time(), restored=restored)]


def judged(snapshot: Snapshot, told: Told, began: float, ended: float, *, restored: bool) -> list[Check]:
    """What a guest's word is worth, asked between two moments in Unix seconds. Pure."""
    mark = snapshot.mark
    if told.time is None:
        clock_check = Check("clock", None, "The guest does not tell the time")
    else:
        off = max(began - told.time - 1, told.time - ended, 0.0)
        clock_check = Check(
            "clock", off <= CLOCK_SECONDS, f"{off:.0f} seconds off" if off > CLOCK_SECONDS else "It is right"
        )
    if not restored or mark is None:
        why = "No memory was restored" if not restored else "The guest told nothing of itself when it was taken"
        return [clock_check, *(Check(name, None, why) for name in ("entropy", "identity", "sentinel"))]
    return [
        clock_check,
        _differs("entropy", (told.entropy,), (mark.entropy,), "The kernel's random numbers"),
        _differs(
            "identity", (told.machine_id, told.hostname), (mark.machine_id, mark.hostname), "Machine id and host name"
        ),
        Check("sentinel", True, "What was in memory then is there")
        if told.nonce == mark.nonce
        else Check("sentinel", False, "What was left in memory when it was taken is not there"),
    ]


def _differs(name: str, now: tuple[str, ...], then: tuple[str, ...], what: str) -> Check:
    if not all(now) or not all(then):
        return Check(name, None, "The guest does not tell")
    same = any(one == other for one, other in zip(now, then, strict=True))
    return Check(name, not same, f"{what} are those of the guest it was taken of" if same else f"{what} are its own")
