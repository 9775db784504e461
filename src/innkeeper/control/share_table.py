"""The shares in memory: a request for a published port costs no database access."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from uuid import UUID

from innkeeper.core.share import Share


class ShareTable:
    """The shares of this server's living instances, in the order in which they were made."""

    def __init__(self, shares: Iterable[Share] = ()) -> None:
        self._by_id: dict[UUID, Share] = {}
        self._by_name: dict[str, Share] = {}
        for share in shares:
            self.put(share)

    def __iter__(self) -> Iterator[Share]:
        return iter(list(self._by_id.values()))

    def get(self, share_id: UUID) -> Share | None:
        """The share of an id."""
        return self._by_id.get(share_id)

    def find(self, name: str) -> Share | None:
        """The share of a name."""
        return self._by_name.get(name)

    def put(self, share: Share) -> None:
        """Remember a share, or its new form."""
        self._by_id[share.id] = share
        self._by_name[share.name] = share

    def remove(self, share: Share) -> None:
        """Forget a share. Safe to repeat."""
        self._by_id.pop(share.id, None)
        self._by_name.pop(share.name, None)

    def remove_of(self, instance_id: UUID) -> None:
        """Forget the shares of an instance that is gone."""
        for share in self:
            if share.instance_id == instance_id:
                self.remove(share)
