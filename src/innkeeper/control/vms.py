"""VMs: create, find, list, change, hold, delete."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import sqlalchemy as sa

from innkeeper.control import audit, clock, lifecycle, placement, provisioning, shares
from innkeeper.control.access import require
from innkeeper.control.vm_entry import VmEntry, VmView, event_of, session_key
from innkeeper.control.vm_shape import image_of, new_spec
from innkeeper.core import isolation
from innkeeper.core.egress_policy import EgressPolicy
from innkeeper.core.instance import Instance
from innkeeper.core.profile import validate_env
from innkeeper.core.share import ShareRequest
from innkeeper.core.token import Principal, Scope
from innkeeper.core.vm import (
    HOLD_SECONDS_MAX,
    REASON_CHARACTERS_MAX,
    Session,
    Vm,
    VmRequest,
    parse_vm_id,
)
from innkeeper.errors import (
    ConflictError,
    ForbiddenError,
    InstanceNotFoundError,
    InvalidRequestError,
    NoHostError,
    VmNotFoundError,
)
from innkeeper.store import instances
from innkeeper.store import sessions as session_store
from innkeeper.store import vms as store

if TYPE_CHECKING:
    from innkeeper.control.context import Control

PAGE_MAX = 1_000


async def create(
    control: Control,
    principal: Principal,
    request: VmRequest,
    *,
    session: Session | None = None,
    new_session: UUID | None = None,
    share: ShareRequest | None = None,
    wait: bool = True,
) -> VmView:
    """A new VM, ready, or without `wait` on its way up; for a session with a living VM that one, as it is.

    `new_session` is the id that its own session gets; where an earlier attempt made that, its VM is the one. `share` is published with it.

    Raises:
        InvalidRequestError: naming the field.
        ForbiddenError: a lifetime beyond the limit.
        ConflictError: the session's living VM is of another shape.
        NoHostError, UnavailableError, RateLimitedError: it cannot be made now; nothing is left of it.
        InstanceNotReadyError: it takes longer than the wait limit; it goes on coming up.
        InstanceFailedError: it did not come up.

    """
    require(principal, Scope.ROOMS)
    check(control, principal, request)
    if session is None and new_session is not None:
        session = await control.database.read(session_store.get, new_session)
    new = session is None
    whole = request if session is None else request.over(session.request)
    isolation.check(whole.wish, placement.rules_of(control.settings))
    if session is None:
        session_id = new_session or uuid4()
        sealed = control.box.seal_env(
            dict(request.env or {}), organization_id=principal.organization_id, object_id=session_id
        )
        session = Session(session_id, principal.organization_id, clock.now(), request, sealed)
    wish = _Wish(session, request, new=new, share=share)
    attached = None
    if (living := control.live.find(session_key(session))) is not None and not lifecycle.ends(control, living):
        attached = _vm(living)
        await _attach(control, principal, attached, wish)
    entry = await (_bring_up if wait else _begin)(control, principal, wish)
    if entry is not attached and not wish.made:
        # Somebody else's request for the session made it meanwhile, of whatever shape that asked for.
        await _attach(control, principal, entry, wish)
    return entry.view


async def for_session(control: Control, principal: Principal, session: Session) -> VmEntry:
    """The session's VM, ready; made where it has none that lives. Raises as `create`."""
    return await _bring_up(control, principal, _Wish(session, session.request, new=False))


async def ready_entry(control: Control, principal: Principal, vm_id: str) -> VmEntry:
    """The VM, ready: one that sleeps is woken, one that failed is started again on its disk.

    Raises:
        VmNotFoundError: also for one that has ended, and for another organization's.
        InstanceNotReadyError, InstanceFailedError: it did not come up (in time).

    """
    entry = await existing_entry(control, principal, vm_id)
    if entry.ready:
        lifecycle.use(control, entry)
        return entry
    try:
        return _vm(await lifecycle.ready(control, principal, entry))
    except InstanceNotFoundError:
        raise VmNotFoundError from None


async def existing_entry(control: Control, principal: Principal, vm_id: str) -> VmEntry:
    """The living VM's entry in whatever state. Raises VmNotFoundError."""
    require(principal, Scope.ROOMS)
    parsed = parse_vm_id(vm_id)
    entry = None if parsed is None else control.live.by_instance(parsed[0])
    if (
        not isinstance(entry, VmEntry)
        or lifecycle.ends(control, entry)
        or entry.instance.organization_id != principal.organization_id
        or (parsed is not None and parsed[1] > entry.vm.generation)
    ):
        raise VmNotFoundError
    return entry


async def find(control: Control, principal: Principal, vm_id: str) -> VmView:
    """The VM, which may have ended. Raises VmNotFoundError."""
    require(principal, Scope.ROOMS)
    parsed = parse_vm_id(vm_id)
    if parsed is None:
        raise VmNotFoundError
    entry = control.live.by_instance(parsed[0])
    view = entry.view if isinstance(entry, VmEntry) else await _stored(control, parsed[0])
    if view is None or view.vm.organization_id != principal.organization_id or parsed[1] > view.vm.generation:
        raise VmNotFoundError
    return view


async def list_vms(
    control: Control, principal: Principal, *, living_only: bool, before: UUID | None = None, limit: int = PAGE_MAX
) -> list[VmView]:
    """The organization's VMs, newest first; `before` is the instance id of the last one of the page before."""
    require(principal, Scope.ROOMS)
    found = await control.database.read(
        store.page, principal.organization_id, living_only=living_only, before=before, limit=limit
    )
    views = [shown(control, vm, instance) for vm, instance in found]
    return [view for view in views if not living_only or view.instance.desired != "destroyed"]


async def change(control: Control, principal: Principal, vm_id: str, changes: Mapping[str, Any]) -> VmView:
    """The VM with `changes` (fields of VmRequest): `metadata` and times count at once, `memory_mb` from its next start on.

    Raises:
        VmNotFoundError, InvalidRequestError, ForbiddenError.
        RateLimitedError: the organization may not have so much memory; nothing is changed.

    """
    entry = await existing_entry(control, principal, vm_id)
    wanted = VmRequest(**changes)
    check(control, principal, wanted)
    if wanted.memory_mb is not None:
        await _reserve_memory(control, entry, wanted.memory_mb)
        # Whoever began to end it meanwhile writes its reason, which this must not write over.
        if lifecycle.ends(control, entry):
            raise VmNotFoundError
    vm = entry.vm
    if wanted.metadata is not None:
        vm = dataclasses.replace(vm, metadata=dict(wanted.metadata))
    if "idle_seconds" in changes:
        vm = dataclasses.replace(vm, idle_seconds=wanted.idle_seconds)
    if (lifetime := wanted.vm_lifetime_seconds) is not None:
        ends_at = clock.now() + timedelta(seconds=lifetime)
        # Not before a lease, which may be somebody else's.
        vm = dataclasses.replace(vm, lifetime_seconds=lifetime, expires_at=max(ends_at, vm.hold_until or ends_at))
    await _store_change(control, principal, entry, vm, "change", {"fields": ",".join(sorted(changes))})
    return entry.view


async def hold(control: Control, principal: Principal, vm_id: str, seconds: int, reason: str) -> VmView:
    """The VM, which lives at least that long, and is not idle until then. Asking again renews the lease; 0 gives it back.

    Raises:
        VmNotFoundError, InvalidRequestError.

    """
    if not 0 <= seconds <= HOLD_SECONDS_MAX:
        raise InvalidRequestError(f"seconds: must be between 0 and {HOLD_SECONDS_MAX}")
    if len(reason) > REASON_CHARACTERS_MAX:
        raise InvalidRequestError(f"reason: at most {REASON_CHARACTERS_MAX} characters")
    entry = await existing_entry(control, principal, vm_id)
    until = clock.now() + timedelta(seconds=seconds)
    vm = dataclasses.replace(
        entry.vm,
        hold_until=until if seconds else None,
        hold_reason=reason if seconds else None,
        expires_at=max(entry.vm.expires_at, until),
    )
    await _store_change(control, principal, entry, vm, "hold", {"seconds": str(seconds)})
    entry.announced_idle = None
    entry.note("held" if seconds else "released", reason, until=vm.expires_at.isoformat())
    return entry.view


async def stage_env(
    control: Control, principal: Principal, vm_id: str, env: Mapping[str, str], *, field: str = "env"
) -> VmView:
    """The VM, in which what begins from now on has these variables too. They are kept in memory alone: a restart of the server forgets them.

    `field` is what errors call them.

    Raises:
        VmNotFoundError, InvalidRequestError.

    """
    entry = await existing_entry(control, principal, vm_id)
    staged = {**entry.staged_env, **env}
    validate_env(staged, field)
    entry.staged_env = staged
    details = {"names": ",".join(sorted(env))[:1_000], **entry.marks}
    control.later.audit(audit.event(principal, "vm.stage_env", "instance", entry.instance.id, details))
    return entry.view


async def delete(control: Control, principal: Principal, vm_id: str) -> VmView:
    """The VM's record, after its guest is gone; one that has ended already stays as it is. Raises VmNotFoundError, UnavailableError."""
    view = await find(control, principal, vm_id)
    entry = control.live.by_instance(view.vm.instance_id)
    if entry is not None:
        await lifecycle.destroy(control, principal, entry)
    return await find(control, principal, vm_id)


def check(control: Control, principal: Principal, request: VmRequest) -> None:
    """Refuse what this server does not do. Raises InvalidRequestError, ForbiddenError."""
    longest = control.settings.vm_max_lifetime_seconds
    if request.vm_lifetime_seconds is not None and request.vm_lifetime_seconds > longest:
        # The dialect's clients read the number out of this sentence and ask again.
        raise ForbiddenError(f"VM lifetime cannot exceed {longest}s")
    image_of(control, principal.organization_id, request.image_variant)


def remember(control: Control, vm: Vm, instance: Instance) -> VmEntry:
    """A stored VM in memory."""
    host = control.hosts.get(instance.host_id)
    return _vm(control.live.add(VmEntry(vm, instance, host.host if host is not None else None, control.later.vm_event)))


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
    if wish.share is not None:
        await shares.ensure(control, principal, entry, wish.share)
    if request.env:
        await stage_env(control, principal, vm_id, request.env)
    changes = {
        name: value
        for name in ("metadata", "vm_lifetime_seconds", "idle_seconds")
        if (value := getattr(request, name)) is not None
    }
    if changes:
        await change(control, principal, vm_id, changes)


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

    return _vm(await lifecycle.bring_up(control, session_key(wish.session), work))


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
            return _vm(entry)
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
        return _vm(found)
    entry, lease = await _create(control, principal, wish)
    if committed is not None:
        entry.told = True
        committed()
    try:
        await provisioning.start(control, entry, lease)
    except NoHostError:
        if wish.new:
            # Nobody was told of the session either, unless the VM stayed.
            await control.database.write(session_store.delete_unused, wish.session.id)
        raise
    return entry


async def _create(control: Control, principal: Principal, wish: _Wish) -> tuple[VmEntry, UUID]:
    """A new VM with its lease, committed before any host hears of it."""
    settings, session = control.settings, wish.session
    wanted = wish.request.over(session.request)
    lifetime = wanted.vm_lifetime_seconds or settings.vm_lifetime_seconds
    spec = new_spec(
        session.organization_id,
        session.id,
        image=image_of(control, session.organization_id, wanted.image_variant),
        vcpu_count=wanted.vcpu_count or settings.vm_vcpus,
        memory_mb=wanted.memory_mb or settings.vm_memory_mb,
        disk_mb=settings.vm_disk_mb,
        wish=wanted.wish,
    )
    instance = provisioning.plan(control, spec, profile_id=session.id, host_id=None)
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
        egress_policy=wanted.egress_policy or EgressPolicy(),
        env_sealed=session.env_sealed if wish.new else _merged_env(control, session, wish.request),
    )
    share = None if wish.share is None else shares.plan(instance, wish.share)

    def insert(connection: sa.Connection) -> None:
        if wish.new:
            session_store.insert(connection, session)
        store.insert(connection, vm)
        store.insert_events(connection, event_of(vm, "created", ""))
        if share is not None:
            shares.insert(connection, principal, share, {"session_id": str(session.id)})

    event = audit.event(principal, "vm.create", "instance", instance.id, {"session_id": str(session.id)})
    lease = await provisioning.commit(control, instance, event, insert)
    control.expiry_hint.set()
    wish.made = True
    if share is not None:
        control.shares.put(share)
    return remember(control, vm, instance), lease


def _merged_env(control: Control, session: Session, request: VmRequest) -> bytes | None:
    if not request.env:
        return session.env_sealed
    ids = {"organization_id": session.organization_id, "object_id": session.id}
    env = {**control.box.open_env(session.env_sealed, **ids), **request.env}
    validate_env(env)
    return control.box.seal_env(env, **ids)


async def _reserve_memory(control: Control, entry: VmEntry, memory_mb: int) -> None:
    """Let the VM's next start have so much. Counted from now on, so that it finds its place in the organization's limit then."""
    organization = await provisioning.organization_of(control, entry.instance.organization_id)
    instance_id = entry.instance.id

    def reserve(connection: sa.Connection) -> None:
        _, before_mb = instances.usage(connection, entry.instance.organization_id)
        store.set_memory(connection, instance_id, memory_mb)
        _, after_mb = instances.usage(connection, entry.instance.organization_id)
        if after_mb > before_mb:
            provisioning.check_memory(organization, before_mb, more_mb=after_mb - before_mb)

    await control.database.write(reserve)
    entry.change_vm(dataclasses.replace(entry.vm, memory_mb=memory_mb))


async def _store_change(
    control: Control, principal: Principal, entry: VmEntry, vm: Vm, verb: str, details: dict[str, str]
) -> None:
    before = entry.vm
    # At once: whoever changes it next begins with this.
    entry.change_vm(vm)
    try:
        await control.database.write(store.update, vm)
    except Exception:
        # A full disk. What is not kept is not in force either, unless somebody changed it again meanwhile.
        if entry.vm is vm:
            entry.change_vm(before)
        raise
    event = audit.event(principal, f"vm.{verb}", "instance", vm.instance_id, {**details, **entry.marks})
    control.later.audit(event)
    control.expiry_hint.set()


async def _stored(control: Control, instance_id: UUID) -> VmView | None:
    found = await control.database.read(store.get, instance_id)
    return None if found is None else shown(control, *found)


def shown(control: Control, vm: Vm, instance: Instance) -> VmView:
    """A stored VM as a caller sees it."""
    # Memory is ahead of the database by the states that are written behind.
    entry = control.live.by_instance(instance.id)
    if isinstance(entry, VmEntry):
        return entry.view
    host = control.hosts.get(instance.host_id)
    return VmView(vm, instance, None if host is None else host.host)


def _vm(entry: Any) -> VmEntry:
    """The entry of a session's key, which is a VM's."""
    if not isinstance(entry, VmEntry):
        raise TypeError(f"a {entry.kind} where a VM was looked up")
    return entry
