"""Rooms: get or create, find, list, destroy."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa

from innkeeper.control import audit, lifecycle, profiles, provisioning
from innkeeper.control.access import require
from innkeeper.control.live_table import Entry
from innkeeper.control.room_entry import RoomEntry, RoomView
from innkeeper.core.instance import Instance
from innkeeper.core.instance_spec import spec_of_profile
from innkeeper.core.room import Room, validate_room_id
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import HostMismatchError, InstanceNotFoundError, InvalidRequestError, ProfileNotFoundError
from innkeeper.store import profiles as profile_store
from innkeeper.store import rooms as store
from innkeeper.store.profiles import StoredProfile

if TYPE_CHECKING:
    from innkeeper.control.context import Control

PAGE_MAX = 1_000


async def get_or_create(
    control: Control, principal: Principal, profile_id: UUID, room_id: str, *, host_id: UUID | None = None
) -> RoomView:
    """The room, ready. The same pair is the same instance, always; a failed room is restarted on its disk.

    Raises:
        ProfileNotFoundError: also for a profile of another organization.
        HostMismatchError: the room lives on another host than `host_id`.
        NoHostError: no host can take it, or `host_id` is unknown or full.
        RateLimitedError: a limit of the organization.
        InstanceNotReadyError: it takes longer than the wait limit; it goes on coming up.
        InstanceFailedError: it did not come up.

    """
    return (await ready_entry(control, principal, profile_id, room_id, host_id=host_id)).view


async def ready_entry(
    control: Control, principal: Principal, profile_id: UUID, room_id: str, *, host_id: UUID | None = None
) -> RoomEntry:
    """What `get_or_create` gives, as the entry of the live table: the hot path of every command."""
    entry = control.live.find((profile_id, room_id))
    if (
        isinstance(entry, RoomEntry)
        and entry.ready
        and not lifecycle.ends(control, entry)
        and entry.instance.organization_id == principal.organization_id
        and (host_id is None or host_id == entry.instance.host_id)
        and principal.allows(Scope.ROOMS)
    ):
        lifecycle.use(control, entry)
        return entry
    require(principal, Scope.ROOMS)
    validate_room_id(room_id)
    stored = await profiles.load(control, principal, profile_id)
    return await _bring_up(control, principal, stored, room_id, host_id)


async def existing_entry(control: Control, principal: Principal, profile_id: UUID, room_id: str) -> RoomEntry:
    """The room's entry in whatever state. Raises InstanceNotFoundError; nothing is made."""
    require(principal, Scope.ROOMS)
    validate_room_id(room_id)
    stored = await profiles.load(control, principal, profile_id)
    entry = _in_memory(control, profile_id, room_id) or await load(control, stored, room_id)
    if entry is None or entry.doomed:
        raise InstanceNotFoundError
    return entry


async def _bring_up(
    control: Control, principal: Principal, stored: StoredProfile, room_id: str, host_id: UUID | None
) -> RoomEntry:
    key = (stored.profile.id, room_id)
    entry = control.live.find(key)
    if entry is not None and host_id not in (None, entry.instance.host_id):
        raise HostMismatchError
    found = await lifecycle.bring_up(control, key, lambda: _provision(control, principal, stored, room_id, host_id))
    # The flight may have been another's, who asked for another host.
    if host_id not in (None, found.instance.host_id):
        raise HostMismatchError
    return _room(found)


async def _provision(
    control: Control, principal: Principal, stored: StoredProfile, room_id: str, host_id: UUID | None
) -> RoomEntry:
    """The room, ready: made, restarted on its disk, or found so."""
    entry = _in_memory(control, stored.profile.id, room_id)
    if entry is None and not control.database.exclusive:
        # The only process on a database has all rooms in memory, and the row's key is there for one that has not.
        entry = await load(control, stored, room_id)
    if entry is not None and entry.doomed:
        await provisioning.take_down(control, principal, entry)
        entry = None
    lease: UUID | None = None
    if entry is None:
        entry, lease = await _create(control, principal, stored, room_id, host_id)
    if host_id not in (None, entry.instance.host_id):
        raise HostMismatchError
    if lease is None:
        await provisioning.bring_up(control, principal, entry)
    else:
        await provisioning.start(control, entry, lease)
    return entry


async def _create(
    control: Control, principal: Principal, stored: StoredProfile, room_id: str, host_id: UUID | None
) -> tuple[RoomEntry, UUID | None]:
    """A new room, its row committed and leased, before any host hears of it; or the one that another process just made, without a lease."""
    profile = stored.profile
    spec = spec_of_profile(profile, stored.env_sealed)
    instance = provisioning.plan(control, spec, profile_id=profile.id, host_id=host_id)
    room = Room(profile.id, room_id, instance.id, instance.created_at)
    event = audit.event(
        principal, "room.create", "instance", instance.id, {"profile_id": str(profile.id), "room_id": room_id}
    )
    try:
        lease = await provisioning.commit(control, instance, event, lambda connection: store.insert(connection, room))
    except sa.exc.IntegrityError:
        entry = await load(control, stored, room_id)
        if entry is None:
            # Not the pair, so it was the profile: it went away at this moment.
            control.profiles.pop(profile.id, None)
            raise ProfileNotFoundError from None
        return entry, None
    return remember(control, stored, room, instance), lease


async def load(control: Control, stored: StoredProfile, room_id: str) -> RoomEntry | None:
    """The room from the database into memory: one that another process made."""
    found = await control.database.read(store.get, stored.profile.id, room_id)
    return None if found is None else remember(control, stored, found[0], found[1])


async def load_public(control: Control, public_id: UUID) -> RoomEntry | None:
    """The room of an instance's public id from the database into memory."""
    found = await control.database.read(store.by_public_id, public_id)
    if found is None:
        return None
    room, instance = found
    stored = control.profiles.get(room.profile_id) or await control.database.read(profile_store.get, room.profile_id)
    return None if stored is None else remember(control, stored, room, instance)


def remember(control: Control, stored: StoredProfile, room: Room, instance: Instance) -> RoomEntry:
    """A stored room in memory."""
    host = control.hosts.get(instance.host_id)
    return _room(control.live.add(RoomEntry(instance, stored, room.room_id, host.host if host is not None else None)))


def _in_memory(control: Control, profile_id: UUID, room_id: str) -> RoomEntry | None:
    entry = control.live.find((profile_id, room_id))
    return None if entry is None else _room(entry)


def _room(entry: Entry) -> RoomEntry:
    """The entry of a room's key or row, which is a room's."""
    if not isinstance(entry, RoomEntry):
        raise TypeError(f"a {entry.kind} where a room was looked up")
    return entry


async def find(control: Control, principal: Principal, profile_id: UUID, room_id: str) -> RoomView:
    """The room with its boot trace and isolation, in whatever state. Raises InstanceNotFoundError; nothing is made."""
    return (await existing_entry(control, principal, profile_id, room_id)).view


async def find_instance(control: Control, principal: Principal, instance_id: UUID) -> RoomView:
    """The room of an instance's public or internal id. Raises InstanceNotFoundError."""
    return entry_of_instance(control, principal, instance_id).view


def entry_of_instance(control: Control, principal: Principal, instance_id: UUID) -> RoomEntry:
    """The entry of the room of an instance's public or internal id, in whatever state. Raises InstanceNotFoundError."""
    require(principal, Scope.ROOMS)
    entry = control.live.by_public_id(instance_id) or control.live.by_instance(instance_id)
    if not isinstance(entry, RoomEntry) or entry.instance.organization_id != principal.organization_id:
        raise InstanceNotFoundError
    return entry


async def list_of_profile(
    control: Control, principal: Principal, profile_id: UUID, *, after: UUID | None = None, limit: int = PAGE_MAX
) -> list[RoomView]:
    """A profile's rooms, oldest first; `after` is the internal instance id of the last one of the page before."""
    require(principal, Scope.ROOMS)
    await profiles.load(control, principal, profile_id)
    return await _page(control, principal, profile_id, after, limit)


async def list_all(
    control: Control, principal: Principal, *, after: UUID | None = None, limit: int = PAGE_MAX
) -> list[RoomView]:
    """The organization's rooms, oldest first; `after` as for `list_of_profile`."""
    require(principal, Scope.ROOMS)
    return await _page(control, principal, None, after, limit)


async def _page(
    control: Control, principal: Principal, profile_id: UUID | None, after: UUID | None, limit: int
) -> list[RoomView]:
    if not 1 <= limit <= PAGE_MAX:
        raise InvalidRequestError(f"limit: must be between 1 and {PAGE_MAX}")
    found = await control.database.read(
        store.page, principal.organization_id, profile_id=profile_id, after=after, limit=limit
    )
    views = []
    for room, instance in found:
        # Memory is ahead of the database by the states that are written behind.
        entry = control.live.by_instance(instance.id)
        if not isinstance(entry, RoomEntry):
            stored = await profiles.load(control, principal, room.profile_id)
            host = control.hosts.get(instance.host_id)
            views.append(RoomView(instance, stored.profile, room.room_id, host.host if host is not None else None))
        elif not entry.doomed:
            views.append(entry.view)
    return views


async def destroy(control: Control, principal: Principal, profile_id: UUID, room_id: str) -> None:
    """Remove the room with its disk; answers when the guest is gone.

    Raises:
        InstanceNotFoundError: there is no such room (any more).
        UnavailableError: its host cannot be asked now; the room is gone all the same as soon as it can.

    """
    require(principal, Scope.ROOMS)
    validate_room_id(room_id)
    stored = await profiles.load(control, principal, profile_id)
    key = (profile_id, room_id)
    while (flight := control.flights.get(key)) is not None:
        await asyncio.wait({flight.future})
        if flight.kind == "down" and flight.future.exception() is None:
            return
    entry = _in_memory(control, profile_id, room_id) or await load(control, stored, room_id)
    if entry is None:
        raise InstanceNotFoundError
    await lifecycle.destroy(control, principal, entry)
