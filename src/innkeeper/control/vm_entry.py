"""The VM as an entry of the live table."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from innkeeper.control import clock
from innkeeper.control.live_table import Entry, Key
from innkeeper.control.vm_shape import new_spec
from innkeeper.core.host import Host
from innkeeper.core.instance import Instance, InstanceState
from innkeeper.core.instance_spec import InstanceSpec
from innkeeper.core.vm import Session, Vm, VmEnd, VmEvent
from innkeeper.ids import uuid7
from innkeeper.store import vms as store


@dataclass(frozen=True, slots=True)
class VmView:
    """A VM as a caller sees it; one that has ended has no machine any more, but its record."""

    vm: Vm
    instance: Instance
    host: Host | None


class VmEntry(Entry):
    """A living VM. A session has at most one, so its key is the session's; its spec is its own."""

    __slots__ = ("_note", "announced", "announced_idle", "followers", "vm")

    kind = "vm"

    def __init__(self, vm: Vm, instance: Instance, host: Host | None, note: Callable[[VmEvent], None]) -> None:
        super().__init__(session_key(vm), instance, spec_of(vm, instance), host)
        self.vm = vm
        # The end that was announced: the moment, as it was then.
        self.announced: datetime | None = None
        # When it ends for being idle, as that was announced; in Unix seconds.
        self.announced_idle: float | None = None
        # Set whenever there may be a new event.
        self.followers: set[asyncio.Event] = set()
        self._note = note

    @property
    def view(self) -> VmView:
        """The VM as a caller sees it."""
        return VmView(self.vm, self.instance, self.host)

    @property
    def marks(self) -> dict[str, str]:
        """Its session."""
        return {"session_id": str(self.vm.session_id)}

    @property
    def held(self) -> bool:
        """Whether somebody's lease keeps it from being idle."""
        return self.vm.hold_until is not None and clock.now() < self.vm.hold_until

    def change(self, instance: Instance) -> None:
        """The instance's new form; what its user should know of is noted."""
        before, self.instance = self.instance.state, instance
        self._wake()
        if instance.state is before:
            return
        if instance.state is InstanceState.READY:
            self.note("ready", "started")
        elif instance.state is InstanceState.FAILED:
            self.note("failed", instance.failure or "")
        elif instance.state is InstanceState.STOPPED:
            self.note("stopped", "The machine is gone; the next use starts it again on its disk")

    def change_vm(self, vm: Vm) -> None:
        """The VM's new form."""
        self.vm = vm
        self.spec = spec_of(vm, self.instance)

    def at_restart(self, instance: Instance) -> Instance:
        """With the memory that was asked for since."""
        return dataclasses.replace(instance, memory_mb=self.vm.memory_mb)

    def store_end(self, connection: sa.Connection, reason: str) -> None:
        """Why it ended, for its record."""
        store.update(connection, dataclasses.replace(self.vm, end_reason=VmEnd(reason)))
        store.insert_events(connection, event_of(self.vm, "ending", reason))

    def note_end(self, reason: str) -> None:
        """Why it ended, as it is stored."""
        self.vm = dataclasses.replace(self.vm, end_reason=VmEnd(reason))

    def note(self, kind: str, reason: str, **details: str) -> None:
        """Something happened, or will."""
        self._note(event_of(self.vm, kind, reason, **details))
        self._wake()

    def removed(self) -> None:
        """It is no more: those who follow it hear of its end."""
        self._wake()

    def _wake(self) -> None:
        for follower in self.followers:
            follower.set()


def event_of(vm: Vm, kind: str, reason: str, **details: str) -> VmEvent:
    """An event of now."""
    return VmEvent(uuid7(), vm.instance_id, clock.now(), kind, reason, details)


def session_key(of: Vm | Session) -> Key:
    """What the living VM of a session is found by. No room has an empty id."""
    return (of.id if isinstance(of, Session) else of.session_id, "")


def spec_of(vm: Vm, instance: Instance) -> InstanceSpec:
    """What a VM is made and run with."""
    return dataclasses.replace(
        new_spec(
            vm.organization_id,
            vm.session_id,
            image=instance.image,
            vcpu_count=instance.vcpu_count,
            memory_mb=vm.memory_mb,
            disk_mb=instance.disk_mb,
            wish=vm.wish,
        ),
        idle_seconds=vm.idle_seconds,
        egress_policy=vm.egress_policy,
        env_sealed=vm.env_sealed,
    )


def vm_of(entry: Entry) -> VmEntry:
    """The entry of a session's key, which is a VM's."""
    if not isinstance(entry, VmEntry):
        raise TypeError(f"a {entry.kind} where a VM was looked up")
    return entry
