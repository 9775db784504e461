"""Volumes of gVisor guests: mounted by the host, below a directory that the sandbox has had since its start.

A sandbox gets no new mounts of its own once it runs. But what is mounted on the host below a shared directory is passed on to the copies of that directory
that are its slaves, the sandbox's among them: one *hub* for each machine, empty at first.
"""

# ruff: noqa: ASYNC240  # a mkdir or lstat on a local disk takes microseconds, a hop to a thread takes longer

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from innkeeper.errors import InstanceNotFoundError
from innkeeper.host.drivers.contract import VolumeDisk
from innkeeper.host.linux import loop_device, mounts
from innkeeper.host.linux.freeze import thaw

# As a guest's own disk: what it puts there means nothing on the host.
FLAGS = mounts.MS_NODEV | mounts.MS_NOSUID | mounts.MS_NOATIME
# How often it is looked whether a device has become free.
POLL_SECONDS = 0.02


class VolumeHubs:
    """The hubs of a server's machines, below one directory that is a shared mount of its own, whatever the host's mounts are."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._shared = False
        # A volume is not mounted for a machine that is being taken away.
        self._locks: dict[str, asyncio.Lock] = {}

    def prepare(self, machine_id: str) -> Path:
        """The hub of a machine that is about to start; the first one of a server takes a millisecond."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._shared:
            if not mounts.is_mounted(self._directory):
                mounts.bind(self._directory, self._directory)
            mounts.mount("none", self._directory, flags=mounts.MS_SHARED)
            self._shared = True
        hub = self._directory / machine_id
        # The guest's users look into it through the sandbox, which has the host's rights to it and none more.
        hub.mkdir(mode=0o755, exist_ok=True)
        return hub

    async def attach(self, machine_id: str, volume: VolumeDisk) -> None:
        """Mount a volume in a machine's hub. Raises InstanceNotFoundError for one without a hub, GuestWrittenError, OSError."""
        async with self._changing(machine_id):
            hub = self._directory / machine_id
            point = self.mounted_at(machine_id, volume)
            if not hub.is_dir():
                raise InstanceNotFoundError
            point.mkdir(mode=0o755, exist_ok=True)
            if os.path.ismount(point):
                return
            try:
                await asyncio.to_thread(_mount, volume, point)
            except BaseException:
                await asyncio.shield(_take_away(point))
                raise

    async def detach(self, machine_id: str, volume: VolumeDisk) -> None:
        """Take a volume out of a machine's hub. The sandbox may have it in use still, or in mind: `is_free` tells."""
        async with self._changing(machine_id):
            await _take_away(self.mounted_at(machine_id, volume))

    def mounted_at(self, machine_id: str, volume: VolumeDisk) -> Path:
        """Where a volume of a machine is mounted, if it is."""
        return self._directory / machine_id / volume.name

    async def release(self, machine_id: str) -> None:
        """Remove a machine's hub, and take what is in it away first; fine for one that is gone."""
        async with self._changing(machine_id):
            hub = self._directory / machine_id
            with contextlib.suppress(FileNotFoundError):
                for point in list(hub.iterdir()):
                    await _take_away(point)
                hub.rmdir()
        self._locks.pop(machine_id, None)

    @contextlib.asynccontextmanager
    async def _changing(self, machine_id: str) -> AsyncIterator[None]:
        async with self._locks.setdefault(machine_id, asyncio.Lock()):
            yield

    def machines(self) -> list[tuple[str, str]]:
        """Each hub's path and the machine's id."""
        try:
            return [(entry.path, entry.name) for entry in os.scandir(self._directory)]
        except FileNotFoundError:
            return []

    async def close(self) -> None:
        """Unmount the directory, of which no hub is left."""
        await mounts.umount_tree(self._directory)
        self._shared = False


def is_free(image: Path) -> bool:
    """Whether no device of the host holds a volume any more. Takes a millisecond for a hundred devices."""
    return not loop_device.devices_backed_by(image)


def _mount(volume: VolumeDisk, point: Path) -> None:
    flags = FLAGS | (mounts.MS_RDONLY if volume.read_only else 0)
    for device in loop_device.devices_backed_by(volume.image):
        # Of a guest that did not let go of it: a second device would be a second view of the same blocks.
        mounts.mount(device, point, "ext4", flags)
        return
    with loop_device.attach(volume.image, read_only=volume.read_only) as attached:
        mounts.mount(attached.path, point, "ext4", flags)


async def _take_away(point: Path) -> None:
    thaw(point)
    try:
        while await mounts.umount(point, mounts.UMOUNT_NOFOLLOW):
            pass
    except OSError:
        # The sandbox keeps what it has looked at open: from sight at once, and gone when it looks again, or ends.
        await mounts.umount(point, mounts.MNT_DETACH | mounts.UMOUNT_NOFOLLOW)
    with contextlib.suppress(FileNotFoundError):
        point.rmdir()
