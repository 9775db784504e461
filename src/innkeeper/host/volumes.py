"""Volumes of the host, and which machine has which: attached while guests run, by one that writes or several that read."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID

import structlog

from innkeeper.bus.contract import Handler, ServerCall
from innkeeper.core import volume_verbs as verbs
from innkeeper.errors import (
    ConflictError,
    FileMissingError,
    GuestError,
    InnkeeperError,
    InstanceFailedError,
    InstanceNotFoundError,
    InvalidRequestError,
    VolumeFailedError,
    VolumeInUseError,
    VolumeNotFoundError,
)
from innkeeper.host.completion import to_its_end
from innkeeper.host.disks.volume_store import Volume, VolumeStore
from innkeeper.host.drivers.contract import VolumeDisk, attaching
from innkeeper.host.fleet import Fleet
from innkeeper.host.instance_locks import InstanceLocks
from innkeeper.host.linux import loop_device
from innkeeper.host.linux.extents import own_bytes
from innkeeper.host.machine import Machine
from innkeeper.host.still_disk import still_volume
from innkeeper.host.verbs import bind_handler
from innkeeper.host.volume_attachment import Attachment, load_attachments

log = structlog.stdlib.get_logger(__name__)

# A guest whose every instruction is emulated takes a second to find a disk, and on a busy host twenty.
GUEST_SECONDS = 30.0
LET_GO_SECONDS = 5.0
LEAVE_SECONDS = 10.0
LET_GO_POLL_SECONDS = 0.05


class Volumes:
    """Serves the verbs of `core.volume_verbs`."""

    def __init__(self, *, fleet: Fleet, store: VolumeStore) -> None:
        self._fleet = fleet
        self._store = store
        # By volume: nobody attaches it while somebody else grows or removes it.
        self._locks = InstanceLocks()

    def handlers(self) -> Mapping[str, Handler]:
        """Handlers by verb."""
        return {
            verbs.CreateVolume.verb: bind_handler(verbs.CreateVolume, self._create),
            verbs.GrowVolume.verb: bind_handler(verbs.GrowVolume, self._grow),
            verbs.RemoveVolume.verb: bind_handler(verbs.RemoveVolume, self._remove),
            verbs.AttachVolume.verb: bind_handler(verbs.AttachVolume, self._attach),
            verbs.DetachVolume.verb: bind_handler(verbs.DetachVolume, self._detach),
            verbs.ListVolumes.verb: bind_handler(verbs.ListVolumes, self._list),
        }

    def resume(self, machine: Machine) -> None:
        """Know again what a machine has that an earlier daemon started, and take away what that one was in the midst of."""
        machine.volumes = load_attachments(machine.state_dir)
        for attachment in machine.volumes.values():
            if not attachment.ready:
                machine.start_task(self._finish(machine, attachment.volume_id))

    # --- the verbs -------------------------------------------------------------------------------------------------

    async def _create(self, request: verbs.CreateVolume, call: ServerCall) -> dict[str, Any]:
        source = request.copy_of
        if source == request.volume_id:
            raise InvalidRequestError("copy_of: the volume itself")
        async with contextlib.AsyncExitStack() as locks:
            # Always in the same order: two that copy each other would wait for ever.
            for one in sorted({request.volume_id, source or request.volume_id}):
                await locks.enter_async_context(self._locks.hold(one))
            copied = None
            if source is not None:
                copied = await locks.enter_async_context(self._still(source))
            made = await to_its_end(
                self._store.create(request.volume_id, request.size_mb, copy_of=copied, immutable=request.immutable)
            )
        return await self._described(made)

    @contextlib.asynccontextmanager
    async def _still(self, volume_id: UUID) -> AsyncIterator[Volume]:
        """A volume as it is, for the block, in which nobody writes to it: whoever may waits."""
        volume = self._store.get(volume_id)
        for machine, attachment in self._holders(volume_id):
            if not attachment.read_only and attachment.ready and machine.failure is None:
                mounted = attaching(machine.driver).mounted_at(machine.id, _disk(volume, attachment))
                async with still_volume(machine, mounted, volume_id):
                    yield volume
                return
        # One that comes, goes or has ended: it is free in a moment.
        await self._check_free(volume_id, read_only=True)
        yield volume

    async def _grow(self, request: verbs.GrowVolume, call: ServerCall) -> dict[str, Any]:
        async with self._locks.hold(request.volume_id):
            volume = self._store.get(request.volume_id)
            await self._check_free(volume.id)
            await _unmounted(volume)
            return await self._described(await to_its_end(self._store.grow(volume, request.size_mb)))

    async def _remove(self, request: verbs.RemoveVolume, call: ServerCall) -> dict[str, Any]:
        async with self._locks.hold(request.volume_id):
            await self._check_free(request.volume_id)
            await to_its_end(self._store.remove(request.volume_id))
        return {}

    async def _list(self, request: verbs.ListVolumes, call: ServerCall) -> dict[str, Any]:
        found = await asyncio.to_thread(self._found, request.volume_ids)
        return {"volumes": [await self._described(volume) for volume in found]}

    def _found(self, volume_ids: tuple[UUID, ...] | None) -> list[Volume]:
        if volume_ids is None:
            return self._store.all()
        found = []
        for one in volume_ids:
            with contextlib.suppress(VolumeNotFoundError):
                found.append(self._store.get(one))
        return found

    async def _attach(self, request: verbs.AttachVolume, call: ServerCall) -> dict[str, Any]:
        wanted = Attachment(request.volume_id, request.path, request.read_only)
        async with self._locks.hold(request.volume_id), self._fleet.held_still(request.instance_id) as machine:
            if machine is None or machine.failure is not None:
                raise InstanceNotFoundError
            attaching(machine.driver)
            volume = self._store.get(request.volume_id)
            known = machine.volumes.get(volume.id)
            if known == replace(wanted, ready=True):
                return {}
            await self._check(machine, volume, wanted)
            async with machine.in_use():
                await to_its_end(self._bring(machine, volume, wanted))
        return {}

    async def _detach(self, request: verbs.DetachVolume, call: ServerCall) -> dict[str, Any]:
        async with self._locks.hold(request.volume_id), self._fleet.held_still(request.instance_id) as machine:
            if machine is None or request.volume_id not in machine.volumes:
                return {}
            async with machine.in_use():
                volume = self._store.get(request.volume_id)
                await to_its_end(self._take(machine, machine.volumes[volume.id], volume))
        return {}

    # --- for backups ---------------------------------------------------------------------------------------------------

    def ids(self) -> list[UUID]:
        """All there are."""
        return [volume.id for volume in self._store.all()]

    @contextlib.asynccontextmanager
    async def held_still(self, volume_id: UUID) -> AsyncIterator[Volume]:
        """A volume for the block, in which nobody attaches, grows or removes it, and whoever may write it waits.

        A machine that does not hold it still goes on meanwhile, for nobody else's backup shall depend on that: a copy is then as after a loss of power, and
        its journal mends it. Raises VolumeNotFoundError.
        """
        async with self._locks.hold(volume_id), contextlib.AsyncExitStack() as still:
            try:
                volume = await still.enter_async_context(self._still(volume_id))
            except (VolumeFailedError, VolumeInUseError, OSError) as error:
                log.warning("a volume is not held still", volume=str(volume_id), error=str(error))
                volume = self._store.get(volume_id)
            yield volume

    # --- who has what ----------------------------------------------------------------------------------------------

    def _holders(self, volume_id: UUID) -> list[tuple[Machine, Attachment]]:
        """Machines that have a volume, those on their way down included."""
        held = sorted(self._fleet.held(), key=lambda machine: machine.id)
        return [(machine, machine.volumes[volume_id]) for machine in held if volume_id in machine.volumes]

    async def _check_free(self, volume_id: UUID, *, read_only: bool = False) -> None:
        """Raise VolumeInUseError, naming the instances, if somebody has it; or if somebody may write it."""
        deadline = asyncio.get_running_loop().time() + LEAVE_SECONDS
        while found := [
            machine for machine, attachment in self._holders(volume_id) if not (read_only and attachment.read_only)
        ]:
            # One that has ended lets go of it a moment after its end was told.
            ended = all(machine.failure is not None for machine in found)
            if not ended or asyncio.get_running_loop().time() > deadline:
                named = ", ".join(str(machine.record.instance_id) for machine in found)
                raise VolumeInUseError(f"The volume is attached to {named}")
            await asyncio.sleep(LET_GO_POLL_SECONDS)

    async def _check(self, machine: Machine, volume: Volume, wanted: Attachment) -> None:
        known = machine.volumes.get(volume.id)
        if known is not None:
            raise VolumeInUseError(
                f"The instance has the volume at {known.path}"
                if known.ready
                else "The volume is being detached; detach it again, and then attach it"
            )
        await self._check_free(volume.id, read_only=wanted.read_only)
        if volume.immutable and not wanted.read_only:
            raise ConflictError("The volume can never be written: attach it read-only")
        if any(_overlap(other.path, wanted.path) for other in machine.volumes.values()):
            raise ConflictError("Another volume is attached at that path, above it or below it")
        if len(machine.volumes) >= verbs.VOLUMES_MAX:
            raise ConflictError(f"An instance has at most {verbs.VOLUMES_MAX} volumes")

    async def _described(self, volume: Volume) -> dict[str, Any]:
        return {
            "volume_id": str(volume.id),
            "size_mb": volume.size_mb,
            "used_bytes": volume.used_bytes,
            "own_bytes": await asyncio.to_thread(_own_bytes, volume),
            "guest_written": volume.guest_written,
            "immutable": volume.immutable,
            "attached": [
                {
                    "instance_id": str(machine.record.instance_id),
                    "path": attachment.path,
                    "read_only": attachment.read_only,
                    "ready": attachment.ready,
                }
                for machine, attachment in self._holders(volume.id)
            ],
        }

    # --- coming and going ------------------------------------------------------------------------------------------

    async def _bring(self, machine: Machine, volume: Volume, wanted: Attachment) -> None:
        if not self._holders(volume.id):
            # The machine that had it last may have gone a moment ago, with its mount still on its way out.
            await _unmounted(volume)
            if wanted.read_only:
                await self._store.play_back(volume)
        _note(machine, wanted)
        try:
            await attaching(machine.driver).attach(machine.id, _disk(volume, wanted))
            await _show(machine, wanted)
        except BaseException as error:
            try:
                await self._take(machine, wanted, volume, asked=False)
            except (InnkeeperError, OSError) as left:
                # The machine counts as one that has it, until it is detached or ends.
                log.warning("a volume could not be taken back", machine=machine.id, error=str(left))
            if machine.failure is not None:
                raise InstanceFailedError(machine.failure) from error
            raise
        _note(machine, replace(wanted, ready=True))

    async def _take(self, machine: Machine, attachment: Attachment, volume: Volume, *, asked: bool = True) -> None:
        """Take it away. The guest is `asked` to let go first; where it says that it did and did not, it has the volume as before."""
        driver, disk = attaching(machine.driver), _disk(volume, attachment)
        try:
            await _hide(machine, attachment)
        except InnkeeperError:
            if asked:
                raise
        _note(machine, replace(attachment, ready=False))
        await driver.detach(machine.id, disk)
        # The agent looks again: a sandbox lets go of what is not there any more when it sees so.
        with contextlib.suppress(InnkeeperError):
            await _hide(machine, attachment)
        if not await _has_let_go(machine, disk):
            if attachment.ready:
                await driver.attach(machine.id, disk)
                await _show(machine, attachment)
                _note(machine, attachment)
            raise VolumeInUseError("Something in the instance has the volume in use")
        if machine.driver.needs.disk_files and len(self._holders(volume.id)) == 1:
            # A QEMU that its guest has taken over may have kept the file open.
            await self._store.renew(volume)
        attachment.forget(machine.state_dir)
        del machine.volumes[attachment.volume_id]

    async def _finish(self, machine: Machine, volume_id: UUID) -> None:
        """Take away what an earlier daemon was in the midst of attaching or detaching. What does not work now is for whoever detaches it."""
        try:
            async with self._locks.hold(volume_id), machine.in_use():
                attachment = machine.volumes.get(volume_id)
                if attachment is not None and not attachment.ready:
                    await to_its_end(self._take(machine, attachment, self._store.get(volume_id)))
        except (InnkeeperError, OSError, TimeoutError) as error:
            log.warning("a volume is still half attached", machine=machine.id, volume=str(volume_id), error=str(error))


def _disk(volume: Volume, attachment: Attachment) -> VolumeDisk:
    return VolumeDisk(volume.id.hex, volume.path, attachment.read_only)


def _note(machine: Machine, attachment: Attachment) -> None:
    attachment.save(machine.state_dir)
    machine.volumes[attachment.volume_id] = attachment


async def _show(machine: Machine, attachment: Attachment) -> None:
    try:
        await _ask(machine, "mount_volume", attachment, read_only=attachment.read_only)
    except FileMissingError as error:
        raise VolumeFailedError("The guest did not find the volume") from error


async def _hide(machine: Machine, attachment: Attachment) -> None:
    try:
        await _ask(machine, "unmount_volume", attachment)
    except GuestError as error:
        if error.guest_code == "busy":
            raise VolumeInUseError(error.message) from error
        raise


async def _ask(machine: Machine, verb: str, attachment: Attachment, **more: Any) -> None:
    params = {"volume": attachment.volume_id.hex, "path": attachment.path, **more}
    await machine.endpoint.request(verb, params, timeout_seconds=GUEST_SECONDS)


async def _unmounted(volume: Volume) -> None:
    """Return when the host has no mount of the volume any more. Raises VolumeInUseError."""
    try:
        await loop_device.wait_unused(volume.path)
    except OSError as error:
        raise VolumeInUseError("The host still has the volume in use") from error


async def _has_let_go(machine: Machine, disk: VolumeDisk) -> bool:
    driver = attaching(machine.driver)
    try:
        async with asyncio.timeout(LET_GO_SECONDS):
            while not await driver.has_let_go(machine.id, disk):
                await asyncio.sleep(LET_GO_POLL_SECONDS)
    except TimeoutError:
        return False
    return True


def _own_bytes(volume: Volume) -> int:
    with contextlib.suppress(FileNotFoundError):
        return own_bytes(volume.path)
    return 0


def _overlap(path: str, other: str) -> bool:
    return f"{path}/".startswith(f"{other}/") or f"{other}/".startswith(f"{path}/")
