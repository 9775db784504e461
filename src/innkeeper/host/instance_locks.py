"""One lock for each instance that somebody works on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID


@dataclass(slots=True)
class _Lock:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    # Who has it and who waits for it.
    users: int = 0


class InstanceLocks:
    """Locks by instance. None outlives its last user: what could not be made has no end that would take its lock away."""

    def __init__(self) -> None:
        self._locks: dict[UUID, _Lock] = {}

    def __len__(self) -> int:
        return len(self._locks)

    @asynccontextmanager
    async def hold(self, instance_id: UUID) -> AsyncIterator[None]:
        """Have the instance to oneself, after those who asked before."""
        found = self._locks.setdefault(instance_id, _Lock())
        found.users += 1
        try:
            async with found.lock:
                yield
        finally:
            found.users -= 1
            if not found.users:
                del self._locks[instance_id]
