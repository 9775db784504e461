"""The images of one server: EROFS files named by their digest, a record for each name, and their mounts."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from innkeeper.core.image import ImageStatus, ShippedImage
from innkeeper.errors import ImageNotFoundError
from innkeeper.host.linux import loop_device, mounts
from innkeeper.host.linux.hold import held_folder

MOUNT_FLAGS = mounts.MS_RDONLY | mounts.MS_NODEV | mounts.MS_NOSUID | mounts.MS_NOATIME
LOCK_POLL_SECONDS = 0.2
KEPT = ".kept"
WORKSPACE = ".build-"


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """A built image. `digest` is the SHA-256 of the EROFS file at `path`; `tools` reads like `Python 3.13.5`."""

    name: str
    digest: str
    recipe_digest: str
    size_bytes: int
    user: str
    workdir: str
    built_at: str
    path: Path
    env: dict[str, str] = field(default_factory=dict)
    tools: tuple[str, ...] = ()

    def as_image(self) -> ShippedImage:
        """The image as the host reports it."""
        return ShippedImage(
            name=self.name,
            status=ImageStatus.READY,
            digest=self.digest,
            size_bytes=self.size_bytes,
            user=self.user,
            workdir=self.workdir,
            env=self.env,
            tools=self.tools,
            built_at=self.built_at,
        )


def read_record(directory: Path, name: str) -> ImageRecord | None:
    """The image that `NAME.json` in the directory describes, when its `DIGEST.erofs` is there in its whole size; else None."""
    try:
        table = json.loads((directory / f"{name}.json").read_text())
        path = directory / f"{table['digest']}.erofs"
        if path.stat().st_size != table["size_bytes"]:
            return None
        return ImageRecord(**{**table, "tools": tuple(table["tools"])}, path=path)
    except (OSError, ValueError, TypeError, KeyError):
        return None


class ImageStore:
    """Images under `<host_dir>/images`, mounted under `<host_dir>/mounts/images`.

    Holds no state of its own but what is being handed over, so a restarted daemon finds everything again, mounts included.
    """

    def __init__(self, host_dir: Path) -> None:
        self.directory = host_dir / "images"
        self.mounts_directory = host_dir / "mounts" / "images"
        # How often each digest is held; of this process only, as what a killed one held has no name.
        self._held: Counter[str] = Counter()
        self._sources = self.directory / "sources"
        for directory in (self.directory, self.mounts_directory):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def list(self) -> list[ImageRecord]:
        """Every usable image, by name; a record whose file is missing counts as none."""
        found = (self.get(path.stem) for path in sorted(self.directory.glob("*.json")))
        return [record for record in found if record is not None]

    def get(self, name: str) -> ImageRecord | None:
        """The image called `name`, or None. Costs well under a millisecond."""
        return read_record(self.directory, name)

    def by_digest(self, digest: str) -> ImageRecord | None:
        """The image with that digest, or None."""
        return next((record for record in self.list() if record.digest == digest), None)

    def add(self, record: ImageRecord) -> ImageRecord:
        """Move the EROFS file at `record.path` (on the same file system) into the store and make it `record.name`'s image.

        An older image of that name loses its name; `collect` removes it when nothing uses it.
        """
        target = self._take(record.path, record.digest)
        table = asdict(replace(record, path=target))
        del table["path"]
        fresh = self.directory / f"{record.name}.json.new"
        fresh.write_text(json.dumps(table, indent=1))
        _sync(fresh)
        fresh.replace(self.directory / f"{record.name}.json")
        _sync(self.directory)
        return replace(record, path=target)

    def mount(self, digest: str) -> Path:
        """Where the image with that digest is mounted read-only; mounts it first where it is not. 1-5 ms, then 0.1.

        Raises ImageNotFoundError; OSError when the kernel refuses.
        """
        target = self.mounts_directory / digest
        if os.path.ismount(target):
            return target
        path = self.file(digest)
        target.mkdir(exist_ok=True)
        # Nothing is awaited between the check and the mount: two callers cannot both mount it.
        with loop_device.attach(path, read_only=True) as device:
            mounts.mount(device.path, target, "erofs", MOUNT_FLAGS)
        return target

    def file(self, digest: str) -> Path:
        """The image's file, for a guest that mounts it itself. Raises ImageNotFoundError."""
        path = self.directory / f"{digest}.erofs"
        if not path.is_file():
            raise ImageNotFoundError(f"no image with digest {digest[:12]} on this host")
        return path

    async def unmount_all(self) -> None:
        """Unmount every image; one still used by a guest goes when that guest does."""
        await mounts.umount_tree(self.mounts_directory)
        for target in self.mounts_directory.iterdir():
            target.rmdir()

    def publish(self, file: Path, digest: str) -> int:
        """Move an organization's EROFS file (on the same file system) into the store, where it stays until `release` lets it go; its size in bytes.

        Its names are rows of the database: here is only the mark that it has some.
        """
        size_bytes = file.stat().st_size
        (self.directory / f"{digest}{KEPT}").touch(mode=0o600)
        self._take(file, digest)
        _sync(self.directory)
        return size_bytes

    def _take(self, file: Path, digest: str) -> Path:
        """The file under its digest. One that is there already stays: guests may stand on it, and would keep it on the disk beside the new one."""
        target = self.directory / f"{digest}.erofs"
        if self.size_of(digest) == file.stat().st_size:
            file.unlink()
        else:
            _sync(file)
            file.chmod(0o400)
            file.replace(target)
        return target

    def size_of(self, digest: str) -> int | None:
        """Bytes of the file of that digest, or None where there is none."""
        try:
            return (self.directory / f"{digest}.erofs").stat().st_size
        except FileNotFoundError:
            return None

    def known_source(self, key: str) -> tuple[str, int, dict[str, Any]] | None:
        """(digest, bytes, configuration) of what was made of a source before and is still here; `key` is a SHA-256 that stands for it."""
        try:
            table = json.loads((self._sources / f"{key}.json").read_text())
            if self.size_of(table["digest"]) == table["size_bytes"]:
                return table["digest"], table["size_bytes"], table["config"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def remember_source(self, key: str, digest: str, size_bytes: int, config: dict[str, Any]) -> None:
        """Keep what was made of a source, for `known_source`."""
        self._sources.mkdir(mode=0o700, exist_ok=True)
        fresh = self._sources / f"{key}.json.new"
        fresh.write_text(json.dumps({"digest": digest, "size_bytes": size_bytes, "config": config}))
        fresh.replace(self._sources / f"{key}.json")

    def _forget_sources(self) -> None:
        for path in self._sources.glob("*.json"):
            if self.known_source(path.stem) is None:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def held(self, digest: str) -> Iterator[None]:
        """Keep the file from being collected: while it is handed over, the database does not name it yet."""
        self._held[digest] += 1
        try:
            if self.size_of(digest) is not None:
                (self.directory / f"{digest}{KEPT}").touch(mode=0o600)
            yield
        finally:
            self._held[digest] -= 1

    def release(self, keep: frozenset[str]) -> None:
        """Let go of the organizations' images that are not in `keep`; `collect` removes their files."""
        for mark in self.directory.glob(f"*{KEPT}"):
            digest = mark.name.removesuffix(KEPT)
            if digest not in keep and not self._held[digest]:
                mark.unlink()

    async def collect(self, in_use: frozenset[str]) -> dict[str, int]:
        """Remove the images that have no name any more and are not `in_use` (digests); returns the digests that went and their bytes."""
        gone = {}
        for digest, size_bytes in self.doomed(in_use).items():
            target = self.mounts_directory / digest
            await mounts.umount(target)
            if target.exists():
                target.rmdir()
            (self.directory / f"{digest}.erofs").unlink()
            gone[digest] = size_bytes
        if gone:
            self._forget_sources()
        return gone

    def doomed(self, in_use: frozenset[str], *, keep: frozenset[str] | None = None) -> dict[str, int]:
        """The digests that `collect` would remove, after a `release` of all but `keep` where that is given, and their bytes."""
        named = {record.digest for record in self.list()}
        for mark in self.directory.glob(f"*{KEPT}"):
            digest = mark.name.removesuffix(KEPT)
            if keep is None or digest in keep or self._held[digest]:
                named.add(digest)
        return {
            path.stem: path.stat().st_size
            for path in self.directory.glob("*.erofs")
            if path.stem not in named and path.stem not in in_use
        }

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """A private directory on the store's file system, gone at the end; what a killed process leaves, the next start removes."""
        with held_folder(self.directory, WORKSPACE) as directory:
            yield directory

    @contextlib.asynccontextmanager
    async def build_lock(self, name: str) -> AsyncIterator[None]:
        """One builder of `name` at a time, over processes too."""
        fd = os.open(self.directory / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(LOCK_POLL_SECONDS)
            yield
        finally:
            os.close(fd)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
