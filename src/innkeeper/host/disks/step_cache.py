"""Kept steps of image builds: a disk as it was after a step, as a reflink copy under the step's key. The least recently used go first."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from innkeeper.errors import NotFoundError
from innkeeper.host.disks.disk_pool import DiskPool
from innkeeper.host.disks.disk_template import reflink
from innkeeper.host.linux import hold
from innkeeper.host.linux.extents import shared_bytes

KEY = re.compile(r"[0-9a-f]{64}")
COPIES = ".copy-"


@dataclass(frozen=True, slots=True)
class KeptStep:
    """A kept disk, and the digest of the image below it."""

    key: str
    path: Path
    image_digest: str
    # Digest and number of files of the image that was made of it, where one was.
    exported: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Freed:
    """What a collection removed, and what is left."""

    removed: int
    freed_bytes: int
    cache_bytes: int


class StepCache:
    """The kept steps below `<pool>/steps`.

    `limit_bytes` bounds what they take together; blocks that they share with each other count once. Those that they share with a disk that lives count
    too, so the real cost is less. `has_image` says whether an image's file is on this host: without it a step is of no use.
    """

    def __init__(self, pool: DiskPool, *, limit_bytes: int, has_image: Callable[[str], bool]) -> None:
        self._directory = pool.directory / "steps"
        self._limit_bytes = limit_bytes
        self._has_image = has_image
        self._changing = asyncio.Lock()
        # How many builds stand on each step, or will: one that lost it would have to begin again, and might lose it again.
        self._held: Counter[str] = Counter()
        self._directory.mkdir(mode=0o700, exist_ok=True)

    def sweep(self) -> int:
        """Remove what a daemon that was killed left half done; call it at the start. How many files that were."""
        removed = 0
        for path in self._directory.iterdir():
            whole = path.suffix == ".img" and path.with_suffix(".json").exists()
            if not whole and not (path.suffix == ".json" and path.with_suffix(".img").exists()):
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def get(self, key: str) -> KeptStep:
        """A kept step; counts as a use of it. Raises NotFoundError."""
        image, record = self._paths(key)
        try:
            table = json.loads(record.read_text())
            digest = str(table["image_digest"])
            exported = (str(table["exported"][0]), int(table["exported"][1])) if "exported" in table else None
            os.utime(record)
        except (OSError, ValueError, KeyError, TypeError):
            raise NotFoundError("The step is not kept any more") from None
        if not image.exists() or not self._has_image(digest):
            raise NotFoundError("The step is not kept any more")
        return KeptStep(key, image, digest, exported)

    def note_export(self, key: str, digest: str, files: int) -> None:
        """Remember which image was made of a kept step: equal trees make equal files, so it need not be made again."""
        kept = self.get(key)
        self._write(kept.key, {"image_digest": kept.image_digest, "exported": [digest, files]})

    @contextlib.asynccontextmanager
    async def held(self, keys: tuple[str, ...]) -> AsyncIterator[None]:
        """Keep the steps of these keys, those that come to be meanwhile included, even beyond the limit."""
        self._held.update(keys)
        try:
            yield
        finally:
            self._held.subtract(keys)
            self._held = +self._held
            # What is beyond the limit went over it for us.
            await asyncio.shield(self.collect(everything=False))

    def found(self, keys: tuple[str, ...]) -> list[str]:
        """Those of the keys that can be used."""
        there = []
        for key in keys:
            with contextlib.suppress(NotFoundError):
                there.append(self.get(key).key)
        return there

    async def keep(self, key: str, disk: Path, *, image_digest: str) -> int:
        """Keep a disk, which its owner has synced, under a key, in place of what was kept so far. The bytes that all of them take then.

        Raises OSError: there is no space.
        """
        image, _ = self._paths(key)
        async with self._changing:
            fresh = self._directory / f"{COPIES}{secrets.token_hex(8)}"
            try:
                # In a thread: the kernel writes the disk's last blocks first.
                await asyncio.to_thread(reflink, disk, fresh)
                fresh.replace(image)
            finally:
                fresh.unlink(missing_ok=True)
            # The record last: a step without one is swept away.
            self._write(key, {"image_digest": image_digest})
            freed = await asyncio.to_thread(self._shrink, key)
        return freed.cache_bytes

    async def collect(self, *, everything: bool) -> Freed:
        """Remove all steps, or those that are of no use or beyond the limit; none that is held."""
        async with self._changing:
            return await asyncio.to_thread(self._shrink, None, everything=everything)

    @contextlib.contextmanager
    def copy(self, key: str) -> Iterator[KeptStep]:
        """A copy of a kept disk to mount and write to, gone at the end. Raises NotFoundError."""
        kept = self.get(key)
        path = self._directory / f"{COPIES}{secrets.token_hex(8)}"
        try:
            try:
                reflink(kept.path, path)
            except FileNotFoundError:
                raise NotFoundError("The step is not kept any more") from None
            with hold.held(path):
                yield replace(kept, path=path)
        finally:
            path.unlink(missing_ok=True)

    def _write(self, key: str, table: dict[str, Any]) -> None:
        record = self._paths(key)[1]
        beside = record.with_suffix(".new")
        beside.write_text(json.dumps(table))
        beside.replace(record)

    def _paths(self, key: str) -> tuple[Path, Path]:
        if not KEY.fullmatch(key):
            raise ValueError(f"not a key: {key[:80]!r}")
        return self._directory / f"{key}.img", self._directory / f"{key}.json"

    def _shrink(self, spare: str | None, *, everything: bool = False) -> Freed:
        """Remove what has to go, but no step that is held, and `spare` never: it was kept just now and somebody waits for it."""
        oldest_first = sorted(self._directory.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        free_before = shutil.disk_usage(self._directory).free
        total = self._bytes()
        removed = 0
        for record in oldest_first:
            if record.stem == spare or self._held[record.stem]:
                continue
            if not everything and total <= self._limit_bytes and self._usable(record):
                continue
            record.unlink(missing_ok=True)
            record.with_suffix(".img").unlink(missing_ok=True)
            removed += 1
            if not everything and total > self._limit_bytes:
                total = self._bytes()
        if everything:
            total = self._bytes()
        freed = max(0, shutil.disk_usage(self._directory).free - free_before)
        return Freed(removed, freed if removed else 0, total)

    def _usable(self, record: Path) -> bool:
        try:
            return self._has_image(str(json.loads(record.read_text())["image_digest"]))
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _bytes(self) -> int:
        return shared_bytes(self._directory.glob("*.img"))
