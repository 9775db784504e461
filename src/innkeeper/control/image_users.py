"""What is being made of which image right now, so that none goes away underneath."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from uuid import UUID


class ImageUsers:
    """Counts the users of images that no row shows: a build on its way."""

    def __init__(self) -> None:
        self._users: dict[UUID, Counter[str]] = {}

    def of(self, image_id: UUID) -> list[str]:
        """The users of an image, as words: `build of 'app'`."""
        return list(self._users.get(image_id, ()))

    @contextlib.contextmanager
    def using(self, image_id: UUID, user: str) -> Iterator[None]:
        """Count `user` (words: `build of 'app'`) among the image's users meanwhile."""
        users = self._users.setdefault(image_id, Counter())
        users[user] += 1
        try:
            yield
        finally:
            users[user] -= 1
            if users[user] == 0:
                del users[user]
            if not users:
                self._users.pop(image_id, None)
