"""Volumes as files: ext4 images of exactly their quota, each whole or not there. What they are called, and whose they are, is not the host's business."""

# a rename or stat on a local disk takes microseconds, a hop to a thread takes longer

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from innkeeper.errors import (
    ConflictError,
    GuestWrittenError,
    InvalidRequestError,
    UnavailableError,
    VolumeNotFoundError,
)
from innkeeper.host.disks.disk_template import mkfs_argv, reflink
from innkeeper.host.linux import command, guest_written
from innkeeper.host.linux.hold import held_folder

MIB = 1 << 20
DRAFT = ".draft-"
IMMUTABLE_MODE, MODE = 0o400, 0o600
# Of ext4's superblock: where the features are that a reader must know, and that of a journal which was not played back.
SUPERBLOCK, INCOMPATIBLE, NEEDS_RECOVERY = 1_024, 0x60, 0x4
CHECK_SECONDS = 600
# e2fsck's own: nothing was wrong, or all of it was mended.
MENDED = (0, 1)


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume as it is now. `used_bytes` are the blocks that it takes, shared ones included; nobody may ever write an `immutable` one."""

    id: UUID
    path: Path
    size_mb: int
    used_bytes: int
    guest_written: bool
    immutable: bool


class VolumeStore:
    """The volumes below `directory`, which shares a file system with the disks: copies do not go further."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, exist_ok=True)

    async def create(
        self, volume_id: UUID, size_mb: int, *, copy_of: Volume | None = None, immutable: bool = False
    ) -> Volume:
        """A new volume: empty, or a copy that shares blocks, which may be larger. Repeated it is that one again. It survives a loss of power.

        Raises ConflictError for a taken id, InvalidRequestError (a copy that would be smaller), GuestWrittenError (one that would have to be grown), OSError.
        """
        with contextlib.suppress(VolumeNotFoundError):
            known = self.get(volume_id)
            if (known.size_mb, known.immutable) != (size_mb, immutable):
                raise ConflictError("There is a volume of that id already")
            return known
        if copy_of is not None and size_mb < copy_of.size_mb:
            raise InvalidRequestError(f"size_mb: that of the volume to copy is {copy_of.size_mb}")
        with self._draft() as draft:
            if copy_of is None:
                await command.run(mkfs_argv(draft, size_mb))
            else:
                await asyncio.to_thread(reflink, copy_of.path, draft)
                if size_mb > copy_of.size_mb:
                    await _enlarge(draft, size_mb)
                await _play_back(draft)
            draft.chmod(IMMUTABLE_MODE if immutable else MODE)
            await asyncio.to_thread(self._publish, draft, volume_id)
        return self.get(volume_id)

    def get(self, volume_id: UUID) -> Volume:
        """One. Raises VolumeNotFoundError."""
        try:
            return _volume(self._directory / f"{volume_id}.img", volume_id)
        except FileNotFoundError:
            raise VolumeNotFoundError from None

    def all(self) -> list[Volume]:
        """Every one, by id."""
        found = []
        for path in sorted(self._directory.glob("[!.]*.img")):
            with contextlib.suppress(FileNotFoundError, ValueError):
                found.append(_volume(path, UUID(path.stem)))
        return found

    async def grow(self, volume: Volume, size_mb: int) -> Volume:
        """The volume, with a larger quota; nobody may have it attached. Whatever happens it is whole, as before or as after.

        Raises InvalidRequestError (it would shrink), ConflictError (an immutable one), OSError.

        The file system of one that a virtual machine has written grows when one attaches it next: no tool of the host's reads it.
        """
        if size_mb < volume.size_mb:
            raise InvalidRequestError(f"size_mb: the volume has {volume.size_mb} already, and volumes do not shrink")
        if volume.immutable:
            raise ConflictError("The volume can never be written")
        if volume.guest_written:
            os.truncate(volume.path, size_mb * MIB)
            return self.get(volume.id)
        with self._draft() as draft:
            await asyncio.to_thread(reflink, volume.path, draft)
            await _enlarge(draft, size_mb)
            await asyncio.to_thread(_sync, draft)
            draft.rename(volume.path)
            await asyncio.to_thread(_sync, self._directory)
        return self.get(volume.id)

    async def play_back(self, volume: Volume) -> None:
        """Have what is in the journal of a volume that was not unmounted in its place: whoever may only read it could not do so. Nobody may have it attached.

        Nothing for one that a virtual machine has written: no tool of the host's reads that. Raises UnavailableError for one that is damaged.
        """
        await _play_back(volume.path)

    async def renew(self, volume: Volume) -> None:
        """Put the volume into another file, without copying it: whoever still has the old one open writes to nothing, and reads nothing new. Raises OSError."""
        with self._draft() as draft:
            await asyncio.to_thread(reflink, volume.path, draft)
            draft.chmod(IMMUTABLE_MODE if volume.immutable else MODE)
            await asyncio.to_thread(_sync, draft)
            draft.rename(volume.path)

    async def remove(self, volume_id: UUID) -> bool:
        """Delete one, in a thread (the host gives back its blocks); False when there is none."""
        # Out of sight in one step; what a crash leaves of it is half-made to the next start.
        doomed = self._directory / f"{DRAFT}{secrets.token_hex(8)}"
        try:
            (self._directory / f"{volume_id}.img").rename(doomed)
        except FileNotFoundError:
            return False
        await asyncio.to_thread(doomed.unlink, missing_ok=True)
        return True

    @contextlib.contextmanager
    def _draft(self) -> Iterator[Path]:
        """Where a volume is made that gets its name when it is whole; gone at the end."""
        with held_folder(self._directory, DRAFT) as folder:
            yield folder / "disk.img"

    def _publish(self, draft: Path, volume_id: UUID) -> None:
        _sync(draft)
        try:
            # Not renamed: that would replace another one.
            os.link(draft, self._directory / f"{volume_id}.img")
        except FileExistsError:
            raise ConflictError("There is a volume of that id already") from None
        _sync(self._directory)


def _volume(path: Path, volume_id: UUID) -> Volume:
    status = path.stat()
    return Volume(
        id=volume_id,
        path=path,
        size_mb=status.st_size // MIB,
        used_bytes=status.st_blocks * 512,
        guest_written=guest_written.is_marked(path),
        immutable=status.st_mode & 0o200 == 0,
    )


async def _enlarge(image: Path, size_mb: int) -> None:
    """Give a file system that nobody has mounted more room. Raises GuestWrittenError, CommandFailed."""
    if guest_written.is_marked(image):
        raise GuestWrittenError
    await _check(image)
    os.truncate(image, size_mb * MIB)
    await command.run(["resize2fs", "--", str(image)], timeout_seconds=CHECK_SECONDS)


async def _check(image: Path) -> None:
    done = await command.run(["e2fsck", "-f", "-p", "--", str(image)], timeout_seconds=CHECK_SECONDS, check=False)
    if done.returncode not in MENDED:
        raise UnavailableError("The volume's file system is damaged")


async def _play_back(image: Path) -> None:
    if not guest_written.is_marked(image) and await asyncio.to_thread(_needs_recovery, image):
        await _check(image)


def _needs_recovery(image: Path) -> bool:
    with image.open("rb") as file:
        file.seek(SUPERBLOCK + INCOMPATIBLE)
        return bool(int.from_bytes(file.read(4), "little") & NEEDS_RECOVERY)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
