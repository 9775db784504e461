"""The VM of a session: made, or the one that lives, made what is asked of it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import sqlalchemy as sa

from innkeeper.control import audit, clock, lifecycle, mounts, placement, provisioning, shares, snapshots, vms
from innkeeper.control.access import require
from innkeeper.control.vm_entry import VmEntry, VmView, event_of, session_key, vm_of
from innkeeper.control.vm_shape import image_of, new_spec
from innkeeper.core import isolation
from innkeeper.core.egress_policy import EgressPolicy
from innkeeper.core.instance_spec import InstanceSpec
from innkeeper.core.profile import validate_env
from innkeeper.core.share import ShareRequest
from innkeeper.core.snapshot import Snapshot
from innkeeper.core.token import Principal, Scope
from innkeeper.core.vm import (
    Session,
    Vm,
    VmRequest,
)
from innkeeper.errors import (
    ConflictError,
    InnkeeperError,
    InvalidRequestError,
    SnapshotNotFoundError,
)
from innkeeper.store import sessions as session_store
from innkeeper.store import snapshots as snapshot_store
from innkeeper.store import vms as vm_store

if TYPE_CHECKING:
    from innkeeper.control.context import Control


async def create(
    control: Control,
    principal: Principal,
    request: VmRequest,
    *,
    session: Session | None = None,
    new_session: UUID | None = None,
    later: VmRequest | None = None,
    share: ShareRequest | None = None,
    wait: bool = True,
) -> VmView:
    """A new VM, ready, or without `wait` on its way up; for a session with a living VM that one, as it is.

    `new_session` is the id that its own session gets; where an earlier attempt made that, its VM is the one. `share` is published with it.
    A new session keeps the request for its later VMs, or what is said of them by `later`.

    Raises:
        InvalidRequestError: naming the field.
        ForbiddenError: a lifetime beyond the limit.
        SnapshotNotFoundError, ConflictError: the snapshot is not there, not ready, or damaged.
        ConflictError: the session's living VM is of another shape.
        NoHostError, UnavailableError, RateLimitedError: it cannot be made now; nothing is left of it.
        InstanceNotReadyError: it takes longer than the wait limit; it goes on coming up.
        InstanceFailedError: it did not come up.

    """
    require(principal, Scope.ROOMS)
    vms.check(control, principal, request)
    if session is None and new_session is not None:
        session = await control.database.read(session_store.get, new_session)
    new = session is None
    whole = request if session is None else request.over(session.request)
    isolation.check(whole.wish, placement.rules_of(control.settings))
    if whole.volumes:
        # Before a session is made for nothing.
        await mounts.plan(control, principal, whole.volumes)
    if request.snapshot_id is not None:
        _check_origin(whole, await snapshots.usable(control, principal, request.snapshot_id))
    if session is None:
        session_id = new_session or uuid4()
        sealed = control.box.seal_env(
            dict(request.env or {}), organization_id=principal.organization_id, object_id=session_id
        )
        session = Session(session_id, principal.organization_id, clock.now(), later or request, sealed)
    wish = _Wish(session, request, new=new, share=share)
    attached = None
    if (living := control.live.find(session_key(session))) is not None and not lifecycle.ends(control, living):
        attached = vm_of(living)
        await _attach(control, principal, attached, wish)
    entry = await (_bring_up if wait else _begin)(control, principal, wish)
    if entry is not attached and not wish.made:
        # Somebody else's request for the session made it meanwhile, of whatever shape that asked for.
        await _attach(control, principal, entry, wish)
    return entry.view


async def for_session(control: Control, principal: Principal, session: Session) -> VmEntry:
    """The session's VM, ready; made where it has none that lives. Raises as `create`."""
    return await _bring_up(control, principal, _Wish(session, session.request, new=False))


@dataclass(slots=True)
class _Wish:
    """What is asked of a session's VM. `new`: the session is stored with it; `made`: this made it."""

    session: Session
    request: VmRequest
    new: bool
    share: ShareRequest | None = None
    made: bool = False


async def _attach(control: Control, principal: Principal, entry: VmEntry, wish: _Wish) -> None:
    """Make a living VM what is asked of it, as far as one that runs can be. Raises ConflictError, and as `shares.create`."""
    instance, request = entry.instance, wish.request
    for name, wanted, has in (
        ("memory_mb", request.memory_mb, instance.memory_mb),
        ("vcpu_count", request.vcpu_count, instance.vcpu_count),
        ("egress_policy", request.egress_policy, entry.vm.egress_policy),
        ("snapshot_id", request.snapshot_id, entry.vm.snapshot_id),
        (
            "image_variant",
            request.image_variant and image_of(control, instance.organization_id, request.image_variant),
            instance.image,
        ),
    ):
        if wanted is not None and wanted != has:
            raise ConflictError(f"{name}: the session's VM lives and has {has}")
    _check_isolation(entry, request)
    vm_id = entry.vm.vm_id
    for volume in request.volumes or ():
        await mounts.attach(control, principal, vm_id, volume)
    if wish.share is not None:
        await shares.ensure(control, principal, entry, wish.share)
    if request.env:
        await vms.stage_env(control, principal, vm_id, request.env)
    changes = {
        name: value
        for name in (
            "metadata",
            "vm_lifetime_seconds",
            "idle_seconds",
            "snapshot_on_terminate",
            "snapshot_name",
            "auto_suspend",
            "auto_resume",
        )
        if (value := getattr(request, name)) is not None
    }
    if changes:
        await vms.change(control, principal, vm_id, changes)


def _check_isolation(entry: VmEntry, request: VmRequest) -> None:
    """Refuse a living VM that is isolated otherwise than is asked; one that comes up for the first time is taken by what it asked for itself."""
    has, asked = entry.instance.isolation, entry.vm.wish
    driver, level = (asked.driver, asked.min_isolation) if has is None else (has.driver, has.level)
    if request.driver not in (None, isolation.AUTO, driver):
        raise ConflictError(f"driver: the session's VM lives and has {driver}")
    if request.min_isolation is not None and isolation.rank(level) < isolation.rank(request.min_isolation):
        raise ConflictError(f"min_isolation: the session's VM lives and has {level}")


async def _bring_up(control: Control, principal: Principal, wish: _Wish) -> VmEntry:
    """The session's VM, ready."""

    def work() -> Any:
        return _provision(control, principal, wish, committed=None)

    return vm_of(await lifecycle.bring_up(control, session_key(wish.session), work))


async def _begin(control: Control, principal: Principal, wish: _Wish) -> VmEntry:
    """The session's VM as soon as it is stored; it comes up beside."""
    key = session_key(wish.session)
    committed = asyncio.get_running_loop().create_future()

    def note() -> None:
        if not committed.done():
            committed.set_result(None)

    def work() -> Any:
        return _provision(control, principal, wish, committed=note)

    while True:
        entry, flight = control.live.find(key), control.flights.get(key)
        if entry is not None and not lifecycle.ends(control, entry) and (entry.ready or flight is not None):
            entry.told = True
            return vm_of(entry)
        if flight is None:
            flight = control.flights.start(key, "up", work)
        await asyncio.wait({flight.future, committed}, return_when=asyncio.FIRST_COMPLETED)
        if flight.kind == "up" and flight.future.done():
            flight.future.result()


async def _provision(
    control: Control, principal: Principal, wish: _Wish, *, committed: Callable[[], None] | None
) -> VmEntry:
    """The session's VM, ready: made, started again on its disk, or found so. `committed` is called when it is stored and will come up."""
    found = control.live.find(session_key(wish.session))
    if found is not None and found.doomed:
        await provisioning.take_down(control, principal, found)
        found = None
    if found is not None:
        if committed is not None:
            committed()
        await provisioning.bring_up(control, principal, found)
        return vm_of(found)
    entry, lease = await _create(control, principal, wish)
    if committed is not None:
        entry.told = True
        committed()
    try:
        await provisioning.start(control, entry, lease)
    except InnkeeperError:
        if wish.new:
            # Nobody was told of the session either, unless the VM stayed.
            await control.database.write(session_store.delete_unused, wish.session.id)
        raise
    return entry


async def _create(control: Control, principal: Principal, wish: _Wish) -> tuple[VmEntry, UUID]:
    """A new VM with its lease, committed before any host hears of it."""
    settings, session = control.settings, wish.session
    wanted = wish.request if wish.new else wish.request.over(session.request)
    origin = None if wanted.snapshot_id is None else await snapshots.usable(control, principal, wanted.snapshot_id)
    lifetime = wanted.vm_lifetime_seconds or settings.vm_lifetime_seconds
    volumes = await mounts.plan(control, principal, wanted.volumes or ())
    spec = _spec(control, session, wanted, origin)
    instance = provisioning.plan(control, spec, profile_id=session.id, host_id=volumes.host_id, origin=origin)
    if volumes.host_id not in (None, instance.host_id):
        raise ConflictError("The snapshot and the volumes are on different hosts")
    mounted = mounts.of_instance(volumes, instance.id)
    vm = Vm(
        instance_id=instance.id,
        organization_id=session.organization_id,
        session_id=session.id,
        lifetime_seconds=lifetime,
        expires_at=instance.created_at + timedelta(seconds=lifetime),
        memory_mb=spec.memory_mb,
        wish=spec.wish,
        metadata=dict(wanted.metadata or {}),
        image_variant=wanted.image_variant,
        idle_seconds=wanted.idle_seconds,
        egress_policy=wanted.egress_policy or (EgressPolicy() if origin is None else origin.egress_policy),
        auto_suspend=bool(wanted.auto_suspend),
        auto_resume=wanted.auto_resume is not False,
        env_sealed=_env(control, wish, origin),
        snapshot_id=wanted.snapshot_id,
        snapshot_on_terminate=bool(wanted.snapshot_on_terminate),
        snapshot_name=wanted.snapshot_name,
    )
    share = None if wish.share is None else shares.plan(instance, wish.share)

    def insert(connection: sa.Connection) -> None:
        if origin is not None:
            # Whoever deletes it from here on is told of this VM.
            found = snapshot_store.get(connection, origin.id)
            if found is None:
                raise SnapshotNotFoundError
            found.check_ready()
        if wish.new:
            session_store.insert(connection, session)
        vm_store.insert(connection, vm)
        mounts.insert(connection, mounted)
        vm_store.insert_events(connection, event_of(vm, "created", ""))
        if share is not None:
            shares.insert(connection, principal, share, {"session_id": str(session.id)})

    event = audit.event(principal, "vm.create", "instance", instance.id, {"session_id": str(session.id)})
    lease = await provisioning.commit(control, instance, event, insert)
    control.expiry_hint.set()
    wish.made = True
    if share is not None:
        control.shares.put(share)
    entry = vms.remember(control, vm, instance)
    entry.mounts = {mount.disk_id: mount for mount in mounted}
    return entry, lease


def _spec(control: Control, session: Session, wanted: VmRequest, origin: Snapshot | None) -> InstanceSpec:
    """What the session's next VM is made of: of a snapshot what that was taken of, and its driver, whose disks and memory no other can read.

    One of an image has no driver: any can read it.
    """
    settings = control.settings
    if origin is None:
        return new_spec(
            session.organization_id,
            session.id,
            image=image_of(control, session.organization_id, wanted.image_variant),
            vcpu_count=wanted.vcpu_count or settings.vm_vcpus,
            memory_mb=wanted.memory_mb or settings.vm_memory_mb,
            disk_mb=settings.vm_disk_mb,
            wish=wanted.wish,
        )
    _check_origin(wanted, origin)
    return new_spec(
        session.organization_id,
        session.id,
        image=origin.image,
        vcpu_count=wanted.vcpu_count or origin.vcpu_count,
        memory_mb=wanted.memory_mb or origin.memory_mb,
        disk_mb=origin.disk_mb,
        wish=wanted.wish if origin.driver is None else dataclasses.replace(wanted.wish, driver=origin.driver),
    )


def _check_origin(wanted: VmRequest, origin: Snapshot) -> None:
    """Refuse what a VM of the snapshot cannot be. Raises InvalidRequestError."""
    origin.check_sizes(memory_mb=wanted.memory_mb, vcpu_count=wanted.vcpu_count, image_variant=wanted.image_variant)
    if origin.driver is not None and wanted.wish.driver not in (isolation.AUTO, origin.driver):
        raise InvalidRequestError(f"driver: the snapshot is of {origin.driver!r}")


def _env(control: Control, wish: _Wish, origin: Snapshot | None) -> bytes | None:
    """The VM's variables: its snapshot's, over them its session's, over these its request's."""
    session, request = wish.session, wish.request
    begun = {}
    if origin is not None:
        ids = {"organization_id": origin.organization_id, "object_id": origin.id}
        begun = control.box.open_env(origin.env_sealed, **ids)
    if not begun and (wish.new or not request.env):
        return session.env_sealed
    ids = {"organization_id": session.organization_id, "object_id": session.id}
    env = {**begun, **control.box.open_env(session.env_sealed, **ids), **(request.env or {})}
    validate_env(env)
    return control.box.seal_env(env, **ids)
