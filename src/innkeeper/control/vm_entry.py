"""The VM as an entry of the live table."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa

from innkeeper.control import clock
from innkeeper.control.live_table import Entry, Key
from innkeeper.control.vm_shape import new_spec
from innkeeper.core.host import Host
from innkeeper.core.instance import Instance, InstanceState
from innkeeper.core.instance_spec import InstanceSpec
from innkeeper.core.vm import Session, Vm, VmEnd, VmEvent
from innkeeper.core.volume import Mount
from innkeeper.ids import uuid7
from innkeeper.store import vms as store

if TYPE_CHECKING:
    from innkeeper.control.context import Control


@dataclass(frozen=True, slots=True)
class VmView:
    """A VM as a caller sees it; one that has ended has no machine any more, but its record."""

    vm: Vm
    instance: Instance
    host: Host | None


class VmEntry(Entry):
    """A living VM. A session has at most one, so its key is the session's; its spec is its own."""

    __slots__ = ("_note", "announced", "announced_idle", "followers", "mounting", "mounts", "vm")

    kind = "vm"

    def __init__(self, vm: Vm, instance: Instance, host: Host | None, note: Callable[[VmEvent], None]) -> None:
        super().__init__(session_key(vm), instance, spec_of(vm, instance), host)
        self.vm = vm
        # What it has of volumes, by what their hosts call them, and held while that changes.
        self.mounts: dict[UUID, Mount] = {}
        self.mounting = asyncio.Lock()
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

    @property
    def origin(self) -> UUID | None:
        """The snapshot that it is still to begin with."""
        return None if self.vm.restored is not None else self.vm.snapshot_id

    @property
    def demanding(self) -> bool:
        """A snapshot or a volume may not be for it."""
        return self.origin is not None or bool(self.mounts)

    async def begun(self, control: Control, *, with_memory: bool, reason: str) -> None:
        """It has begun with its snapshot: stored, so that its next start is on its own disk."""
        restored = "memory" if with_memory else "disk"
        # At once: whoever changes it next begins with this.
        self.change_vm(dataclasses.replace(self.vm, restored=restored))
        await control.database.write(store.update, self.vm)
        self.note("restored", reason, snapshot_id=str(self.vm.snapshot_id), what=restored)

    @property
    def sleeps_on(self) -> bool:
        """Whether it is suspended, and only whoever asks for that wakes it."""
        return self.instance.state is InstanceState.SUSPENDED and not self.vm.auto_resume

    @property
    def lasts(self) -> bool:
        """Whether its time stands still: it is suspended, or would be at its end and has nothing that runs."""
        if self.instance.state in (InstanceState.SUSPENDING, InstanceState.SUSPENDED):
            return True
        return self.vm.auto_suspend and self.instance.state in (InstanceState.STOPPED, InstanceState.FAILED)

    async def came_up(
        self, control: Control, before: InstanceState, *, by: str, woken: Mapping[str, Any] | None
    ) -> None:
        """One that was suspended begins a lifetime anew. Where its memory could not be used, the event says why."""
        vm, now = self.vm, clock.now()
        slept = before is InstanceState.SUSPENDED or (before is InstanceState.SUSPENDING and woken is not None)
        if not slept and not (vm.auto_suspend and vm.expires_at <= now):
            return
        ends_at = now + timedelta(seconds=vm.lifetime_seconds)
        vm = dataclasses.replace(
            vm, expires_at=max(ends_at, vm.hold_until or ends_at), suspend_reason=None, woken_by=by
        )
        # At once: whoever changes it next begins with this.
        self.change_vm(vm)
        self.announced_idle = None
        await control.database.write(store.update, vm)
        control.expiry_hint.set()
        if slept:
            kept = woken is not None and bool(woken.get("with_memory"))
            reason = "" if kept else str((woken or {}).get("reason") or "Its memory is not on the host any more")
            self.note("resumed", reason, by=by, memory="kept" if kept else "lost")

    def change(self, instance: Instance) -> None:
        """The instance's new form; what its user should know of is noted."""
        before, self.instance = self.instance.state, instance
        self._wake()
        if instance.state is before:
            return
        if before is InstanceState.SUSPENDING or instance.state in (InstanceState.SUSPENDING, InstanceState.SUSPENDED):
            # Told by whoever suspends it, with the reason.
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
