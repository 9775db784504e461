"""How an instance comes up and goes down. Only flights run these, so for one handle they never overlap in this process; leases keep other processes away."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import sqlalchemy as sa
import structlog

from innkeeper.bus.contract import Message
from innkeeper.control import audit, clock, mount_work, placement, warm_pools
from innkeeper.control.live_table import Entry
from innkeeper.control.machine_request import ensure_of
from innkeeper.core.checkpoint_verbs import RestoreCheckpoint
from innkeeper.core.event import AuditEvent
from innkeeper.core.host_verbs import DestroyMachine, EnsureMachine, to_wire
from innkeeper.core.image_config import ImageConfig
from innkeeper.core.instance import LEGAL, PROVISIONING, BootStep, Instance, InstanceState, Isolation, transition
from innkeeper.core.instance_spec import InstanceSpec
from innkeeper.core.isolation import isolation_from_wire
from innkeeper.core.snapshot import Snapshot
from innkeeper.core.token import Organization, Principal
from innkeeper.errors import (
    CheckpointDamagedError,
    ConflictError,
    InnkeeperError,
    InstanceFailedError,
    InstanceNotFoundError,
    InvalidRequestError,
    MemoryUnusableError,
    NoHostError,
    NotFoundError,
    RateLimitedError,
    SnapshotDamagedError,
    UnavailableError,
)
from innkeeper.ids import public_key_id, uuid7
from innkeeper.store import audit_events, instances, leases, organizations, rooms, volumes
from innkeeper.store import snapshots as snapshot_store
from innkeeper.store.tables import instances as instances_table

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

# A burst of cold starts queues on the host; beyond this the host is taken to have forgotten the request.
ENSURE_SECONDS = 300.0
DESTROY_SECONDS = 60.0
LEASE_SECONDS = ENSURE_SECONDS + 30.0
OTHER_PROCESS_POLL_SECONDS = 0.2

_RANK = {state: position for position, state in enumerate(PROVISIONING)}


async def bring_up(control: Control, principal: Principal, entry: Entry) -> Entry:
    """The instance, ready: restarted on its disk, or found so.

    Raises:
        InstanceNotFoundError: it is being destroyed, or was.
        NoHostError, UnavailableError: it cannot be brought up now; a DriverNotOfferedError leaves it as it is.
        InstanceFailedError: it failed.

    """
    if entry.doomed:
        raise InstanceNotFoundError
    if entry.ready:
        return entry
    host = control.hosts.get(entry.instance.host_id)
    if host is not None:
        # Before anything is noted: an instance that may not start as things are stays what it is.
        placement.offer_for(control, host, entry.spec, entry.instance)
    before = entry.instance.state
    lease = await _claim(control, principal, entry)
    if lease is None:
        return await _wait_for_other_process(control, entry)
    await _ensure(control, entry, lease, new=False, before=before, by=principal.actor)
    return entry


def plan(
    control: Control,
    spec: InstanceSpec,
    *,
    profile_id: UUID,
    host_id: UUID | None = None,
    origin: Snapshot | None = None,
) -> Instance:
    """A new instance of the spec, on the host that is to have it, which is where its `origin` is; nothing is stored yet.

    Raises NoHostError, UnavailableError.
    """
    host = placement.choose(control, spec, host_id=host_id if origin is None else origin.host_id)
    if origin is None:
        image = placement.usable_image(control, spec)
        digest, config = image.digest, image.defaults
    else:
        digest, config = origin.image_digest, origin.image_config or ImageConfig()
    created_at = clock.now()
    return Instance(
        id=uuid7(),
        organization_id=spec.organization_id,
        public_id=public_key_id(),
        profile_id=profile_id,
        image=spec.image,
        state=InstanceState.ACTIVE,
        created_at=created_at,
        host_id=host.host.id,
        last_active_at=created_at,
        image_digest=digest,
        image_config=config,
        vcpu_count=spec.vcpu_count,
        memory_mb=spec.memory_mb,
        disk_mb=spec.disk_mb,
    )


async def commit(
    control: Control, instance: Instance, event: AuditEvent, insert_handle: Callable[[sa.Connection], None]
) -> UUID:
    """Store a planned instance with its handle, before any host hears of it; its lease.

    Raises:
        RateLimitedError: a limit of the organization.
        IntegrityError: the handle is there already, or what it belongs to is not.

    """
    lease = uuid4()
    organization = await organization_of(control, instance.organization_id)

    def insert(connection: sa.Connection) -> None:
        check_limits(connection, organization, instance.memory_mb)
        instances.insert(connection, instance, lock_token=lease, now=instance.created_at, ttl_seconds=LEASE_SECONDS)
        insert_handle(connection)
        audit_events.insert(connection, event)

    try:
        await control.database.write(insert)
    except RateLimitedError:
        control.metrics.instances_refused += 1
        raise
    control.metrics.instances_created += 1
    return lease


async def start(control: Control, entry: Entry, lease: UUID) -> None:
    """Bring a committed instance up for the first time. Where that cannot be done now, nothing is left of it, unless somebody was told of it meanwhile.

    Raises:
        NoHostError: it cannot be made now.
        InstanceFailedError: it is there and failed.

    """
    await _ensure(control, entry, lease, new=True, before=entry.instance.state, by=entry.kind)


async def organization_of(control: Control, organization_id: UUID) -> Organization | None:
    """The organization with its limits, from memory where it is there."""
    organization = control.organizations.get(organization_id)
    if organization is None:
        organization = await control.database.read(organizations.get, organization_id)
        if organization is not None:
            control.organizations[organization_id] = organization
    return organization


def check_limits(
    connection: sa.Connection, organization: Organization | None, memory_mb: int, *, count: int = 1
) -> None:
    """Refuse an instance, or so many alike, beyond the organization's limits, in the transaction that would store it. Raises RateLimitedError."""
    if organization is None or (organization.max_instances is None and organization.max_memory_mb is None):
        return
    there, used_mb = instances.usage(connection, organization.id)
    if organization.max_instances is not None and there + count > organization.max_instances:
        raise RateLimitedError(
            f"The organization's limit of {organization.max_instances} instances is reached; destroy one first",
            retry_after_seconds=10,
        )
    check_memory(organization, used_mb, more_mb=memory_mb * count)


def check_memory(organization: Organization | None, used_mb: int, *, more_mb: int) -> None:
    """Refuse more memory than the organization's limit leaves. Raises RateLimitedError."""
    limit = None if organization is None else organization.max_memory_mb
    if limit is not None and used_mb + more_mb > limit:
        raise RateLimitedError(
            f"The organization's limit of {limit} MiB of memory is reached: {used_mb} are in use and "
            f"this one needs {more_mb}; destroy another first",
            retry_after_seconds=10,
        )


async def _claim(control: Control, principal: Principal, entry: Entry) -> UUID | None:
    """The lease of an existing instance that is to come up (again), or None while another process works on it."""
    await control.later.flush(control)
    before = entry.instance
    suspended = before.state is InstanceState.SUSPENDED
    restart = suspended or before.state in (InstanceState.FAILED, InstanceState.STOPPED, InstanceState.READY)
    wanted = transition(before, InstanceState.ACTIVE) if restart else before
    if restart and not suspended:
        # Memory goes on in a machine of the size that it was saved of.
        wanted = entry.at_restart(wanted)
    wanted = dataclasses.replace(wanted, desired="running", revision=before.revision + 1)

    def claim(connection: sa.Connection) -> UUID | None:
        token = leases.take(connection, instances_table, before.id, now=clock.now(), ttl_seconds=LEASE_SECONDS)
        if token is not None:
            leases.apply(connection, instances_table, before.id, token, instances.state_values(wanted), release=False)
            if restart:
                if suspended:
                    event = audit.event(principal, "vm.resume", "instance", before.id, entry.marks)
                else:
                    event = audit.event(principal, f"{entry.kind}.restart", "instance", before.id, entry.marks)
                audit_events.insert(connection, event)
        return token

    token = await control.database.write(claim)
    if token is not None:
        entry.change(wanted)
        control.metrics.instances_restarted += restart
    return token


async def _wait_for_other_process(control: Control, entry: Entry) -> Entry:
    """The instance once the process that holds its lease has brought it up."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + LEASE_SECONDS
    while loop.time() < deadline:
        instance = await control.database.read(instances.get, entry.instance.id)
        if instance is None or instance.state is InstanceState.DESTROYED:
            control.live.remove(entry)
            control.shares.remove_of(entry.instance.id)
            raise UnavailableError(f"The {entry.kind} was removed meanwhile")
        entry.change(instance)
        if instance.state is InstanceState.READY:
            return entry
        if instance.state is InstanceState.FAILED:
            raise InstanceFailedError(instance.failure)
        await asyncio.sleep(OTHER_PROCESS_POLL_SECONDS)
    raise UnavailableError(f"Another process did not bring the {entry.kind} up in time")


async def _ensure(control: Control, entry: Entry, lease: UUID, *, new: bool, before: InstanceState, by: str) -> None:
    """Ask the host for the machine and note the outcome; it was in the state `before`, and comes up by somebody's wish."""
    began = time.monotonic()
    control.metrics.provisionings += 1
    try:
        async with asyncio.timeout(ENSURE_SECONDS):
            answer = await _ask(control, entry)
            await mount_work.attach_all(control, entry)
        boot_trace, isolation = _boot_trace(answer), _isolation(control, answer)
    except Exception as error:
        control.metrics.provisioning_failures += 1
        await _note_failure(control, entry, lease, error, new=new, before=before)
    else:
        ready = transition(entry.instance, InstanceState.READY)
        entry.change(dataclasses.replace(ready, boot_trace=boot_trace, isolation=isolation))
        control.live.touch(entry)
        control.later.state(entry.instance, lease)
        control.metrics.instances_claimed += bool(answer.get("claimed"))
        warm_pools.note_used(control, entry)
        await entry.came_up(control, before, by=by, woken=answer.get("woken"))
    finally:
        control.metrics.provisioning_seconds += time.monotonic() - began


async def _ask(control: Control, entry: Entry) -> dict[str, Any]:
    host = control.hosts.get(entry.instance.host_id)
    if host is None:
        raise UnavailableError(f"The host of the {entry.kind} is not reachable")
    request = ensure_of(
        entry.instance,
        entry.spec,
        control.images.resolve(entry.instance.organization_id, entry.instance.image),
        control.box.open_env(
            entry.spec.env_sealed, organization_id=entry.spec.organization_id, object_id=entry.spec.owner_id
        ),
        offer=placement.offer_for(control, host, entry.spec, entry.instance),
        agent_version=host.agent_version,
    )
    origin = entry.origin
    if origin is None:
        return await _follow_to_end(control, entry, host.host.id, request)
    snapshot = await control.database.read(snapshot_store.get, origin)
    if snapshot is not None and snapshot.of_image:
        answer = await _follow_to_end(control, entry, host.host.id, request)
        await entry.begun(control, with_memory=False, reason="The snapshot is an image")
        return answer
    reason = ""
    try:
        answer = await _follow_to_end(control, entry, host.host.id, RestoreCheckpoint(origin, request))
    except CheckpointDamagedError as error:
        await control.database.write(snapshot_store.mark_damaged, origin, error.message)
        raise SnapshotDamagedError(f"The snapshot is damaged: {error.message}") from error
    except MemoryUnusableError as error:
        # There is none, or the host has changed since; the disk is all there.
        reason = error.message
        answer = await _follow_to_end(control, entry, host.host.id, RestoreCheckpoint(origin, request, disk_only=True))
    await entry.begun(control, with_memory=bool(answer["restored"]), reason=reason)
    return answer


async def _follow_to_end(
    control: Control, entry: Entry, host_id: UUID, request: EnsureMachine | RestoreCheckpoint
) -> dict[str, Any]:
    async with control.bus.open(host_id, request.verb, to_wire(request)) as call:
        async for event in call.events():
            if isinstance(event, Message):
                _follow(entry, event.body)
        return await call.result()


def _follow(entry: Entry, body: dict[str, Any]) -> None:
    """Show a provisioning step that the host reports; only `READY` is left to the end, when the answer is there."""
    step = body.get("step")
    if step not in _RANK:
        return
    state = InstanceState(step)
    if _RANK.get(entry.instance.state, len(_RANK)) < _RANK[state] < _RANK[InstanceState.READY]:
        entry.change(transition(entry.instance, state))


async def _note_failure(
    control: Control, entry: Entry, lease: UUID, error: Exception, *, new: bool, before: InstanceState
) -> None:
    """Store why the instance did not come up, and raise what its callers are told."""
    unavailable = isinstance(error, UnavailableError) and not isinstance(error, InstanceFailedError)
    # A snapshot that cannot be begun with, or a volume that cannot be had, is no reason to try again.
    refused = entry.demanding and isinstance(error, (ConflictError, NotFoundError, InvalidRequestError))
    if (unavailable or refused) and new and not entry.told:
        # Nobody was told of it: no handle is left behind, and what the host may have begun is an orphan that it cleans away.
        control.live.remove(entry)
        control.shares.remove_of(entry.instance.id)
        control.metrics.instances_refused += 1
        await control.database.write(_forget, entry.instance.id)
        control.reconcile_hint.set()
        if refused:
            raise error
        raise NoHostError from error
    if unavailable and before is InstanceState.SUSPENDED:
        # It stays what it was: the host has its memory, and no room for it.
        asleep = transition(entry.instance, InstanceState.SUSPENDED)
        entry.change(dataclasses.replace(asleep, desired="suspended"))
        control.later.state(entry.instance, lease)
        await control.later.flush(control)
        raise NoHostError from error
    if isinstance(error, InnkeeperError):
        failure = error.message
    elif isinstance(error, TimeoutError):
        failure = f"The host did not bring the guest up within {ENSURE_SECONDS:.0f} seconds"
    else:
        log.exception("provisioning failed", instance_id=str(entry.instance.id), exc_info=error)
        failure = "The server could not bring the guest up"
    entry.change(transition(entry.instance, InstanceState.FAILED, failure=failure))
    control.later.state(entry.instance, lease)
    await control.later.flush(control)
    if unavailable:
        raise NoHostError from error
    raise InstanceFailedError(failure) from error


def _forget(connection: sa.Connection, instance_id: UUID) -> None:
    instances.delete(connection, instance_id)


def mark_lost(control: Control, entry: Entry) -> None:
    """The machine is gone without a word, with what was in its memory, and its disk is kept: its next use starts it again."""
    if entry.ready:
        control.metrics.machines_lost += 1
        stopped = transition(transition(entry.instance, InstanceState.STOPPING), InstanceState.STOPPED)
        entry.change(dataclasses.replace(stopped, desired="stopped"))
        _note_loss(control, entry, "The machine is gone")


def mark_failed(control: Control, entry: Entry, failure: str) -> None:
    """The machine broke: its next use starts it again on its disk."""
    if entry.ready:
        control.metrics.machines_failed += 1
        entry.change(transition(entry.instance, InstanceState.FAILED, failure=failure))
        _note_loss(control, entry, failure)


def _note_loss(control: Control, entry: Entry, reason: str) -> None:
    control.later.state(entry.instance, None)
    host = Principal(entry.instance.organization_id, None, frozenset(), "system:host")
    details = {"reason": reason, "memory": "lost", "disk": "kept", **entry.marks}
    control.later.audit(audit.event(host, f"{entry.kind}.machine_lost", "instance", entry.instance.id, details))


async def take_down(
    control: Control, principal: Principal, entry: Entry, *, verb: str = "destroy", reason: str = "deleted"
) -> Entry:
    """Destroy the instance; returns when its guest is gone. What is begun here is finished by the reconciler if this is cut short.

    Raises:
        UnavailableError: the host cannot be asked now, or another process works on it.

    """
    await control.later.flush(control)
    before = entry.instance
    doomed = before
    if before.state is not InstanceState.STOPPING and InstanceState.STOPPING in LEGAL[before.state]:
        doomed = transition(before, InstanceState.STOPPING)
    doomed = dataclasses.replace(doomed, desired="destroyed", revision=before.revision + 1)

    def doom(connection: sa.Connection) -> UUID | None:
        token = leases.take(connection, instances_table, before.id, now=clock.now(), ttl_seconds=DESTROY_SECONDS + 30)
        if token is not None:
            leases.apply(connection, instances_table, before.id, token, instances.state_values(doomed), release=False)
            if before.desired != "destroyed":
                event = audit.event(principal, f"{entry.kind}.{verb}", "instance", before.id, entry.marks)
                audit_events.insert(connection, event)
                entry.store_end(connection, reason)
        return token

    lease = await control.database.write(doom)
    if lease is None:
        raise UnavailableError(f"The {entry.kind} is being worked on by another process")
    entry.change(doomed)
    if before.desired != "destroyed":
        entry.note_end(reason)
    try:
        if doomed.host_id is not None:
            await control.bus.request(
                doomed.host_id,
                DestroyMachine.verb,
                to_wire(DestroyMachine(doomed.id)),
                timeout_seconds=DESTROY_SECONDS,
            )
    except BaseException:
        # Still doomed: the reconciler goes on as soon as the lease is free.
        control.later.state(doomed, lease)
        control.reconcile_hint.set()
        raise
    gone = transition(doomed, InstanceState.DESTROYED)

    def bury(connection: sa.Connection) -> None:
        rooms.delete_of_instance(connection, gone.id)
        volumes.delete_mounts_of(connection, gone.id)
        values = {**instances.state_values(gone), "destroyed_at": clock.now()}
        leases.apply(connection, instances_table, gone.id, lease, values, release=True)

    await control.database.write(bury)
    entry.change(gone)
    control.live.remove(entry)
    control.shares.remove_of(gone.id)
    control.metrics.instances_destroyed += 1
    return entry


def _boot_trace(answer: dict[str, Any]) -> tuple[BootStep, ...]:
    return tuple(BootStep(str(step["step"]), float(step["at_ms"])) for step in answer.get("boot_trace", []))


def _isolation(control: Control, answer: dict[str, Any]) -> Isolation | None:
    told = answer.get("isolation")
    if not isinstance(told, dict):
        return None
    return placement.rules_of(control.settings).judged(isolation_from_wire(told))
