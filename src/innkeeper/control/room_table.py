"""The rooms in memory: what makes a warm request cost no database access."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from innkeeper.core.host import Host
from innkeeper.core.instance import Instance, InstanceState
from innkeeper.core.profile import Profile
from innkeeper.store.profiles import StoredProfile

Key = tuple[UUID, str]


@dataclass(frozen=True, slots=True)
class RoomView:
    """A room as a caller sees it. `profile.env` is empty: values are never shown."""

    instance: Instance
    profile: Profile
    room_id: str
    host: Host | None


class Entry:
    """One live room. `last_active` is in Unix seconds; `open_streams` counts calls that are going on in the guest."""

    __slots__ = ("host", "instance", "last_active", "open_streams", "room_id", "stored", "view")

    def __init__(self, instance: Instance, stored: StoredProfile, room_id: str, host: Host | None) -> None:
        self.instance = instance
        self.stored = stored
        self.room_id = room_id
        self.host = host
        self.last_active = (instance.last_active_at or instance.created_at).timestamp()
        self.open_streams = 0
        self.view = RoomView(instance, stored.profile, room_id, host)

    @property
    def key(self) -> Key:
        """What names the room."""
        return (self.instance.profile_id, self.room_id)

    @property
    def ready(self) -> bool:
        """Whether the guest can be asked right now."""
        return self.instance.state is InstanceState.READY

    def change(self, instance: Instance) -> None:
        """The instance's new form."""
        self.instance = instance
        self.view = RoomView(instance, self.stored.profile, self.room_id, self.host)


class RoomTable:
    """All live rooms of this server."""

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
        """The room of a pair."""
        return self._by_key.get(key)

    def by_instance(self, instance_id: UUID) -> Entry | None:
        """The room of an instance."""
        return self._by_id.get(instance_id)

    def by_public_id(self, public_id: UUID) -> Entry | None:
        """The room of an instance's public id."""
        return self._by_public_id.get(public_id)

    def add(self, entry: Entry) -> Entry:
        """Remember a room; the entry that counts, which is an older one of the same instance where there is one."""
        known = self._by_id.get(entry.instance.id)
        if known is not None:
            return known
        self._by_id[entry.instance.id] = entry
        self._by_public_id[entry.instance.public_id] = entry
        self._by_key[entry.key] = entry
        return entry

    def remove(self, entry: Entry) -> None:
        """Forget a room."""
        self._by_id.pop(entry.instance.id, None)
        self._by_public_id.pop(entry.instance.public_id, None)
        if self._by_key.get(entry.key) is entry:
            del self._by_key[entry.key]
        self._touched.discard(entry.instance.id)

    def set_profile(self, stored: StoredProfile) -> None:
        """A profile changed: its rooms show the new one."""
        for entry in self:
            if entry.instance.profile_id == stored.profile.id:
                entry.stored = stored
                entry.change(entry.instance)

    def set_host(self, host: Host) -> None:
        """A host changed: its rooms show the new one."""
        for entry in self:
            if entry.instance.host_id == host.id:
                entry.host = host
                entry.change(entry.instance)

    def touch(self, entry: Entry) -> None:
        """The room is being used now."""
        entry.last_active = time.time()
        self._touched.add(entry.instance.id)

    def take_touched(self) -> dict[UUID, datetime]:
        """When the rooms that were used since the last call were used last."""
        touched, self._touched = self._touched, set()
        return {
            instance_id: datetime.fromtimestamp(entry.last_active, UTC)
            for instance_id in touched
            if (entry := self._by_id.get(instance_id)) is not None
        }
