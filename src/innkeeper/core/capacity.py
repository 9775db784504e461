"""Capacity: how many guests of a size a host would still take, and what the limit is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a host has room for, in MiB. Of `memory_committed_mb`, `memory_warm_mb` are warm guests', which make way for instances."""

    memory_mb: int
    memory_reserve_mb: int
    memory_overcommit: float
    memory_limit_mb: int
    memory_committed_mb: int
    memory_warm_mb: int
    disk_free_mb: int
    disk_reserve_mb: int
    disk_pool_mb: int
    slots: int
    slots_used: int
    starts_waiting: int
    executions_waiting: int


@dataclass(frozen=True, slots=True)
class Room:
    """How many more guests would be taken at this moment, and what bounds them: `memory`, `disk`, `slots`, `organization` or `draining`."""

    count: int
    bound_by: str


def room_for(
    capacity: Capacity,
    memory_mb: int,
    *,
    draining: bool = False,
    organization_instances: int | None = None,
    organization_memory_mb: int | None = None,
) -> Room:
    """Room for guests of `memory_mb`, all of them running; those that freeze later make room for more.

    What is left of the organization's limits is given where there is a limit. Disk is not promised ahead: it refuses all or none.
    """
    free_mb = capacity.memory_limit_mb - (capacity.memory_committed_mb - capacity.memory_warm_mb)
    bounds = [
        Room(max(0, free_mb) // memory_mb, "memory"),
        Room(max(0, capacity.slots - capacity.slots_used), "slots"),
    ]
    if organization_instances is not None:
        bounds.append(Room(max(0, organization_instances), "organization"))
    if organization_memory_mb is not None:
        bounds.append(Room(max(0, organization_memory_mb) // memory_mb, "organization"))
    if capacity.disk_free_mb < capacity.disk_reserve_mb:
        bounds.append(Room(0, "disk"))
    if draining:
        bounds.append(Room(0, "draining"))
    # Of equals the last one: what refuses everything is the better answer.
    return min(reversed(bounds), key=lambda bound: bound.count)
