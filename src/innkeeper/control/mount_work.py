"""The host's part of mounts: what has a machine see its volumes, and lets go of them again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

import structlog

from innkeeper.control import volume_work
from innkeeper.control.live_table import Entry
from innkeeper.control.vm_entry import VmEntry
from innkeeper.core.volume import Mount, MountState
from innkeeper.core.volume_verbs import AttachVolume, DetachVolume
from innkeeper.errors import CheckpointFailedError, InnkeeperError, UnavailableError, VolumeInUseError
from innkeeper.store import volumes as store

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

# A guest whose every instruction is emulated takes twenty on a busy host to find a disk.
ATTACH_SECONDS = 90.0


def list_mounts(entry: VmEntry) -> list[Mount]:
    """What a VM has, in the order in which it got it."""
    return sorted(entry.mounts.values(), key=lambda mount: mount.id)


async def attach_all(control: Control, entry: Entry) -> None:
    """Attach what a VM has to the machine that it has just got. Raises what the host says of the first that it cannot have."""
    if isinstance(entry, VmEntry):
        for mount in list_mounts(entry):
            if mount.state is MountState.ATTACHED:
                await ask(control, entry, mount)


@contextlib.asynccontextmanager
async def set_aside(control: Control, entry: VmEntry, *, for_good: bool = False) -> AsyncIterator[list[Mount]]:
    """A VM that runs without its volumes for the block, which has them at its end again, unless that is `for_good`, as when its machine ends in it.

    Raises CheckpointFailedError, naming the path, where something of the VM has one in use: then it has all of them as before.
    """
    if not entry.mounts:
        # One that comes meanwhile is in the way of what is done in the block, and that says so.
        yield []
        return
    async with entry.mounting:
        taken: list[Mount] = []
        done = False
        try:
            for mount in list_mounts(entry):
                try:
                    await ask_to_let_go(control, entry, mount)
                except VolumeInUseError as error:
                    raise CheckpointFailedError(f"The volume at {mount.path} is in use: {error.message}") from error
                taken.append(mount)
            yield taken
            done = True
        finally:
            if not (done and for_good):
                await asyncio.shield(_bring_back(control, entry, taken))


async def _bring_back(control: Control, entry: VmEntry, taken: Sequence[Mount]) -> None:
    for mount in taken:
        try:
            await ask(control, entry, mount)
        except InnkeeperError as error:
            # The reconciler tries again.
            log.warning("a volume did not come back", volume_id=str(mount.disk_id), reason=error.message)
            control.reconcile_hint.set()


async def settle(control: Control, host_id: UUID) -> None:
    """Finish what was cut short of mounts on a host, and attach again what machines that run should have and have not."""
    having = [
        entry
        for entry in control.live
        if isinstance(entry, VmEntry) and entry.instance.host_id == host_id and entry.mounts
    ]
    if not having:
        return
    for entry in having:
        # Somebody changes them at this moment.
        if control.flights.get(entry.key) is None and not entry.mounting.locked():
            async with entry.mounting:
                there = await volume_work.on_host(control, host_id, tuple(entry.mounts))
                for mount in list_mounts(entry):
                    await _settle(control, entry, mount, there.get(mount.disk_id, {}).get("attached", []))


async def _settle(control: Control, entry: VmEntry, mount: Mount, attached: Sequence[Mapping[str, Any]]) -> None:
    try:
        if mount.state is not MountState.ATTACHED:
            await release(control, entry, mount)
        elif entry.ready and not any(one["instance_id"] == str(entry.instance.id) and one["ready"] for one in attached):
            await ask(control, entry, mount)
    except InnkeeperError as error:
        # The next look tries again.
        log.warning("a mount could not be settled", volume_id=str(mount.disk_id), reason=error.message)


async def ask(control: Control, entry: VmEntry, mount: Mount) -> None:
    """Have the host attach a mount's volume to the VM's machine. Raises what it says."""
    await control.volume_guests.let_go(mount.disk_id)
    verb = AttachVolume(entry.instance.id, mount.disk_id, mount.path, mount.read_only)
    await volume_work.ask(control, _host(entry), verb, seconds=ATTACH_SECONDS)


async def ask_to_let_go(control: Control, entry: VmEntry, mount: Mount) -> None:
    """Have the host take a volume from the VM's machine, if it has that. Raises what it says."""
    await control.volume_guests.quiet(mount.disk_id)
    verb = DetachVolume(entry.instance.id, mount.disk_id)
    await volume_work.ask(control, _host(entry), verb, seconds=ATTACH_SECONDS)


async def release(control: Control, entry: VmEntry, mount: Mount) -> None:
    """Have the host take a volume from a VM, and forget that the VM has it."""
    await ask_to_let_go(control, entry, mount)
    await control.database.write(store.delete_mount, mount.id)
    entry.mounts.pop(mount.disk_id, None)


async def let_go(control: Control, entry: VmEntry, mount: Mount) -> None:
    """The same of one that never was, or should be no more; what does not work now is the reconciler's."""
    try:
        await release(control, entry, mount)
    except InnkeeperError as error:
        log.warning("a volume is still half attached", volume_id=str(mount.disk_id), reason=error.message)
        control.reconcile_hint.set()


def _host(entry: VmEntry) -> UUID:
    if entry.instance.host_id is None:
        raise UnavailableError("The VM has never been on a host")
    return entry.instance.host_id
