"""The host's drivers by name: which of them start machines here, and why the others cannot.

A machine is its own driver's, whatever new ones are started with: so a driver that cannot start anything here still adopts, looks after and removes what an
earlier server started with it.
"""

from __future__ import annotations

import os
from collections.abc import Set
from dataclasses import dataclass, fields
from pathlib import Path

from innkeeper import shipped
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
from innkeeper.host.kernels.kernel_package import KernelUnavailableError
from innkeeper.host.kernels.kernel_store import BootFiles, KernelStore
from innkeeper.host.linux.cgroup import CgroupTree
from innkeeper.host.machine import MachineRecord
from innkeeper.host.probes.virtual_machines import (
    MACHINE,
    VM_USER,
    check_guest_kernel,
    check_qemu,
    check_vm_user,
    find_user,
    locate_qemu,
)
from innkeeper.settings import Settings

# Whoever starts nothing needs no user.
NOBODY = 65_534


@dataclass(frozen=True, slots=True)
class Registered:
    """A driver, and why it starts nothing here; None where it does. `boot` is what its machines boot, where they do."""

    driver: Driver
    why_not: str | None = None
    boot: BootFiles | None = None


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

    @property
    def booted(self) -> frozenset[str]:
        """The identities of what machines boot."""
        return frozenset(one.boot.identity for one in self._registered.values() if one.boot is not None)

    def usable(self) -> list[Driver]:
        """The drivers that start machines here."""
        return [one.driver for one in self._registered.values() if one.why_not is None]

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
        hubs=directories.hubs,
        tree=CgroupTree.detect(),
        group_name=f"innkeeper-{settings.server_id}",
        reason=reason,
    )


async def _tried_qemu(settings: Settings, directories: Directories, agent: Path, refused: list[str]) -> Registered:
    try:
        user = _vm_user(settings)
        # Before the hardware is chosen, where the kernel is booted to try KVM.
        boot = await _boot_files(settings, agent)
        hardware = await choose_virtual_hardware(settings)
    except UnavailableError as error:
        refused.append(error.message)
        return Registered(_qemu(settings, directories), error.message.partition("\n")[0])
    return Registered(_qemu(settings, directories, hardware=hardware, boot=boot, user=user), boot=boot)


def _vm_user(settings: Settings) -> tuple[int, int]:
    """The user and group of virtual machines. Raises UnavailableError where there is nobody, or nothing, to run them."""
    path, machine = locate_qemu(), os.uname().machine
    if path is None or machine != MACHINE:
        raise UnavailableError(check_qemu(path, None, machine=machine).sentence())
    check, user = check_vm_user(api_user=settings.api_user, name=VM_USER), find_user(VM_USER)
    if user is None or not check.ok:
        raise UnavailableError(check.sentence())
    return user


async def _boot_files(settings: Settings, agent: Path) -> BootFiles:
    store = KernelStore(settings.host_dir)
    try:
        kernel = await store.newest(brought=shipped.ready_kernel())
    except (KernelUnavailableError, OSError) as error:
        raise UnavailableError(f"guest kernel: {error}") from error
    if kernel is None:
        raise UnavailableError(check_guest_kernel(settings.home, settings.host_dir).sentence())
    return await store.boot_files(kernel, agent)


def _qemu(
    settings: Settings,
    directories: Directories,
    *,
    hardware: VirtualHardware | None = None,
    boot: BootFiles | None = None,
    user: tuple[int, int] = (NOBODY, NOBODY),
) -> QemuDriver:
    return QemuDriver(
        qemu=QEMU if hardware is None else hardware.qemu,
        accelerator=Accelerator.TCG if hardware is None else hardware.accelerator,
        tsc_khz=None if hardware is None else hardware.tsc_khz,
        boot=boot,
        directory=directories.microvms,
        tree=CgroupTree.detect(),
        group_name=f"innkeeper-{settings.server_id}-vm",
        uid=user[0],
        gid=user[1],
        kvm_group=None if hardware is None else hardware.kvm_group,
        reason="" if hardware is None else hardware.reason,
    )
