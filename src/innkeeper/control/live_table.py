"""The living instances in memory: what makes a warm request cost no database access."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.host import Host
from innkeeper.core.instance import Instance, InstanceState
from innkeeper.core.instance_spec import InstanceSpec

if TYPE_CHECKING:
    from innkeeper.control.context import Control

Key = tuple[UUID, str]


class Entry:
    """One living instance, whatever its handle is; a kind of handle extends it.

    `key` is what the handle is found by, and what its flights are told apart by. `last_active` is in Unix seconds; `open_streams` counts what is going
    on in the guest for somebody outside.
    """

    __slots__ = ("host", "instance", "key", "last_active", "open_streams", "spec", "staged_env", "told")

    kind: ClassVar[str]
    """What users call it, in audit events and messages."""

    def __init__(self, key: Key, instance: Instance, spec: InstanceSpec, host: Host | None) -> None:
        self.key = key
        self.instance = instance
        self.spec = spec
        self.host = host
        self.last_active = (instance.last_active_at or instance.created_at).timestamp()
        self.open_streams = 0
        # Variables for what is begun from now on; never stored.
        self.staged_env: dict[str, str] = {}
        # Whether a client has been given its id before it was ready: then it is not forgotten when it does not come up.
        self.told = False

    @property
    def ready(self) -> bool:
        """Whether the guest can be asked right now."""
        return self.instance.state is InstanceState.READY

    @property
    def doomed(self) -> bool:
        """Whether it is being destroyed, or was."""
        return self.instance.desired == "destroyed"

    @property
    def origin(self) -> UUID | None:
        """The checkpoint that its machine is still to begin with."""
        return None

    @property
    def demanding(self) -> bool:
        """Whether it asks for what a host may refuse for good."""
        return False

    async def begun(self, control: Control, *, with_memory: bool, reason: str) -> None:
        """It has begun with its origin; `reason` is why not with the memory."""

    @property
    def sleeps_on(self) -> bool:
        """Whether it is suspended, and only whoever asks for that wakes it."""
        return False

    async def came_up(
        self, control: Control, before: InstanceState, *, by: str, woken: Mapping[str, Any] | None
    ) -> None:
        """It has come up, `by` somebody's use, from what it was `before`; `woken` is what its host says of the memory of one that was suspended."""

    def environment(self, own: Mapping[str, str] | None = None) -> dict[str, str]:
        """What a program that is begun now gets beside its instance's variables: those that were staged, and its own, which win."""
        return {**self.staged_env, **(own or {})}

    @property
    def marks(self) -> dict[str, str]:
        """What audit events about the instance, and about what is in it, say of its handle."""
        return {}

    def change(self, instance: Instance) -> None:
        """The instance's new form."""
        self.instance = instance

    def at_restart(self, instance: Instance) -> Instance:
        """The instance as its next machine is to be: what it was made with, where its handle does not say otherwise."""
        return instance

    def removed(self) -> None:
        """The live table has forgotten it."""

    def store_end(self, connection: sa.Connection, reason: str) -> None:
        """Store with the decision to destroy it what the handle keeps of its end. Runs in the database's thread, and may be rolled back."""

    def note_end(self, reason: str) -> None:
        """The decision to destroy it is stored."""


class LiveTable:
    """All living instances of this server that have a handle."""

    def __init__(self) -> None:
        self._by_key: dict[Key, Entry] = {}
        self._by_id: dict[UUID, Entry] = {}
        self._by_public_id: dict[UUID, Entry] = {}
        self._touched: set[UUID] = set()

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._by_id.values()))

    def __len__(self) -> int:
        return len(self._by_id)

    def find(self, key: Key) -> Entry | None:
        """The entry of a handle."""
        return self._by_key.get(key)

    def by_instance(self, instance_id: UUID) -> Entry | None:
        """The entry of an instance."""
        return self._by_id.get(instance_id)

    def by_public_id(self, public_id: UUID) -> Entry | None:
        """The entry of an instance's public id."""
        return self._by_public_id.get(public_id)

    def add(self, entry: Entry) -> Entry:
        """Remember an entry; the one that counts, which is an older one of the same instance where there is one."""
        known = self._by_id.get(entry.instance.id)
        if known is not None:
            return known
        self._by_id[entry.instance.id] = entry
        self._by_public_id[entry.instance.public_id] = entry
        self._by_key[entry.key] = entry
        return entry

    def remove(self, entry: Entry) -> None:
        """Forget an entry."""
        self._by_id.pop(entry.instance.id, None)
        self._by_public_id.pop(entry.instance.public_id, None)
        if self._by_key.get(entry.key) is entry:
            del self._by_key[entry.key]
        self._touched.discard(entry.instance.id)
        entry.removed()

    def set_host(self, host: Host) -> None:
        """A host changed: its instances show the new one."""
        for entry in self:
            if entry.instance.host_id == host.id:
                entry.host = host
                entry.change(entry.instance)

    def touch(self, entry: Entry) -> None:
        """The instance is being used now."""
        entry.last_active = time.time()
        self._touched.add(entry.instance.id)

    def take_touched(self) -> dict[UUID, datetime]:
        """When the instances that were used since the last call were used last."""
        touched, self._touched = self._touched, set()
        return {
            instance_id: datetime.fromtimestamp(entry.last_active, UTC)
            for instance_id in touched
            if (entry := self._by_id.get(instance_id)) is not None
        }
