"""The images in memory, so that making a room asks no database."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from uuid import UUID

from innkeeper.core.image import Image


class ImageTable:
    """Every image of every organization, and the shipped ones."""

    def __init__(self, images: Iterable[Image] = ()) -> None:
        # Held while a row is given a digest, and from reading the digests that stay to having a host remove all others: the host keeps a file
        # without a name only as long as its maker's call is open, and that ends as soon as the row is there.
        self.naming = asyncio.Lock()
        self._by_name = {(image.organization_id, image.name): image for image in images}

    def __iter__(self) -> Iterator[Image]:
        return iter(list(self._by_name.values()))

    def own(self, organization_id: UUID | None, name: str) -> Image | None:
        """The image that the organization itself has under the name; with None the shipped one."""
        return self._by_name.get((organization_id, name))

    def resolve(self, organization_id: UUID, name: str) -> Image | None:
        """What the name means to an organization: its own image, else the shipped one."""
        return self._by_name.get((organization_id, name)) or self._by_name.get((None, name))

    def put(self, image: Image) -> None:
        """Remember an image as it is now."""
        self._by_name[image.organization_id, image.name] = image

    def remove(self, image: Image) -> None:
        """Forget an image. Idempotent."""
        self._by_name.pop((image.organization_id, image.name), None)

    def digests(self) -> frozenset[str]:
        """The digests that some name stands for."""
        return frozenset(image.digest for image in self._by_name.values() if image.digest)
