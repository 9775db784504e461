"""VMs: create, find, list, change, hold, delete."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa

from innkeeper.control import audit, clock, lifecycle, provisioning
from innkeeper.control.access import require
from innkeeper.control.vm_entry import VmEntry, VmView, vm_of
from innkeeper.control.vm_shape import image_of
from innkeeper.core.instance import Instance, InstanceState
from innkeeper.core.profile import validate_env
from innkeeper.core.token import Principal, Scope
from innkeeper.core.vm import (
    HOLD_SECONDS_MAX,
    REASON_CHARACTERS_MAX,
    Vm,
    VmRequest,
    parse_vm_id,
)
from innkeeper.errors import (
    ForbiddenError,
    InstanceNotFoundError,
    InvalidRequestError,
    VmNotFoundError,
)
from innkeeper.store import instances
from innkeeper.store import vms as store

if TYPE_CHECKING:
    from innkeeper.control.context import Control

PAGE_MAX = 1_000


async def ready_entry(control: Control, principal: Principal, vm_id: str) -> VmEntry:
    """The VM, ready: one that sleeps is woken, one that failed is started again on its disk.

    Raises:
        VmNotFoundError: also for one that has ended, and for another organization's.
        InstanceNotReadyError, InstanceFailedError: it did not come up (in time).
        InstanceSuspendedError: it is suspended, and its use does not wake it.

    """
    entry = await existing_entry(control, principal, vm_id)
    if entry.ready:
        lifecycle.use(control, entry)
        return entry
    try:
        return vm_of(await lifecycle.ready(control, principal, entry))
    except InstanceNotFoundError:
        raise VmNotFoundError from None


async def remembering_entry(control: Control, principal: Principal, vm_id: str) -> VmEntry:
    """The VM, ready, or suspended as it is: either has a memory that can be kept. Raises as `ready_entry`."""
    entry = await existing_entry(control, principal, vm_id)
    if (flight := control.flights.get(entry.key)) is not None and flight.kind == "suspend":
        await lifecycle.over(flight)
    if entry.instance.state is InstanceState.SUSPENDED and control.flights.get(entry.key) is None:
        lifecycle.use(control, entry)
        return entry
    return await ready_entry(control, principal, vm_id)


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
    if wanted.snapshot_on_terminate is not None:
        vm = dataclasses.replace(vm, snapshot_on_terminate=wanted.snapshot_on_terminate)
    if "snapshot_name" in changes:
        vm = dataclasses.replace(vm, snapshot_name=wanted.snapshot_name)
    if wanted.auto_suspend is not None:
        vm = dataclasses.replace(vm, auto_suspend=wanted.auto_suspend)
    if wanted.auto_resume is not None:
        vm = dataclasses.replace(vm, auto_resume=wanted.auto_resume)
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


async def put_off_end(control: Control, entry: VmEntry, seconds: timedelta) -> None:
    """Have a VM live so long from now on, at least."""
    ends_at = max(entry.vm.expires_at, clock.now() + seconds)
    entry.change_vm(dataclasses.replace(entry.vm, expires_at=ends_at))
    control.live.touch(entry)
    await control.database.write(store.update, entry.vm)
    control.expiry_hint.set()


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
    if request.snapshot_id is None:
        # A snapshot stands on an image of its own.
        image_of(control, principal.organization_id, request.image_variant)


def remember(control: Control, vm: Vm, instance: Instance) -> VmEntry:
    """A stored VM in memory."""
    host = control.hosts.get(instance.host_id)
    return vm_of(
        control.live.add(VmEntry(vm, instance, host.host if host is not None else None, control.later.vm_event))
    )


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
