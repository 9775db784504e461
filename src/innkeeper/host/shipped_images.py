"""The shipped images: which there are, and building the missing ones beside everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from innkeeper.core.image import ImageStatus, ShippedImage
from innkeeper.host.disks.image_build import ImageBuildFailed, build_image, is_current
from innkeeper.host.disks.image_recipe import RecipeInvalid, recipe_folder
from innkeeper.host.disks.image_store import ImageStore
from innkeeper.host.metrics import HostMetrics

log = structlog.stdlib.get_logger(__name__)

MESSAGE_CHARACTERS = 2_000


class ShippedImages:
    """Keeps the shipped images current, one build at a time: two would fight over the cores and the package mirror.

    Args:
        recipes: the directory with one recipe folder per image.
        ready: the directory with images that were built elsewhere, or None.
        names: the images wanted, in the order in which they are built.
        on_change: called with an image's name and status.
        progress: called with a line for people.

    """

    def __init__(
        self,
        *,
        store: ImageStore,
        recipes: Path,
        ready: Path | None = None,
        names: Sequence[str],
        on_change: Callable[[str, ImageStatus], None],
        progress: Callable[[str], None],
        metrics: HostMetrics | None = None,
    ) -> None:
        self._metrics = metrics or HostMetrics()
        self._store = store
        self._recipes = recipes
        self._ready = ready
        self._names = tuple(names)
        self._on_change = on_change
        self._progress = progress
        self._pending: dict[str, ShippedImage] = {}
        for name in self._names:
            if not self._current(name):
                self._pending[name] = ShippedImage(name=name, status=ImageStatus.MISSING)

    def _current(self, name: str) -> bool:
        try:
            return is_current(recipe_folder(self._recipes, name), self._store)
        except (RecipeInvalid, OSError):
            return False

    @property
    def missing(self) -> list[str]:
        """Images that are not usable yet."""
        return list(self._pending)

    def list(self) -> list[ShippedImage]:
        """Every image: usable ones, and the shipped ones on their way. An image that is being renewed stays usable meanwhile."""
        ready = {record.name: record.as_image() for record in self._store.list()}
        return [*ready.values(), *(image for name, image in self._pending.items() if name not in ready)]

    async def build(self, name: str) -> None:
        """Build one image unless it is current. A failure is kept as the image's message and logged."""
        if name not in self._pending:
            return
        self._set(name, ImageStatus.BUILDING)
        try:
            await build_image(
                recipe_folder(self._recipes, name), self._store, progress=self._progress, ready_images=self._ready
            )
        except (ImageBuildFailed, RecipeInvalid, OSError) as error:
            log.error("image build failed", image=name, error=str(error))
            self._set(name, ImageStatus.FAILED, str(error))
            self._metrics.count_image_build("failed")
        else:
            self._metrics.count_image_build("done")
            del self._pending[name]
            self._on_change(name, ImageStatus.READY)

    async def build_missing(self) -> None:
        """Build what is missing, in order."""
        for name in self._names:
            await self.build(name)

    def _set(self, name: str, status: ImageStatus, message: str | None = None) -> None:
        kept = None if message is None else message[-MESSAGE_CHARACTERS:]
        self._pending[name] = replace(self._pending[name], status=status, message=kept)
        self._on_change(name, status)
