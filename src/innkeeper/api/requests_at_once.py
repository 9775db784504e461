"""How many requests of one organization may be answered at the same time: each may hold memory for as long as its client likes to wait."""

from __future__ import annotations

from collections import Counter
from uuid import UUID

from starlette.types import Scope

from innkeeper.errors import RateLimitedError

COUNTED = "innkeeper.counted_organization"


class RequestsAtOnce:
    """Counts the requests that are under way, by organization."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._under_way: Counter[UUID] = Counter()

    def begin(self, scope: Scope, organization_id: UUID) -> None:
        """Count a request; `end` must follow. Raises RateLimitedError for one too many."""
        if self._under_way[organization_id] >= self._limit:
            raise RateLimitedError(f"The organization has {self._limit} requests under way, which is its limit.")
        self._under_way[organization_id] += 1
        scope[COUNTED] = organization_id

    def end(self, scope: Scope) -> None:
        """The request is over; nothing for one that was not counted."""
        organization_id = scope.pop(COUNTED, None)
        if organization_id is not None:
            self._under_way[organization_id] -= 1
            if not self._under_way[organization_id]:
                del self._under_way[organization_id]
