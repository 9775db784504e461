"""The room as an entry of the live table."""

from __future__ import annotations

from dataclasses import dataclass

from innkeeper.control.live_table import Entry, LiveTable
from innkeeper.core.host import Host
from innkeeper.core.instance import Instance
from innkeeper.core.instance_spec import spec_of_profile
from innkeeper.core.profile import Profile
from innkeeper.store.profiles import StoredProfile


@dataclass(frozen=True, slots=True)
class RoomView:
    """A room as a caller sees it. `profile.env` is empty: values are never shown."""

    instance: Instance
    profile: Profile
    room_id: str
    host: Host | None


class RoomEntry(Entry):
    """A living room: its handle is the pair of profile and room id, its spec is the profile's."""

    __slots__ = ("profile", "room_id", "view")

    kind = "room"

    def __init__(self, instance: Instance, stored: StoredProfile, room_id: str, host: Host | None) -> None:
        spec = spec_of_profile(stored.profile, stored.env_sealed)
        super().__init__((stored.profile.id, room_id), instance, spec, host)
        self.profile = stored.profile
        self.room_id = room_id
        self.view = RoomView(instance, stored.profile, room_id, host)

    def change(self, instance: Instance) -> None:
        """The instance's new form."""
        self.instance = instance
        self.view = RoomView(instance, self.profile, self.room_id, self.host)


def show_profile(live: LiveTable, stored: StoredProfile) -> None:
    """A profile changed: its rooms are run with the new one, and show it."""
    spec = spec_of_profile(stored.profile, stored.env_sealed)
    for entry in live:
        if isinstance(entry, RoomEntry) and entry.profile.id == stored.profile.id:
            entry.profile, entry.spec = stored.profile, spec
            entry.change(entry.instance)
