"""The shipped images for tests: built once per machine and recipe, then found again in the cache directory."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from innkeeper.host.disks.image_build import build_image
from innkeeper.host.disks.image_recipe import recipe_folder
from innkeeper.host.disks.image_store import ImageRecord, ImageStore
from innkeeper.host.linux import loop_device, mounts

LOOP_PATIENCE_SECONDS = 60
RECIPES = Path(__file__).parents[2] / "images"
T = TypeVar("T")


def cache_directory() -> Path:
    """INNKEEPER_TEST_CACHE, or /var/cache/innkeeper-tests. It outlives the tests on purpose; nothing in it stays mounted."""
    return Path(os.environ.get("INNKEEPER_TEST_CACHE", "/var/cache/innkeeper-tests"))


def shipped_image(name: str) -> ImageRecord:
    """The image of the recipe `images/<name>`, or of the agent's of that name, as it is now: half a minute the first time, a millisecond after that."""
    store = ImageStore(cache_directory())
    return finished(
        build_image(recipe_folder(RECIPES, name), store, progress=lambda line: print(line, file=sys.stderr))
    )


def finished(work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns or raises, run in a thread of its own, because the caller may be inside an event loop."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def put_into(host_dir: Path, *names: str) -> ImageStore:
    """An image store under `host_dir` with the shipped images of these names, as if they had been built there."""
    store = ImageStore(host_dir)
    for name in names:
        record = shipped_image(name)
        target = store.directory / record.path.name
        if not target.exists():
            try:
                target.hardlink_to(record.path)
            except OSError:
                shutil.copyfile(record.path, target)
        table = json.loads((record.path.parent / f"{name}.json").read_text())
        (store.directory / f"{name}.json").write_text(json.dumps(table))
    return store


async def assert_nothing_mounted(directory: Path) -> None:
    """No mount and no loop device below `directory`.

    A mount namespace that another program made meanwhile is a copy with our mounts in it, and a loop device goes only
    with the last of them: hence the patience.
    """
    assert mounts.mounts_under(directory) == []
    deadline = asyncio.get_running_loop().time() + LOOP_PATIENCE_SECONDS
    while left := loop_device.devices_backed_by(directory):
        assert asyncio.get_running_loop().time() < deadline, left
        await asyncio.sleep(0.1)


if __name__ == "__main__":
    # Ahead of the tests, where no test's time runs out meanwhile.
    for recipe in sorted(RECIPES.glob("*/recipe.toml")):
        shipped_image(recipe.parent.name)
