"""SSH connections that stand on a key: each ends when its key is removed."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID


class SshKeysInUse:
    """Who is to hear of a key's end, by its organization and number."""

    def __init__(self) -> None:
        # Counts removals, so that a look-up that was under way during one is repeated.
        self.generation = 0
        self._held: dict[tuple[UUID, int], set[Callable[[], None]]] = {}

    def hold(self, organization_id: UUID, number: int, removed: Callable[[], None]) -> None:
        """Call `removed` when the key is removed in this process; `let_go` must follow."""
        self._held.setdefault((organization_id, number), set()).add(removed)

    def let_go(self, organization_id: UUID, number: int, removed: Callable[[], None]) -> None:
        """What `hold` asked for is not wanted any more."""
        holders = self._held.get((organization_id, number))
        if holders is not None:
            holders.discard(removed)
            if not holders:
                del self._held[organization_id, number]

    def forget(self, organization_id: UUID, number: int) -> None:
        """Tell of a key that was removed."""
        self.generation += 1
        for removed in list(self._held.get((organization_id, number), ())):
            removed()
