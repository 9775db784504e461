"""Makes an image of an OCI image: fetched by skopeo, unpacked by umoci, compressed by mkfs.erofs, each in a jail of its own on a disk of its own."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from innkeeper.core.image_config import ImageConfig, config_from_json, config_to_json
from innkeeper.errors import InvalidRequestError, UnavailableError
from innkeeper.host.directories import Directories
from innkeeper.host.disks import rootfs
from innkeeper.host.disks.disk_pool import DiskPool
from innkeeper.host.disks.image_store import ImageStore
from innkeeper.host.disks.oci_job import MIB, ImportJob, ImportLimits, ImportSource, RegistryRoutes, Say, sha256_of
from innkeeper.host.linux import loop_device, mounts
from innkeeper.host.linux.cgroup import Group

log = structlog.stdlib.get_logger(__name__)

DISK_FLAGS = mounts.MS_NODEV | mounts.MS_NOSUID | mounts.MS_NOATIME | mounts.MS_NOEXEC
# What a crash leaves of this disk is thrown away, so nothing waits for it to be safe.
DISK_OPTIONS = "commit=60,barrier=0,noauto_da_alloc"
SPACE_POLL_SECONDS = 0.5
MEMORY_BYTES = 2_048 * MIB
PROCESSES = 512
SLACK_MIB = 512


@dataclass(frozen=True, slots=True)
class ImportedImage:
    """The file, which is in the store, and what goes with it."""

    digest: str
    size_bytes: int
    config: ImageConfig
    known: bool = False


class ImageImporter:
    """The imports of one host. `under_way` names what they hold, for those who look for leaks."""

    def __init__(
        self,
        *,
        directories: Directories,
        pool: DiskPool,
        store: ImageStore,
        group: Group,
        limits: ImportLimits,
        routes: RegistryRoutes,
    ) -> None:
        self._directories = directories
        self._pool = pool
        self._store = store
        self._group = group
        self._limits = limits
        self._routes = routes
        self._turns = asyncio.Semaphore(limits.parallel)
        self.under_way: set[str] = set()

    async def sweep(self) -> None:
        """Remove the control groups that a killed daemon left; disks and mounts go with those of machines, half files with the others."""
        for name in self._group.children():
            group = self._group.child(name)
            await group.kill_all()
            await group.remove()
        await self._group.remove()

    @asynccontextmanager
    async def importing(self, source: ImportSource, say: Say) -> AsyncIterator[ImportedImage]:
        """The image, kept from being collected inside the context. Whatever ends it, nothing else stays behind.

        Raises:
            InvalidRequestError: the source cannot be had, is no image, or is beyond a limit.
            UnavailableError: this host has no room for it, or lacks a tool.

        """
        self._check_tools()
        self._check_space(SLACK_MIB)
        if self._turns.locked():
            await say({"step": "waiting for other imports"})
        async with self._turns, AsyncExitStack() as stack:
            made = await self._watched(lambda: self._make(source, say, stack))
            yield made

    def _check_tools(self) -> None:
        missing = [name for name in ("skopeo", "umoci", "mkfs.erofs") if shutil.which(name) is None]
        if missing:
            raise UnavailableError(f"The host lacks {' and '.join(missing)}, so it cannot import images")

    def _check_space(self, more_mib: int = 0) -> None:
        free = self._pool.free_bytes() // MIB
        if free < self._limits.reserve_mib + more_mib:
            raise UnavailableError(
                f"The host has too little disk space for an import: {free} MiB are free, of which {self._limits.reserve_mib} are kept",
                retry_after_seconds=60,
            )

    async def _watched(self, work: Callable[[], Awaitable[ImportedImage]]) -> ImportedImage:
        """The work's result, unless the time or the host's disk space runs out before."""

        async def watch() -> None:
            while True:
                await asyncio.sleep(SPACE_POLL_SECONDS)
                self._check_space()

        working = asyncio.ensure_future(work())
        watching = asyncio.ensure_future(watch())
        try:
            done, _ = await asyncio.wait(
                {working, watching}, timeout=self._limits.seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if working in done:
                return working.result()
            if watching in done:
                watching.result()
            raise InvalidRequestError(f"The import was not done within {self._limits.seconds:g} seconds")
        finally:
            for task in (working, watching):
                task.cancel()
            await asyncio.wait({working, watching})

    async def _make(self, source: ImportSource, say: Say, stack: AsyncExitStack) -> ImportedImage:
        async with AsyncExitStack() as local:
            job = await local.enter_async_context(self._workspace(say))
            key = await job.receive(source) if source.content is not None else None
            if source.reference is not None:
                source_at, key = await job.resolve(source)
                source = source_at
            if key is not None and (known := self._store.known_source(key)) is not None:
                digest, size_bytes, table = known
                stack.enter_context(self._store.held(digest))
                if self._store.size_of(digest) is not None:
                    await say({"step": "already here"})
                    return ImportedImage(digest, size_bytes, config_from_json(table), known=True)
            await job.fetch(source)
            config = await job.unpack()
            with self._store.workspace() as work:
                file = await job.compress(work)
                digest = await asyncio.to_thread(sha256_of, file)
                stack.enter_context(self._store.held(digest))
                size_bytes = await asyncio.to_thread(self._store.publish, file, digest)
            if key is not None:
                self._store.remember_source(key, digest, size_bytes, config_to_json(config))
        return ImportedImage(digest, size_bytes, config)

    @asynccontextmanager
    async def _workspace(self, say: Say) -> AsyncIterator[ImportJob]:
        """A disk of its own, mounted, and a control group: what an import may take, held by the kernel."""
        name = secrets.token_hex(8)
        mount_directory = self._directories.mounts / name
        disk = mount_directory / "disk"
        self.under_way.add(name)
        group = self._group.child(name)
        try:
            size_mib = 2 * self._limits.max_mib + SLACK_MIB
            await self._pool.create_disk(name, size_mib)
            disk.mkdir(parents=True, mode=0o700)
            with loop_device.attach(self._pool.disk_path(name)) as device:
                mounts.mount(device.path, disk, "ext4", DISK_FLAGS, DISK_OPTIONS)
            group.create()
            group.set_limits(memory_bytes=MEMORY_BYTES, cpu_quota=None, pids_max=PROCESSES)
            job = ImportJob(disk, self._limits, self._routes, group, say)
            job.prepare()
            yield job
        finally:
            await asyncio.shield(self._release(name, mount_directory, group))

    async def _release(self, name: str, mount_directory: Path, group: Group) -> None:
        try:
            await group.kill_all()
            await group.remove()
        except (OSError, TimeoutError):
            log.exception("an import's control group could not be removed; the next start does it again")
        await rootfs.release(mount_directory)
        await self._pool.remove_disk(name)
        self.under_way.discard(name)
        if not self.under_way:
            with contextlib.suppress(OSError):
                await self._group.remove()
