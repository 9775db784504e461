"""Shipped images that were built elsewhere and brought along: taken over in place of a build."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from pathlib import Path

from innkeeper.host.disks.image_recipe import Recipe
from innkeeper.host.disks.image_store import ImageRecord, ImageStore, read_record
from innkeeper.host.linux import command

COPY_SECONDS = 900


class ReadyImageDamaged(RuntimeError):  # noqa: N818  # reads as a sentence where it is raised
    """A ready-made image is not what its record says."""

    code = "ready_image_damaged"


async def take_ready_image(recipe: Recipe, directory: Path, store: ImageStore) -> ImageRecord | None:
    """The image of exactly this recipe from `directory` (`NAME.json` and `DIGEST.erofs`), in the store now; None where it has none.

    Its bytes are checked against the digest. Raises ReadyImageDamaged; CommandFailed, OSError when it cannot be copied.
    """
    record = await asyncio.to_thread(read_record, directory, recipe.name)
    if record is None or record.recipe_digest != recipe.digest:
        return None
    with store.workspace() as work:
        image = work / "image.erofs"
        # Shares the blocks where the file system can.
        await command.run(["cp", "--reflink=auto", "--", str(record.path), str(image)], timeout_seconds=COPY_SECONDS)
        if await asyncio.to_thread(file_digest, image) != record.digest:
            raise ReadyImageDamaged(f"{record.path}: its bytes are not those of its name")
        return await asyncio.to_thread(store.add, replace(record, path=image))


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
