"""Garbage: what takes disk space and nothing that lives needs. Looked for, and removed, while the server runs."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from innkeeper.errors import ConflictError, InnkeeperError
from innkeeper.host import kept_executions, temporary
from innkeeper.host.directories import Directories
from innkeeper.host.disks.checkpoint_store import CheckpointStore
from innkeeper.host.disks.disk_pool import DiskPool
from innkeeper.host.disks.image_store import ImageStore
from innkeeper.host.disks.volume_store import VolumeStore
from innkeeper.host.fleet import Fleet
from innkeeper.host.kernels.kernel_store import KernelStore
from innkeeper.host.machine_builder import MachineBuilder
from innkeeper.host.retention import DAY_SECONDS
from innkeeper.host.suspensions import Suspensions

# Of what nobody holds: whoever writes it is done, or was killed, long before.
STALE_SECONDS = 3_600.0


@dataclass(frozen=True, slots=True)
class Garbage:
    """A thing to remove, and the bytes that it takes.

    `kind` is `image`, `temporary`, `trash`, `agent`, `disk`, `checkpoint`, `volume`, `kernel`, `template`, `baseline` or `journals`.
    """

    kind: str
    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Keep:
    """What only the control side knows to be somebody's: images' digests, checkpoints, and volumes."""

    images: frozenset[str]
    checkpoints: frozenset[UUID]
    volumes: frozenset[UUID]


@dataclass(frozen=True, slots=True)
class GarbageCollector:
    """Knows what lives. `collect_images` removes the files of images but for the digests that it is given."""

    directories: Directories
    disks: DiskPool
    images: ImageStore
    checkpoints: CheckpointStore
    volumes: VolumeStore
    suspensions: Suspensions
    fleet: Fleet
    builder: MachineBuilder
    agent_dir: Path
    kernels: KernelStore
    # Identities of what the drivers boot.
    booted: frozenset[str]
    collect_images: Callable[[frozenset[str]], Awaitable[object]]
    execution_retention_days: int

    async def find(self, keep: Keep) -> list[Garbage]:
        """What could go now."""
        templates = [Garbage("template", path.name, _size(path)) for path in await self._useless_templates()]
        return [*self._images(keep.images), *templates, *await asyncio.to_thread(self._rest, keep)]

    async def remove(self, keep: Keep, *, volumes: bool = False) -> list[Garbage]:
        """Remove it; what went. Each is looked at once more just before, so what came to life meanwhile stays; so do volumes, but for `volumes`."""
        found = [one for one in await self.find(keep) if volumes or one.kind != "volume"]
        if any(one.kind == "image" for one in found):
            await self.collect_images(keep.images)
        return [one for one in found if await self._remove(one)]

    async def _remove(self, one: Garbage) -> bool:
        if one.kind == "image":
            return self.images.size_of(one.name) is None
        if one.kind == "disk":
            return one.name in self._dead_disks() and await self.disks.remove_disk(one.name)
        if one.kind == "template":
            return await self.fleet.templates.drop(one.name)
        if one.kind == "checkpoint":
            try:
                return await asyncio.to_thread(self.checkpoints.drop, UUID(one.name))
            except ConflictError:
                # A machine is being started from it.
                return False
        if one.kind == "volume":
            return UUID(one.name) not in self._attached() and await self.volumes.remove(UUID(one.name))
        if one.kind == "journals":
            folders, keep = self._journal_folders(one.name), self._running(one.name)
            await asyncio.to_thread(kept_executions.prune, *folders, keep=keep, older_than=self._oldest())
            return True
        path = self.directories.host / one.name
        if one.kind == "kernel":
            if path not in self.kernels.doomed(self.booted):
                return False
            await asyncio.to_thread(self.kernels.drop, path)
            return not path.exists()
        if one.kind == "baseline" and path.name not in {entry.name for entry in self._dead_baselines()}:
            return False
        await asyncio.to_thread(temporary.remove, path)
        return not path.exists()

    # --- looking ---------------------------------------------------------------------------------------------------

    def _images(self, keep: frozenset[str]) -> Iterator[Garbage]:
        in_use = self.fleet.images_in_use()
        if in_use is not None:
            for digest, size_bytes in self.images.doomed(in_use, keep=keep).items():
                yield Garbage("image", digest, size_bytes)

    async def _useless_templates(self) -> list[Path]:
        return await self.fleet.templates.useless(lambda digest: self.images.size_of(digest) is not None)

    def _rest(self, keep: Keep) -> list[Garbage]:
        host, disks = self.directories.host, self.disks.disks()
        return [
            *(Garbage("disk", name, disks[name]) for name in sorted(self._dead_disks()) if name in disks),
            *self._unowned_checkpoints(keep.checkpoints),
            *self._unowned_volumes(keep.volumes),
            *(self._at("temporary", path) for path in sorted(temporary.abandoned(host)) if _is_stale(path)),
            *(self._at("trash", path) for path in sorted(self.directories.trash.iterdir()) if _is_stale(path)),
            *(self._at("agent", path) for path in self._old_agents()),
            *(self._at("kernel", path) for path in self.kernels.doomed(self.booted)),
            *(self._at("baseline", path) for path in self._dead_baselines()),
            *self._old_journals(),
        ]

    def _at(self, kind: str, path: Path) -> Garbage:
        return Garbage(kind, str(path.relative_to(self.directories.host)), _size(path))

    def _unowned_checkpoints(self, keep: frozenset[UUID]) -> Iterator[Garbage]:
        """Those that nobody owns. Not one that was made just now: whoever asked for it may not have written so yet."""
        for checkpoint in self.checkpoints.all():
            if checkpoint.id not in keep and time.time() - checkpoint.created_at > STALE_SECONDS:
                yield Garbage("checkpoint", str(checkpoint.id), _size(checkpoint.folder))

    def _unowned_volumes(self, keep: frozenset[UUID]) -> Iterator[Garbage]:
        attached = self._attached()
        for volume in self.volumes.all():
            if volume.id not in keep and volume.id not in attached and _is_stale(volume.path):
                yield Garbage("volume", str(volume.id), volume.used_bytes)

    def _attached(self) -> set[UUID]:
        return {volume_id for machine in self.fleet.held() for volume_id in machine.volumes}

    def _living(self) -> set[str]:
        return {machine.id for machine in self.fleet.held()} | self.builder.under_way

    def _dead_disks(self) -> set[str]:
        """Disks that no instance and no machine has; none while a record cannot be read."""
        names = set(self.disks.disks())
        try:
            return names - self.fleet.owned_disks() - self._living()
        except InnkeeperError:
            return set()

    def _dead_baselines(self) -> list[Path]:
        living = self._living()
        return [
            path
            for path in sorted(self.directories.changes.iterdir())
            if path.name not in living and not (self.directories.instances / path.name).exists()
        ]

    def _old_agents(self) -> list[Path]:
        """Agents of earlier versions of the server that no machine's plan and no saved memory names."""
        # Not glob: a machine's folder may go while it is looked through.
        folders = os.walk(self.directories.machines)
        plans = "".join(_text(Path(folder, "config.json")) for folder, _, files in folders if "config.json" in files)
        saved = self.checkpoints.agents() | self.suspensions.store.agents()
        return [
            path
            for path in sorted(self.agent_dir.parent.iterdir())
            if path != self.agent_dir and str(path) not in plans and path.name not in saved and _is_stale(path)
        ]

    def _old_journals(self) -> Iterator[Garbage]:
        for instance_id in self.fleet.disks():
            name = str(instance_id)
            folders, keep = self._journal_folders(name), self._running(name)
            over = kept_executions.beyond_limits(*folders, keep=keep, older_than=self._oldest()).sizes
            if over:
                yield Garbage("journals", name, sum(over.values()))

    def _oldest(self) -> float:
        return time.time() - self.execution_retention_days * DAY_SECONDS

    def _journal_folders(self, instance: str) -> tuple[Path, Path]:
        return self.fleet.journals(UUID(instance)), self.directories.changes / instance

    def _running(self, instance: str) -> frozenset[str]:
        return frozenset(
            execution
            for machine in self.fleet.held()
            if str(machine.record.instance_id) == instance
            for execution in machine.journals
        )


def _is_stale(path: Path) -> bool:
    """Whether nothing in it was written for an hour; also false for what is gone meanwhile."""
    try:
        newest = max(_entry.stat(follow_symlinks=False).st_mtime for _entry in (path, *_below(path)))
    except FileNotFoundError:
        return False
    return time.time() - newest > STALE_SECONDS


def _size(path: Path) -> int:
    total = 0
    for entry in (path, *_below(path)):
        with suppress(FileNotFoundError):
            total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


def _below(path: Path) -> Iterator[Path]:
    if path.is_dir() and not path.is_symlink():
        for folder, names, files in os.walk(path):
            yield from (Path(folder) / name for name in (*names, *files))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
