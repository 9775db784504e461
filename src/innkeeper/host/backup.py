"""The host's half of a backup: every instance's disk at one moment, its records, every volume, and the images, as members of an archive.

Disks are copied first, all of them, each in the milliseconds of a reflink while its file system is frozen; then everything is sent, at the pace of
whoever reads. The copies have no names: they are gone with the daemon's descriptors, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import structlog

from innkeeper.archive.manifest import GUEST_WRITTEN, HOST_MANIFEST, IMMUTABLE, manifest_bytes
from innkeeper.archive.members import PIECE_BYTES, ArchiveWriter
from innkeeper.bus.contract import ServerCall
from innkeeper.core.host_verbs import BackupHost
from innkeeper.errors import ConflictError, UnavailableError, VolumeFailedError, VolumeNotFoundError
from innkeeper.host.completion import to_its_end
from innkeeper.host.directories import INSTANCE_RECORD, Directories
from innkeeper.host.disks.disk_pool import DiskPool
from innkeeper.host.disks.disk_template import reflink_unnamed
from innkeeper.host.file_changes import REPORTED
from innkeeper.host.fleet import Fleet
from innkeeper.host.linux import guest_written
from innkeeper.host.machine import Machine
from innkeeper.host.still_disk import still_disk
from innkeeper.host.volumes import Volumes

log = structlog.stdlib.get_logger(__name__)

ATTEMPTS = 5
IDS_PER_MESSAGE = 1_000
BASELINE = "baseline"
OF_THE_HOST = ("host-id", "server-uuid")


@dataclass(slots=True)
class Staged:
    """What was held fast of one instance: names in the archive and open descriptors. `live` are executions that may still write."""

    instance_id: UUID
    files: list[tuple[str, int]] = field(default_factory=list)
    live: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class StagedVolume:
    """A copy of a volume: its descriptor, and what a file in an archive does not say by itself."""

    id: UUID
    size_mb: int
    descriptor: int
    immutable: bool

    @property
    def name(self) -> str:
        """In the archive."""
        return f"host/volumes/{self.id}.img"


class Backups:
    """Serves `host.backup`, one at a time."""

    def __init__(
        self, *, directories: Directories, fleet: Fleet, disks: DiskPool, images: Path, volumes: Volumes
    ) -> None:
        self._directories = directories
        self._fleet = fleet
        self._disks = disks
        self._images = images
        self._volumes = volumes
        self._busy = False

    async def back_up(self, request: BackupHost, call: ServerCall) -> dict[str, Any]:
        """See BackupHost."""
        if self._busy:
            raise ConflictError("A backup is being made already")
        self._busy = True
        try:
            with contextlib.ExitStack() as opened:
                return await self._back_up(call, opened)
        finally:
            self._busy = False

    async def _back_up(self, call: ServerCall, opened: contextlib.ExitStack) -> dict[str, Any]:
        common = [
            (f"host/{path.name}", path) for name in OF_THE_HOST if (path := self._directories.host / name).exists()
        ]
        common += [(f"host/images/{path.name}", path) for path in sorted(self._images.iterdir()) if path.name[0] != "."]
        held = [(name, fd) for name, path in common if (fd := _open(path, opened)) is not None]
        images = [Path(name).stem for name, _ in held if name.startswith("host/images/") and name.endswith(".erofs")]
        for at in range(0, len(images), IDS_PER_MESSAGE):
            await call.send_message({"staged_images": images[at : at + IDS_PER_MESSAGE]})
        held_fast = [await self._stage(instance_id, opened) for instance_id in sorted(self._fleet.disks())]
        staged = [one for one in held_fast if one is not None]
        ids = [str(one.instance_id) for one in staged]
        for at in range(0, len(ids), IDS_PER_MESSAGE):
            await call.send_message({"staged": ids[at : at + IDS_PER_MESSAGE]})
        volumes = [one for volume_id in self._volumes.ids() if (one := await self._stage_volume(volume_id, opened))]
        for at in range(0, len(volumes), IDS_PER_MESSAGE):
            some = volumes[at : at + IDS_PER_MESSAGE]
            await call.send_message({"staged_volumes": {str(one.id): one.size_mb for one in some}})
        everything = [fd for _, fd in held] + [fd for one in staged for _, fd in one.files]
        everything += [one.descriptor for one in volumes]
        await call.send_message({"estimate_bytes": sum(os.fstat(fd).st_blocks * 512 for fd in everything)})
        writer = ArchiveWriter()
        told: dict[str, Any] = {}
        pieces = _joined(self._pieces(writer, held, staged, volumes, told))
        while (piece := await to_its_end(asyncio.to_thread(next, pieces, None))) is not None:
            await call.send_data(piece)
        log.info("backed up", instances=len(staged), volumes=len(volumes), members=len(writer.entries))
        return told

    async def _stage(self, instance_id: UUID, opened: contextlib.ExitStack) -> Staged | None:
        """Hold an instance fast as it is now; None when it was destroyed meanwhile. Raises UnavailableError when its guest gives no moment for it."""
        for _ in range(ATTEMPTS):
            # Nor is a new baseline taken meanwhile: it belongs to this state of the disk.
            async with self._fleet.held_still(instance_id) as machine, _no_scan(machine):
                mounted = self._directories.mounts / ("" if machine is None else machine.id) / "disk"
                try:
                    async with still_disk(machine, mounted):
                        return await to_its_end(asyncio.to_thread(self._hold, instance_id, machine, opened))
                except OSError as error:
                    # Its guest ended at this moment, and its disk is on the way to being unmounted.
                    if machine is None or error.errno not in (errno.EINVAL, errno.ENOENT):
                        raise
        raise UnavailableError(f"the disk of instance {instance_id} could not be held fast")

    async def _stage_volume(self, volume_id: UUID, opened: contextlib.ExitStack) -> StagedVolume | None:
        """Hold a volume fast as it is now; None when it was deleted meanwhile."""
        copies: list[int] = []

        def copy(path: Path) -> None:
            copies.append(reflink_unnamed(path))
            opened.callback(os.close, copies[-1])

        try:
            async with self._volumes.held_still(volume_id) as volume:
                await to_its_end(asyncio.to_thread(copy, volume.path))
        except VolumeFailedError as error:
            # It did not stand still to the end of the copy, which is one as after a loss of power then.
            log.warning("a volume was not held still", volume=str(volume_id), error=error.message)
        except (VolumeNotFoundError, FileNotFoundError):
            return None
        return StagedVolume(volume.id, volume.size_mb, copies[0], volume.immutable) if copies else None

    def _hold(self, instance_id: UUID, machine: Machine | None, opened: contextlib.ExitStack) -> Staged | None:
        disk = self._directories.disk_of(instance_id)
        if disk is None:
            return None
        staged = Staged(instance_id, live=frozenset() if machine is None else frozenset(machine.journals))
        folder = self._directories.instances / str(instance_id)
        small = [(f"host/instances/{instance_id}/{name}", folder / name) for name in (INSTANCE_RECORD, REPORTED)]
        small.append(
            (f"host/changes/{instance_id}/{BASELINE}", self._directories.changes / str(instance_id) / BASELINE)
        )
        with contextlib.ExitStack() as these:
            for name, path in small:
                if (descriptor := _open(path, these)) is not None:
                    staged.files.append((name, descriptor))
            copy = reflink_unnamed(self._disks.disk_path(disk))
            these.callback(os.close, copy)
            staged.files.append((f"host/disks/{disk}.img", copy))
            opened.push(these.pop_all())
        return staged

    def _pieces(
        self,
        writer: ArchiveWriter,
        held: Iterable[tuple[str, int]],
        staged: list[Staged],
        volumes: list[StagedVolume],
        told: dict[str, Any],
    ) -> Iterator[bytes]:
        for name, descriptor in held:
            yield from writer.file(name, descriptor)
        for volume in volumes:
            yield from writer.file(volume.name, volume.descriptor)
        for one in staged:
            for name, descriptor in one.files:
                yield from writer.file(name, descriptor)
            yield from self._executions(writer, one)
        copies = [(volume.name, volume.descriptor) for volume in volumes]
        facts = {
            "instances": len(staged),
            # What the host's kernel must not mount is not to become mountable by a restore.
            GUEST_WRITTEN: [
                name
                for name, descriptor in (*copies, *(file for one in staged for file in one.files))
                if name.endswith(".img") and guest_written.is_marked(descriptor)
            ],
            IMMUTABLE: [volume.name for volume in volumes if volume.immutable],
        }
        manifest = manifest_bytes(facts, writer.entries)
        sha256 = hashlib.sha256(manifest).hexdigest()
        told.update(manifest_sha256=sha256, instances=len(staged), volumes=len(volumes))
        yield from writer.text(HOST_MANIFEST, manifest)

    def _executions(self, writer: ArchiveWriter, one: Staged) -> Iterator[bytes]:
        """What ended commands left. These files change no more; they may go at any time."""
        journals = self._fleet.journals(one.instance_id)
        changes = self._directories.changes / str(one.instance_id)
        for name in _names(journals):
            execution, _, suffix = name.partition(".")
            if suffix != "json" or execution in one.live:
                continue
            for folder, place, end in (
                (journals, "instances/{}/journals", ".json"),
                (journals, "instances/{}/journals", ".head"),
                (journals, "instances/{}/journals", ".tail"),
                (journals, "instances/{}/journals", ".channels"),
                (journals, "instances/{}/journals", ".results"),
                (changes, "changes/{}", ".changes"),
            ):
                with contextlib.ExitStack() as opened:
                    descriptor = _open(folder / f"{execution}{end}", opened)
                    if descriptor is not None:
                        yield from writer.file(f"host/{place.format(one.instance_id)}/{execution}{end}", descriptor)


def _no_scan(machine: Machine | None) -> contextlib.AbstractAsyncContextManager[Any]:
    return contextlib.nullcontext() if machine is None else machine.scan_lock


def _names(folder: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(entry.name for entry in os.scandir(folder))
    return []


def _open(path: Path, opened: contextlib.ExitStack) -> int | None:
    """A descriptor of a regular file, closed by `opened`; None where there is none. Not followed: another user may write to some of the folders."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise
    opened.callback(os.close, descriptor)
    return descriptor if stat.S_ISREG(os.fstat(descriptor).st_mode) else None


def _joined(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of about 1 MiB: each costs a turn of a thread."""
    waiting: list[bytes] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= PIECE_BYTES:
            yield b"".join(waiting)
            waiting, size = [], 0
    if waiting:
        yield b"".join(waiting)
