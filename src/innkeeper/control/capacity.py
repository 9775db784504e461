"""The operator's report of what a host has room for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from pydantic import TypeAdapter

from innkeeper.control.access import require
from innkeeper.control.hosts import stored
from innkeeper.core.capacity import Capacity, Room, room_for
from innkeeper.core.host import Host
from innkeeper.core.host_verbs import DescribeCapacity, to_wire
from innkeeper.core.profile import Profile
from innkeeper.core.token import Organization, Principal, Scope
from innkeeper.store import instances

if TYPE_CHECKING:
    from innkeeper.control.context import Control

HOST_SECONDS = 10.0
_CAPACITY = TypeAdapter(Capacity)


@dataclass(frozen=True, slots=True)
class ProfileRoom:
    """A profile and how many rooms of it would be taken now. None of its own warm guests is counted on."""

    profile: Profile
    organization: str
    room: Room


@dataclass(frozen=True, slots=True)
class CapacityReport:
    """A host's numbers, its instances by state, and what each profile would still get."""

    host: Host
    capacity: Capacity
    instances: dict[str, int]
    profiles: tuple[ProfileRoom, ...]


async def report(control: Control, principal: Principal, host_id: UUID) -> CapacityReport:
    """What the host has room for. Only the operator may. Raises NotFoundError; UnavailableError when it cannot be asked."""
    require(principal, Scope.ADMIN)
    host = await stored(control, host_id)
    verb = DescribeCapacity()
    answer = await control.bus.request(host_id, verb.verb, to_wire(verb), timeout_seconds=HOST_SECONDS)
    capacity = _CAPACITY.validate_python(answer)
    states = Counter(str(entry.instance.state) for entry in control.live if entry.instance.host_id == host_id)
    profiles = []
    for found in sorted(control.profiles.values(), key=lambda one: one.profile.name):
        organization = control.organizations.get(found.profile.organization_id)
        name = organization.name if organization is not None else ""
        profiles.append(
            ProfileRoom(found.profile, name, await _room(control, host, capacity, found.profile, organization))
        )
    return CapacityReport(host, capacity, dict(sorted(states.items())), tuple(profiles))


async def _room(
    control: Control, host: Host, capacity: Capacity, profile: Profile, organization: Organization | None
) -> Room:
    left: dict[str, int | None] = {}
    if organization is not None and (organization.max_instances, organization.max_memory_mb) != (None, None):
        count, used_mb = await control.database.read(instances.usage, organization.id)
        if organization.max_instances is not None:
            left["organization_instances"] = organization.max_instances - count
        if organization.max_memory_mb is not None:
            left["organization_memory_mb"] = organization.max_memory_mb - used_mb
    return room_for(capacity, profile.memory_mb, draining=host.draining, **left)
