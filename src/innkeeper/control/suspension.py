"""Suspending instances, and waking them where somebody asks for it: their memory waits on the host's disk, and their processors and memory are free."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa

from innkeeper.control import audit, clock, lifecycle, mount_work, provisioning
from innkeeper.control.live_table import Entry
from innkeeper.control.vm_entry import VmEntry, VmView, vm_of
from innkeeper.control.vms import existing_entry
from innkeeper.core.checkpoint_verbs import SuspendMachine
from innkeeper.core.host_verbs import ListMachines, to_wire
from innkeeper.core.instance import InstanceState, transition
from innkeeper.core.token import Principal
from innkeeper.errors import (
    ConflictError,
    InnkeeperError,
    InstanceNotFoundError,
    NotHereError,
    UnavailableError,
    VmNotFoundError,
)
from innkeeper.store import audit_events, instances, leases
from innkeeper.store import vms as store
from innkeeper.store.tables import instances as instances_table

if TYPE_CHECKING:
    from innkeeper.control.context import Control

# All of a guest's memory is written, beside what else the host is doing.
SUSPEND_SECONDS = 600.0
LIST_SECONDS = 30.0
ASKED = "asked"


async def suspend(control: Control, principal: Principal, vm_id: str) -> VmView:
    """The VM, suspended. Safe to repeat; one without a machine stays as it is.

    Raises:
        VmNotFoundError.
        ConflictError: it failed, or cannot be suspended as it is, with the reason; it goes on then.
        UnavailableError: the host has no room for its memory, or cannot be asked; it goes on, or is suspended a little later.

    """
    entry = await existing_entry(control, principal, vm_id)
    await sleep(control, principal, entry, ASKED)
    if lifecycle.ends(control, entry):
        raise VmNotFoundError
    return entry.view


async def sleep(control: Control, principal: Principal, entry: VmEntry, reason: str) -> None:
    """Suspend a VM, after what is going on with it; joins one that suspends it already. Raises as `suspend`."""
    while (flight := control.flights.get(entry.key)) is not None:
        await lifecycle.over(flight)
        if flight.kind == "suspend":
            flight.future.result()
    if entry.instance.state is InstanceState.FAILED:
        raise ConflictError(f"The {entry.kind} has failed: there is no memory to keep")
    if not entry.ready or control.live.find(entry.key) is not entry:
        return
    flight = control.flights.start(entry.key, "suspend", lambda: put_to_sleep(control, principal, entry, reason))
    await lifecycle.over(flight)
    flight.future.result()


async def resume(control: Control, principal: Principal, vm_id: str, *, wait: bool = True) -> VmView:
    """The VM, ready, under a new id if it was suspended; the older ones go on naming it. Without `wait` it is on its way up.

    Raises:
        VmNotFoundError.
        NoHostError, UnavailableError: it cannot be woken now, and stays suspended.
        InstanceNotReadyError: it takes longer than the wait limit; it goes on coming up.
        InstanceFailedError: it did not come up.

    """
    entry = await existing_entry(control, principal, vm_id)
    if (flight := control.flights.get(entry.key)) is not None and flight.kind == "suspend":
        await lifecycle.over(flight)
    if entry.instance.state is InstanceState.SUSPENDED:
        # Before it comes up: whoever asked and heard nothing finds it by the id that it knows.
        entry.change_vm(dataclasses.replace(entry.vm, generation=entry.vm.generation + 1))
        await control.database.write(store.update, entry.vm)
    if not entry.ready:
        if wait:
            try:
                await lifecycle.ready(control, principal, entry, asked=True)
            except InstanceNotFoundError:
                raise VmNotFoundError from None
        elif control.flights.get(entry.key) is None:
            lifecycle.check_drain(entry)
            control.flights.start(entry.key, "up", lambda: provisioning.bring_up(control, principal, entry))
    return vm_of(entry).view


async def put_to_sleep(control: Control, principal: Principal, entry: Entry, reason: str) -> Entry:
    """The work of a flight: the instance, suspended. What is begun here is finished by the reconciler if this is cut short."""
    if not isinstance(entry, VmEntry):
        raise TypeError(f"a {entry.kind} is not suspended")
    await control.later.flush(control)
    before = entry.instance
    asleep = dataclasses.replace(
        transition(before, InstanceState.SUSPENDING), desired="suspended", revision=before.revision + 1
    )
    vm = dataclasses.replace(
        entry.vm, suspend_reason=reason if before.state is InstanceState.READY else entry.vm.suspend_reason
    )

    def claim(connection: sa.Connection) -> UUID | None:
        token = leases.take(connection, instances_table, before.id, now=clock.now(), ttl_seconds=SUSPEND_SECONDS + 30)
        if token is not None:
            leases.apply(connection, instances_table, before.id, token, instances.state_values(asleep), release=False)
            store.update(connection, vm)
            if before.state is InstanceState.READY:
                event = audit.event(principal, "vm.suspend", "instance", before.id, {"reason": reason, **entry.marks})
                audit_events.insert(connection, event)
        return token

    lease = await control.database.write(claim)
    if lease is None:
        raise UnavailableError("The VM is being worked on by another process")
    entry.change(asleep)
    entry.change_vm(vm)
    try:
        await _ask(control, entry)
    except InstanceNotFoundError:
        # The machine is gone without a word, with its memory.
        _settle(control, entry, InstanceState.READY, "running", lease)
        provisioning.mark_lost(control, entry)
        raise ConflictError("The VM has no machine any more: there is no memory to keep") from None
    except (ConflictError, NotHereError) as error:
        _settle(control, entry, InstanceState.READY, "running", lease)
        entry.note("suspend_failed", error.message)
        raise
    except BaseException as error:
        if isinstance(error, UnavailableError) and await _runs(control, entry):
            _settle(control, entry, InstanceState.READY, "running", lease)
            entry.note("suspend_failed", error.message)
            raise
        # Whether it is suspended nobody knows; it is asked for again, which does no harm.
        control.later.state(entry.instance, lease)
        control.reconcile_hint.set()
        raise
    _settle(control, entry, InstanceState.SUSPENDED, "suspended", lease)
    entry.note("suspended", entry.vm.suspend_reason or "")
    return entry


async def _ask(control: Control, entry: VmEntry) -> None:
    host_id = entry.instance.host_id
    if host_id is None:
        raise InstanceNotFoundError
    request = SuspendMachine(entry.instance.id)
    # They are no part of its memory, and its own again when it comes up.
    async with mount_work.set_aside(control, entry, for_good=True):
        await control.bus.request(host_id, request.verb, to_wire(request), timeout_seconds=SUSPEND_SECONDS)


async def _runs(control: Control, entry: VmEntry) -> bool:
    """Whether the host says that the instance has a machine. False also where it says nothing."""
    if entry.instance.host_id is None:
        return False
    try:
        answer = await control.bus.request(
            entry.instance.host_id, ListMachines.verb, to_wire(ListMachines()), timeout_seconds=LIST_SECONDS
        )
    except InnkeeperError:
        return False
    wanted = str(entry.instance.id)
    return any(machine["instance_id"] == wanted and machine["ready"] for machine in answer["machines"])


def _settle(control: Control, entry: VmEntry, state: InstanceState, desired: str, lease: UUID) -> None:
    entry.change(dataclasses.replace(transition(entry.instance, state), desired=desired))
    control.later.state(entry.instance, lease)
