"""Rooms: get or create, find, list, destroy."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from uuid import UUID

from structlog.contextvars import bind_contextvars

from innkeeper.control import clock, profiles, provisioning
from innkeeper.control.access import require
from innkeeper.control.flights import Flight
from innkeeper.control.room_table import Entry, RoomView
from innkeeper.core.instance import InstanceState
from innkeeper.core.room import validate_room_id
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import (
    HostDrainingError,
    HostMismatchError,
    InstanceFailedError,
    InstanceNotFoundError,
    InstanceNotReadyError,
    InvalidRequestError,
)
from innkeeper.store import rooms as store
from innkeeper.store.profiles import StoredProfile

if TYPE_CHECKING:
    from innkeeper.control.context import Control

__all__ = ["RoomView", "destroy", "find", "get_or_create", "list_all", "list_of_profile"]

PAGE_MAX = 1_000
# What a request leaves for the log: the edge takes it away again.
INSTANCE_ID = "instance_id"


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
) -> Entry:
    """What `get_or_create` gives, as the entry of the room table: the hot path of every command."""
    entry = control.rooms.find((profile_id, room_id))
    if (
        entry is not None
        and entry.ready
        and entry.instance.organization_id == principal.organization_id
        and (host_id is None or host_id == entry.instance.host_id)
        and principal.allows(Scope.ROOMS)
    ):
        _use(control, entry)
        return entry
    require(principal, Scope.ROOMS)
    validate_room_id(room_id)
    stored = await profiles.load(control, principal, profile_id)
    return await _bring_up(control, principal, stored, room_id, host_id)


async def existing_entry(control: Control, principal: Principal, profile_id: UUID, room_id: str) -> Entry:
    """The room's entry in whatever state. Raises InstanceNotFoundError; nothing is made."""
    require(principal, Scope.ROOMS)
    validate_room_id(room_id)
    stored = await profiles.load(control, principal, profile_id)
    entry = control.rooms.find((profile_id, room_id)) or await provisioning.load(control, stored, room_id)
    if entry is None or entry.instance.desired == "destroyed":
        raise InstanceNotFoundError
    return entry


async def usable_entry(control: Control, principal: Principal, entry: Entry) -> Entry:
    """The same room, ready: one that sleeps is woken.

    Raises:
        InstanceFailedError: it failed; asking for the room restarts it.
        InstanceNotReadyError: it takes longer than the wait limit.

    """
    if entry.ready:
        _use(control, entry)
        return entry
    if entry.instance.state is InstanceState.FAILED:
        raise InstanceFailedError(entry.instance.failure)
    return await _bring_up(control, principal, entry.stored, entry.room_id, None)


async def revive(control: Control, principal: Principal, entry: Entry) -> Entry:
    """The room with a new machine on its disk, when its host says that the one we thought ready is gone."""
    if entry.ready:
        provisioning.mark_lost(control, entry)
    return await _bring_up(control, principal, entry.stored, entry.room_id, None)


async def _bring_up(
    control: Control, principal: Principal, stored: StoredProfile, room_id: str, host_id: UUID | None
) -> Entry:
    key = (stored.profile.id, room_id)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + control.settings.room_wait_seconds
    while True:
        entry = control.rooms.find(key)
        if entry is not None and host_id is not None and host_id != entry.instance.host_id:
            raise HostMismatchError
        flight = control.flights.get(key)
        if entry is not None:
            _check_drain(entry)
        if flight is None:
            if entry is not None and entry.ready:
                _use(control, entry)
                return entry
            flight = control.flights.start(
                key, "up", lambda: provisioning.bring_up(control, principal, stored, room_id, host_id)
            )
        await _wait(control, flight, key, deadline - loop.time())
        if flight.kind == "up":
            flight.future.result()


def _use(control: Control, entry: Entry) -> None:
    """The room is being used: its idle time starts anew, and the request's log lines name its instance (not by the public id, which is a key).

    Raises HostDrainingError when its host takes nothing more.
    """
    _check_drain(entry)
    control.rooms.touch(entry)
    bind_contextvars(**{INSTANCE_ID: str(entry.instance.id)})


async def _wait(control: Control, flight: Flight, key: tuple[UUID, str], seconds: float) -> None:
    done, _ = await asyncio.wait({flight.future}, timeout=max(0.0, seconds))
    if not done:
        entry = control.rooms.find(key)
        status = InstanceState.ACTIVE if entry is None else entry.instance.state
        raise InstanceNotReadyError(f"Instance is still provisioning, current status: {status}")


def _check_drain(entry: Entry) -> None:
    host = entry.host
    if host is not None and host.draining and host.refuses_use(clock.now()):
        raise HostDrainingError("The room's host has been drained")


async def find(control: Control, principal: Principal, profile_id: UUID, room_id: str) -> RoomView:
    """The room with its boot trace and isolation, in whatever state. Raises InstanceNotFoundError; nothing is made."""
    return (await existing_entry(control, principal, profile_id, room_id)).view


async def find_instance(control: Control, principal: Principal, instance_id: UUID) -> RoomView:
    """The room of an instance's public or internal id. Raises InstanceNotFoundError."""
    require(principal, Scope.ROOMS)
    entry = control.rooms.by_public_id(instance_id) or control.rooms.by_instance(instance_id)
    if entry is None or entry.instance.organization_id != principal.organization_id:
        raise InstanceNotFoundError
    return entry.view


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
        entry = control.rooms.by_instance(instance.id)
        if entry is None:
            stored = await profiles.load(control, principal, room.profile_id)
            host = control.hosts.get(instance.host_id)
            views.append(RoomView(instance, stored.profile, room.room_id, host.host if host is not None else None))
        elif entry.instance.desired != "destroyed":
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
    entry = control.rooms.find(key) or await provisioning.load(control, stored, room_id)
    if entry is None:
        raise InstanceNotFoundError
    await destroy_entry(control, principal, entry)


async def destroy_entry(control: Control, principal: Principal, entry: Entry, *, action: str = "room.destroy") -> None:
    """Destroy a room that is in memory; joins a destruction that is going on."""
    flight = control.flights.get(entry.key)
    if flight is None:
        flight = control.flights.start(
            entry.key, "down", lambda: provisioning.take_down(control, principal, entry, action=action)
        )
    await asyncio.wait({flight.future})
    if flight.kind == "down":
        flight.future.result()
