"""The host's drivers by name: which of them start machines here, and why the others cannot.

A machine is its own driver's, whatever new ones are started with: so a driver that cannot start anything here still adopts, looks after and removes what an
earlier server started with it.
"""

from __future__ import annotations

import pwd
from collections.abc import Set
from dataclasses import dataclass, fields
from pathlib import Path

from innkeeper.core.isolation import Offer
from innkeeper.core.leak import LeakKind
from innkeeper.errors import UnavailableError
from innkeeper.host.directories import Directories
from innkeeper.host.drivers.accelerator import QEMU
from innkeeper.host.drivers.contract import Capabilities, Driver
from innkeeper.host.drivers.gvisor import GvisorDriver
from innkeeper.host.drivers.qemu import QemuDriver
from innkeeper.host.drivers.qemu_command import Accelerator
from innkeeper.host.inventory import VirtualHardware, choose_platform, choose_virtual_hardware
from innkeeper.host.kernels.kernel_store import BootFiles, KernelStore
from innkeeper.host.linux.cgroup import CgroupTree
from innkeeper.host.machine import MachineRecord
from innkeeper.settings import Settings

# Every QEMU runs as this one, and nothing else does.
VM_USER = "innkeeper-vm"
# Whoever starts nothing needs no user.
NOBODY = 65_534


@dataclass(frozen=True, slots=True)
class Registered:
    """A driver, and why it starts nothing here; None where it does."""

    driver: Driver
    why_not: str | None = None


class DriverRegistry:
    """The drivers of one host."""

    def __init__(self, *registered: Registered) -> None:
        self._registered = {one.driver.name: one for one in registered}

    def offers(self) -> list[Offer]:
        """What the host tells of them."""
        return [
            Offer(
                name,
                one.driver.isolation if one.why_not is None else None,
                one.driver.isolation.reason if one.why_not is None else one.why_not,
                capability_names(one.driver.capabilities),
            )
            for name, one in self._registered.items()
        ]

    def starting(self, name: str) -> Driver:
        """The driver to start a machine with. Raises UnavailableError where it cannot."""
        one = self._registered.get(name)
        if one is None:
            raise UnavailableError(f"This host has no driver {name!r}")
        if one.why_not is not None:
            raise UnavailableError(f"The driver {name!r} cannot run on this host: {one.why_not}")
        return one.driver

    def of(self, record: MachineRecord) -> Driver | None:
        """The driver that a machine was started with; None for one of another version of the server."""
        one = self._registered.get(record.driver)
        return None if one is None else one.driver

    # --- what is asked of all of them ------------------------------------------------------------------------------

    async def found(self) -> set[str]:
        """Ids of all machines of this server that exist in any form."""
        found: set[str] = set()
        for one in self._registered.values():
            found |= await one.driver.found()
        return found

    async def stop(self, machine_id: str) -> None:
        """End whatever runs under an id, for one whose driver is not known."""
        for one in self._registered.values():
            await one.driver.stop(machine_id)

    def leftovers(self, keep: Set[str]) -> list[tuple[LeakKind, str, str]]:
        """What exists of machines that are not in `keep`, as Driver.leftovers tells it; what several see is told once. Call it in a thread."""
        return list(dict.fromkeys(found for one in self._registered.values() for found in one.driver.leftovers(keep)))

    async def end_strays(self, keep: Set[str]) -> int:
        """End what an earlier daemon had begun beside the machines `keep`; how many processes that were."""
        ended = 0
        for one in self._registered.values():
            ended += await one.driver.end_strays(keep)
        return ended

    async def close(self, *, keep_running: bool) -> None:
        """Let go of all machines, or stop them."""
        for one in self._registered.values():
            await one.driver.close(keep_running=keep_running)


def capability_names(capabilities: Capabilities) -> frozenset[str]:
    """The names of those that a driver has."""
    return frozenset(field.name for field in fields(capabilities) if getattr(capabilities, field.name))


async def open_drivers(settings: Settings, directories: Directories, *, agent: Path) -> DriverRegistry:
    """Every driver, tried; `agent` is the binary that microVMs boot. Raises UnavailableError where none can run machines here."""
    refused: list[str] = []
    registered = [
        await _tried_gvisor(settings, directories, refused),
        await _tried_qemu(settings, directories, agent, refused),
    ]
    if len(refused) == len(registered):
        raise UnavailableError("\n".join(refused))
    return DriverRegistry(*registered)


def known_drivers(settings: Settings, directories: Directories) -> DriverRegistry:
    """Every driver, untried: to look at what there is, not to start anything."""
    untried = "it was not tried"
    return DriverRegistry(
        Registered(_gvisor(settings, directories), untried), Registered(_qemu(settings, directories), untried)
    )


async def _tried_gvisor(settings: Settings, directories: Directories, refused: list[str]) -> Registered:
    try:
        choice = await choose_platform(settings)
    except UnavailableError as error:
        refused.append(error.message)
        # What to do about it is for the operator, who reads it in `inn doctor`.
        return Registered(_gvisor(settings, directories), error.message.partition("\n")[0])
    return Registered(_gvisor(settings, directories, platform=choice.platform, reason=choice.reason))


def _gvisor(settings: Settings, directories: Directories, *, platform: str = "", reason: str = "") -> GvisorDriver:
    return GvisorDriver(
        runsc=settings.runsc,
        platform=platform,
        root=directories.runsc,
        tree=CgroupTree.detect(),
        group_name=f"innkeeper-{settings.server_id}",
        reason=reason,
    )


async def _tried_qemu(settings: Settings, directories: Directories, agent: Path, refused: list[str]) -> Registered:
    try:
        hardware = await choose_virtual_hardware(settings)
        user = _vm_user()
        boot = await _newest_kernel(settings, agent)
    except UnavailableError as error:
        refused.append(error.message)
        return Registered(_qemu(settings, directories), error.message.partition("\n")[0])
    return Registered(_qemu(settings, directories, hardware=hardware, boot=boot, uid=user))


def _vm_user() -> int:
    try:
        return pwd.getpwnam(VM_USER).pw_uid
    except KeyError:
        raise UnavailableError(f"there is no user {VM_USER}, as whom virtual machines run") from None


async def _newest_kernel(settings: Settings, agent: Path) -> BootFiles:
    store = KernelStore(settings.host_dir)
    kernels = store.kernels()
    if not kernels:
        raise UnavailableError("there is no kernel for virtual machines; run: inn kernel fetch")
    return await store.boot_files(kernels[-1], agent)


def _qemu(
    settings: Settings,
    directories: Directories,
    *,
    hardware: VirtualHardware | None = None,
    boot: BootFiles | None = None,
    uid: int = NOBODY,
) -> QemuDriver:
    return QemuDriver(
        qemu=QEMU if hardware is None else hardware.qemu,
        accelerator=Accelerator.TCG if hardware is None else hardware.accelerator,
        tsc_khz=None if hardware is None else hardware.tsc_khz,
        boot=boot,
        directory=directories.microvms,
        tree=CgroupTree.detect(),
        group_name=f"innkeeper-{settings.server_id}-vm",
        uid=uid,
        kvm_group=None if hardware is None or hardware.accelerator is not Accelerator.KVM else _kvm_group(),
        reason="" if hardware is None else hardware.reason,
    )


def _kvm_group() -> int:
    """The group of those who may open the device."""
    return Path("/dev/kvm").stat().st_gid
