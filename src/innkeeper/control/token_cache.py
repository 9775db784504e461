"""Tokens that were looked up a moment ago."""

from __future__ import annotations

import time
from collections.abc import Callable
from uuid import UUID

from innkeeper.core.token import Principal

CACHE_SECONDS = 30.0
CACHE_MAX = 10_000


class TokenCache:
    """Principals by token digest, for 30 seconds, and who is to hear of a token's end.

    A revocation in this process is seen at once, one elsewhere when the entry ends.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._principals: dict[bytes, tuple[float, Principal]] = {}
        # Counts revocations, so that a look-up that was under way during one is not kept.
        self.generation = 0
        self._held: dict[UUID, set[Callable[[], None]]] = {}

    def get(self, digest: bytes) -> Principal | None:
        """The principal of a digest, while it is fresh."""
        found = self._principals.get(digest)
        if found is None:
            return None
        if found[0] < self._clock():
            del self._principals[digest]
            return None
        return found[1]

    def put(self, digest: bytes, principal: Principal, *, generation: int) -> None:
        """Keep a look-up that began at `generation`."""
        if generation != self.generation:
            return
        if len(self._principals) >= CACHE_MAX:
            del self._principals[next(iter(self._principals))]
        self._principals[digest] = (self._clock() + CACHE_SECONDS, principal)

    def hold(self, token_id: UUID, revoked: Callable[[], None]) -> None:
        """Call `revoked` when the token is revoked in this process; `let_go` must follow."""
        self._held.setdefault(token_id, set()).add(revoked)

    def let_go(self, token_id: UUID, revoked: Callable[[], None]) -> None:
        """What `hold` asked for is not wanted any more."""
        holders = self._held.get(token_id)
        if holders is not None:
            holders.discard(revoked)
            if not holders:
                del self._held[token_id]

    def forget(self, token_id: UUID) -> None:
        """Drop a token that was revoked."""
        self.generation += 1
        self._principals = {digest: kept for digest, kept in self._principals.items() if kept[1].token_id != token_id}
        for revoked in list(self._held.get(token_id, ())):
            revoked()
