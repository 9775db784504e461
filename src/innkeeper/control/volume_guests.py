"""Guests that have a volume which no VM has, for its files' sake: neither the server nor its host's tools ever read what is in a volume.

One is started by the first who asks for a file, and kept for a minute after the last one. It goes at once when somebody else needs the volume.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING
from uuid import UUID
from weakref import WeakValueDictionary

import structlog

from innkeeper.control import clock, placement, vm_shape, volume_work
from innkeeper.control.guest_calls import until_done
from innkeeper.control.host_table import HostEntry
from innkeeper.control.live_table import Entry
from innkeeper.control.mount_work import ATTACH_SECONDS
from innkeeper.control.passing_guest import passing_guest
from innkeeper.control.vm_entry import VmEntry
from innkeeper.core.host_verbs import EnsureMachine, Execute, MachineShape
from innkeeper.core.instance import Instance, InstanceState
from innkeeper.core.isolation import Offer, Wish
from innkeeper.core.token import Principal
from innkeeper.core.volume import Volume
from innkeeper.core.volume_verbs import AttachVolume, DetachVolume
from innkeeper.errors import (
    InnkeeperError,
    InstanceFailedError,
    InstanceNotFoundError,
    NoHostError,
    UnavailableError,
    VolumeFailedError,
    VolumeInUseError,
)
from innkeeper.ids import public_key_id, uuid7

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

# What marks the rows of such guests.
LABEL = "volume_files"
PATH = "/volume"
VCPUS = 1
MEMORY_MB = 256
DISK_MB = 64
KEEP_SECONDS = 60.0
# How long whoever needs a volume waits for a transfer of somebody else's to end.
LET_GO_SECONDS = 10.0
SYNC_SECONDS = 120.0
SYNC_ARGV = ("/bin/sync", "-f", PATH)


class VolumeEntry(Entry):
    """A guest that has a volume, for the verbs of files. Nobody finds it in the live table, and it is not started again on its disk."""

    __slots__ = ("_volume_id",)

    kind = "volume"

    def __init__(self, volume: Volume, instance: Instance, host: HostEntry, offer: Offer) -> None:
        spec = vm_shape.new_spec(
            volume.organization_id,
            volume.id,
            image=instance.image,
            vcpu_count=VCPUS,
            memory_mb=MEMORY_MB,
            disk_mb=DISK_MB,
            wish=Wish(offer.driver, "none"),
        )
        super().__init__((instance.id, LABEL), instance, spec, host.host)
        self._volume_id = volume.id

    @property
    def doomed(self) -> bool:
        """Always: whoever finds its machine gone must not begin another, which would not have the volume."""
        return True

    @property
    def marks(self) -> dict[str, str]:
        """Its volume."""
        return {"volume_id": str(self._volume_id)}


class _Guest:
    """A guest on its way up, in use, or on its way down; `leave` is set once: it is used by nobody new then."""

    def __init__(self, entry: VolumeEntry) -> None:
        self.entry = entry
        self.users = 0
        self.used_at = time.monotonic()
        self.idle = asyncio.Event()
        self.idle.set()
        self.leave = asyncio.Event()
        self.gone = asyncio.Event()
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Nobody may wait for it any more.
        self.ready.add_done_callback(lambda future: future.cancelled() or future.exception())

    @contextmanager
    def in_use(self) -> Iterator[None]:
        self.users += 1
        self.idle.clear()
        try:
            yield
        finally:
            self.users -= 1
            self.used_at = time.monotonic()
            if not self.users:
                self.idle.set()

    async def unwanted(self) -> None:
        """Return when it is to go: it was told to, or has been idle for long enough."""
        while not self.leave.is_set():
            await self.idle.wait()
            left = self.used_at + KEEP_SECONDS - time.monotonic()
            if left <= 0 and not self.users:
                self.leave.set()
                return
            try:
                async with asyncio.timeout(max(left, 0.01)):
                    await self.leave.wait()
            except TimeoutError:
                continue


class VolumeGuests:
    """Those of this process, at most one of a volume; and the transfers of volumes' files that go through VMs."""

    def __init__(self) -> None:
        self._guests: dict[UUID, _Guest] = {}
        self._through_vms: dict[UUID, int] = {}
        self._quiet = asyncio.Condition()
        # Held while a guest of the volume comes or goes.
        self._locks: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def opened(self, control: Control, volume: Volume) -> AsyncIterator[VolumeEntry]:
        """A guest that has the volume at PATH, for the block.

        Raises:
            VolumeInUseError: somebody else has just got it.
            DriverNotOfferedError: a virtual machine has written it, and its host runs none now.
            RateLimitedError, NoHostError, UnavailableError: no guest can be started now, or it ended.

        """
        with ExitStack() as using:
            async with self._lock(volume.id):
                guest = self._guests.get(volume.id)
                if guest is not None and guest.leave.is_set():
                    await guest.gone.wait()
                    guest = None
                if guest is None:
                    guest = await self._begin(control, volume)
                # Without a pause since it was found to stay.
                using.enter_context(guest.in_use())
            try:
                await asyncio.shield(guest.ready)
                yield guest.entry
            except (InstanceNotFoundError, InstanceFailedError) as error:
                guest.leave.set()
                raise UnavailableError("The guest that had the volume has ended; ask again") from error

    async def let_go(self, volume_id: UUID) -> None:
        """Return when no guest of this kind has the volume. Raises VolumeInUseError: its files are being read or written."""
        async with self._lock(volume_id):
            guest = self._guests.get(volume_id)
            if guest is None:
                return
            try:
                async with asyncio.timeout(LET_GO_SECONDS):
                    await guest.idle.wait()
            except TimeoutError:
                raise VolumeInUseError("Files of the volume are being read or written") from None
            guest.leave.set()
            await guest.gone.wait()

    @asynccontextmanager
    async def through_vm(self, volume_id: UUID) -> AsyncIterator[None]:
        """Counts the block as a transfer of the volume's files through a VM that has it."""
        self._through_vms[volume_id] = self._through_vms.get(volume_id, 0) + 1
        try:
            yield
        finally:
            left = self._through_vms.pop(volume_id) - 1
            if left:
                self._through_vms[volume_id] = left
            async with self._quiet:
                self._quiet.notify_all()

    async def quiet(self, volume_id: UUID) -> None:
        """Return when none does. Raises VolumeInUseError."""
        try:
            async with asyncio.timeout(LET_GO_SECONDS), self._quiet:
                await self._quiet.wait_for(lambda: volume_id not in self._through_vms)
        except TimeoutError:
            raise VolumeInUseError("Files of the volume are being read or written") from None

    def _lock(self, volume_id: UUID) -> asyncio.Lock:
        return self._locks.setdefault(volume_id, asyncio.Lock())

    async def _begin(self, control: Control, volume: Volume) -> _Guest:
        told = (await volume_work.on_host(control, volume.host_id)).get(volume.id, {})
        host = control.hosts.get(volume.host_id)
        if host is None:
            raise NoHostError
        offer = placement.offer_for_files(control, host, guest_written=bool(told.get("guest_written")))
        entry = _entry_of(control, volume, host, offer)
        # Whoever attaches the volume notes that before this guest is told to let go.
        having = holders(control, volume.id)
        if having:
            raise VolumeInUseError(f"The volume is just being attached to {having[0].vm.vm_id}")
        guest = _Guest(entry)
        self._guests[volume.id] = guest
        try:
            control.tasks.spawn(self._live(control, volume, guest, offer), name="volume guest")
        except RuntimeError:
            del self._guests[volume.id]
            raise UnavailableError("The server is stopping") from None
        return guest

    async def _live(self, control: Control, volume: Volume, guest: _Guest, offer: Offer) -> None:
        instance, host_id = guest.entry.instance, volume.host_id
        try:
            async with passing_guest(control, instance, _request_of(instance, offer)):
                attach = AttachVolume(instance.id, volume.id, PATH)
                await volume_work.ask(control, host_id, attach, seconds=ATTACH_SECONDS)
                guest.ready.set_result(None)
                await guest.unwanted()
                detach = DetachVolume(instance.id, volume.id)
                await volume_work.ask(control, host_id, detach, seconds=ATTACH_SECONDS)
        except InnkeeperError as error:
            if guest.ready.done():
                # What was acknowledged is on the volume already.
                log.warning("a volume's guest did not let go", volume_id=str(volume.id), reason=error.message)
            else:
                guest.ready.set_exception(error)
        finally:
            if not guest.ready.done():
                guest.ready.set_exception(UnavailableError("The volume's guest could not be started"))
            del self._guests[volume.id]
            guest.leave.set()
            guest.gone.set()


def holders(control: Control, volume_id: UUID) -> list[VmEntry]:
    """The VMs that have a volume or are about to get it, whoever may write it first."""
    having = [
        entry for entry in control.live if isinstance(entry, VmEntry) and not entry.doomed and volume_id in entry.mounts
    ]
    return sorted(having, key=lambda entry: (entry.mounts[volume_id].read_only, not entry.ready))


async def sync(control: Control, principal: Principal, entry: VolumeEntry) -> None:
    """Have everything that was written to the guest's volume on it: its machine may end at any time. Raises VolumeFailedError."""
    verb = Execute(
        instance_id=entry.instance.id,
        execution_id=uuid7(),
        command="",
        timeout_seconds=SYNC_SECONDS,
        cwd="/",
        stream=True,
        argv=SYNC_ARGV,
        user=vm_shape.USER,
        exact_env=True,
    )
    answer = await until_done(control, principal, entry, verb)
    if answer["exit_code"] != 0:
        raise VolumeFailedError("What was written may not be on the volume")


def _entry_of(control: Control, volume: Volume, host: HostEntry, offer: Offer) -> VolumeEntry:
    name = vm_shape.standard_image(control.settings)
    image = control.images.resolve(volume.organization_id, name)
    if image is None or not image.usable:
        raise UnavailableError(f"The image {name!r} is not ready yet", retry_after_seconds=10)
    instance = Instance(
        id=uuid7(),
        organization_id=volume.organization_id,
        public_id=public_key_id(),
        profile_id=volume.id,
        image=name,
        state=InstanceState.READY,
        created_at=clock.now(),
        host_id=volume.host_id,
        labels={LABEL: str(volume.id)},
        image_digest=image.digest,
        vcpu_count=VCPUS,
        memory_mb=MEMORY_MB,
        disk_mb=DISK_MB,
    )
    return VolumeEntry(volume, instance, host, offer)


def _request_of(instance: Instance, offer: Offer) -> EnsureMachine:
    shape = MachineShape(
        pool_key="",
        image_digest=instance.image_digest,
        driver=offer.driver,
        vcpu_count=instance.vcpu_count,
        memory_mb=instance.memory_mb,
        disk_mb=instance.disk_mb,
        egress_mode="none",
    )
    return EnsureMachine(
        instance.id, shape, f"volume-{instance.id.hex[-8:]}", user=vm_shape.USER, workdir="/", bare=True
    )
