"""The hosts in memory: what each can do, and when it was last asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

from innkeeper.core.host import Host
from innkeeper.core.isolation import Offer


@dataclass(frozen=True, slots=True)
class HostEntry:
    """A host with what it said it can do: its drivers, and the version of the agent in its guests."""

    host: Host
    offers: tuple[Offer, ...]
    agent_version: str


class HostTable:
    """The hosts that answered since the start of this process."""

    def __init__(self) -> None:
        self._entries: dict[UUID, HostEntry] = {}

    def __iter__(self) -> Iterator[HostEntry]:
        return iter(list(self._entries.values()))

    def get(self, host_id: UUID | None) -> HostEntry | None:
        """The host of an id."""
        return None if host_id is None else self._entries.get(host_id)

    def put(self, entry: HostEntry) -> None:
        """Remember a host as it is now."""
        self._entries[entry.host.id] = entry
