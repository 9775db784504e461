"""The disk of an instance, or a volume that it has, held still while it is copied: by the host where it has mounted it, else by the guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import structlog

from innkeeper.errors import InnkeeperError, VolumeFailedError
from innkeeper.host.completion import to_its_end
from innkeeper.host.linux.freeze import frozen
from innkeeper.host.linux.mounts import syncfs
from innkeeper.host.machine import Machine
from innkeeper.wire.stream import Message, Stream

log = structlog.stdlib.get_logger(__name__)

# For what the guest has written to get to its disk.
FREEZE_SECONDS = 30.0
# The guest thaws by itself after that.
HELD_SECONDS = 10
THAW_SECONDS = 5.0
WRITE_BACK_SECONDS = 0.2


@dataclass(slots=True)
class Held:
    """A disk that is held still. `whole`: what is copied of it is a file system at rest; else it is as after a loss of power, which its journal mends."""

    whole: bool = True


@asynccontextmanager
async def still_disk(machine: Machine | None, mounted: Path) -> AsyncIterator[Held]:
    """The file system of an instance's disk, at rest for the block; `mounted` is where the host has that of `machine`, if it has it.

    A guest that is asked to hold its disk still, and does not, gets a copy all the same: nobody else is hurt by what it holds. Whether it did is known after
    the block. Raises OSError where the host cannot freeze it.
    """
    held = Held()
    if machine is None:
        yield held
    elif machine.driver.needs.disk_files and machine.failure is not None:
        held.whole = False
        yield held
    elif not machine.driver.needs.disk_files:
        with ExitStack() as still:
            await to_its_end(asyncio.to_thread(still.enter_context, frozen(mounted)))
            try:
                yield held
            finally:
                await to_its_end(asyncio.to_thread(still.close))
    else:
        async with machine.in_use():
            stream = await _frozen_by(machine)
            held.whole = stream is not None
            try:
                yield held
            finally:
                if stream is not None:
                    held.whole = await to_its_end(_thawed(machine, stream))


@asynccontextmanager
async def still_volume(machine: Machine, mounted: Path | None, volume: UUID) -> AsyncIterator[None]:
    """The file system of a volume that a machine may write, at rest for the block; `mounted` is where the host has it, if it has it.

    Raises VolumeFailedError, also after the block: what was copied in it is no moment's then. OSError where the host cannot freeze it.
    """
    if mounted is not None:
        with ExitStack() as still:
            await to_its_end(asyncio.to_thread(still.enter_context, frozen(mounted)))
            try:
                yield
            finally:
                await to_its_end(asyncio.to_thread(still.close))
        return
    async with machine.in_use():
        stream = await _frozen_by(machine, volume=volume.hex)
        if stream is None:
            raise VolumeFailedError("The virtual machine does not hold the volume still")
        thawed = False
        try:
            yield
        finally:
            thawed = await to_its_end(_thawed(machine, stream))
        if not thawed:
            raise VolumeFailedError("The virtual machine did not hold the volume still")


async def _frozen_by(machine: Machine, **of: str) -> Stream | None:
    """What holds the disk of a guest still, or `of` it a volume, or None where the guest does not."""
    stream: Stream | None = None
    try:
        async with asyncio.timeout(FREEZE_SECONDS):
            stream = await machine.endpoint.open(
                "freeze_fs", {"seconds": HELD_SECONDS, **of}, timeout_seconds=FREEZE_SECONDS
            )
            event = await stream.next_event()
    except (InnkeeperError, TimeoutError) as error:
        if stream is not None:
            stream.cancel()
        log.warning("a guest does not hold its disk still", machine=machine.id, error=str(error))
        return None
    if not isinstance(event, Message):
        stream.cancel()
        return None
    return stream


async def _thawed(machine: Machine, stream: Stream) -> bool:
    """Let the guest go on; whether it says that its disk stood still until then."""
    try:
        async with asyncio.timeout(THAW_SECONDS):
            await stream.send_end()
            await stream.result()
    except (InnkeeperError, TimeoutError) as error:
        stream.cancel()
        log.warning("a guest did not hold its disk still", machine=machine.id, error=str(error))
        return False
    return True


@asynccontextmanager
async def kept_written(disk: Path, *, until: asyncio.Event) -> AsyncIterator[None]:
    """Write what comes into a disk's file to its device again and again, until the event or the end of the block: little is left for the moment after."""

    async def keep() -> None:
        while not until.is_set():
            await to_its_end(asyncio.to_thread(write_back, None, disk))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WRITE_BACK_SECONDS):
                    await until.wait()

    writing = asyncio.get_running_loop().create_task(keep())
    try:
        yield
    finally:
        until.set()
        with contextlib.suppress(OSError):
            await writing


def write_back(mounted: Path | None, disk: Path) -> None:
    """Have what was written in the disk's file, and that on its device, so that a copy need not wait for it. Raises OSError."""
    if mounted is not None:
        syncfs(mounted)
    descriptor = os.open(disk, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
