"""Builds machines: plan, then resources on one exit stack, then ready. A half-built machine leaves nothing behind."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any
from uuid import UUID

from innkeeper.core.host_verbs import EnsureMachine, MachineShape, WarmPool
from innkeeper.core.instance import BootStep, InstanceState
from innkeeper.errors import GuestError, InnkeeperError, InstanceFailedError, UnavailableError
from innkeeper.host.directories import Directories
from innkeeper.host.disks.disk_pool import DiskPool
from innkeeper.host.disks.image_store import ImageStore
from innkeeper.host.disks.rootfs import DiskPlan, find_disk, mount_root, release
from innkeeper.host.drivers.contract import (
    DiskFiles,
    Driver,
    MachinePlan,
    RunningMachine,
    Tap,
    checkpointing,
    templating,
)
from innkeeper.host.drivers.registry import DriverRegistry
from innkeeper.host.guest_link import GuestEndpoint
from innkeeper.host.linux.freeze import thaw
from innkeeper.host.machine import HELD_STILL, Identity, Machine, MachineRecord
from innkeeper.host.network.addressing import Slot
from innkeeper.host.network.firewall import Limited, Policy, PolicyClass
from innkeeper.host.network.network import Network

ENTROPY_BYTES = 64
# Run once before a guest is frozen, so that a claim finds bash and python in memory. Images without them lose nothing.
WARM_LINES = ("true", "command -v python3 >/dev/null && python3 -c pass")
# A template's name and resolver.
NOBODY = "-"
NOWHERE = IPv4Address(0)

OnStep = Callable[[BootStep], None]


@dataclass(frozen=True, slots=True)
class Origin:
    """What a new machine begins as: a copy of a disk; and, with the folder `memory`, in the midst of what ran on it, under the agent of that name. `check`
    reads that memory, in a thread, and raises CheckpointDamagedError where it is not what was saved; no guest runs before it has returned.

    `template` is the folder of a template's memory: nothing ran on its disk yet. `same_guest`: the memory is its own, and knows its name.
    """

    disk: Path
    memory: Path | None = None
    agent: str = ""
    check: Callable[[], None] | None = None
    template: Path | None = None
    same_guest: bool = False


class Steps:
    """Stamps provisioning steps."""

    def __init__(self, on_step: OnStep) -> None:
        self._began = time.monotonic()
        self._on_step = on_step
        self.trace: list[BootStep] = []
        self.stamp(InstanceState.ACTIVE)

    def stamp(self, state: InstanceState) -> None:
        """Record that a step was reached."""
        step = BootStep(state.value, round((time.monotonic() - self._began) * 1000, 3))
        self.trace.append(step)
        self._on_step(step)

    def stamp_remaining(self) -> None:
        """Stamp what a warm guest had behind it already."""
        reached = {step.step for step in self.trace}
        for state in (
            InstanceState.NETWORK_ALLOCATED,
            InstanceState.FTAP_CREATED,
            InstanceState.IMAGE_GENERATED,
            InstanceState.VM_STARTED,
            InstanceState.VM_BOOTED,
        ):
            if state.value not in reached:
                self.stamp(state)


class MachineBuilder:
    """Builds, configures and names machines."""

    def __init__(
        self,
        *,
        directories: Directories,
        drivers: DriverRegistry,
        network: Network,
        disks: DiskPool,
        images: ImageStore,
        agent_dir: Path,
        freeze_after_seconds: float,
    ) -> None:
        self._directories = directories
        self._drivers = drivers
        self._network = network
        self._disks = disks
        self._images = images
        self._agent_dir = agent_dir
        self._freeze_after_seconds = freeze_after_seconds
        # Machines on their way up: nobody else knows them yet, and they are no leaks.
        self.under_way: set[str] = set()

    async def build(
        self,
        shape: MachineShape,
        *,
        steps: Steps,
        hostname: str | None = None,
        label: str = "room",
        disk: str | None = None,
        origin: Origin | None = None,
        instance_id: UUID | None = None,
        as_template: bool = False,
    ) -> Machine:
        """A machine whose agent answers, not yet configured. `disk` names an existing disk; without it a new one is made, empty or of an `origin`.
        Without a `hostname` it is `label` and the beginning of the machine's id. One `as_template` is kept, not used.

        Raises the typed error of the step that failed; nothing is left then (an existing disk stays).
        """
        if disk is not None and not self._disks.disk_path(disk).exists():
            # An empty disk in its place would look like a room that lost everything.
            raise InstanceFailedError("The instance's disk is not on this host any more")
        machine_id = secrets.token_hex(8)
        self.under_way.add(machine_id)
        # Beside everything that comes before the guest runs: a second for a gigabyte.
        check = None if origin is None or origin.check is None else asyncio.create_task(asyncio.to_thread(origin.check))
        try:
            return await self._build(
                machine_id,
                shape,
                steps=steps,
                hostname=hostname or f"{label}-{machine_id[:8]}",
                disk=disk,
                origin=origin,
                instance_id=instance_id,
                as_template=as_template,
                whole=check,
            )
        finally:
            self.under_way.discard(machine_id)
            if check is not None:
                # Whoever removes the memory next finds nobody who reads it.
                await asyncio.wait([check])

    async def _build(
        self,
        machine_id: str,
        shape: MachineShape,
        *,
        steps: Steps,
        hostname: str,
        disk: str | None,
        origin: Origin | None,
        instance_id: UUID | None,
        as_template: bool,
        whole: asyncio.Task[None] | None,
    ) -> Machine:
        driver = self._drivers.starting(shape.driver)
        state_dir = self._directories.machines / machine_id
        async with AsyncExitStack() as stack:
            state_dir.mkdir(mode=0o700)
            stack.callback(shutil.rmtree, state_dir, ignore_errors=True)
            slot = await self._network.acquire(_policy(shape))
            stack.push_async_callback(self._network.release, slot)
            steps.stamp(InstanceState.NETWORK_ALLOCATED)
            steps.stamp(InstanceState.FTAP_CREATED)
            record = MachineRecord(
                machine_id,
                shape,
                driver.name,
                disk or machine_id,
                slot.index,
                instance_id=instance_id,
                hostname=hostname,
                agent=self._agent_of(origin),
                memory_needs=await _memory_needs(driver),
            )
            record.save(state_dir)
            if instance_id is not None:
                # Before anything runs: a machine that stands on an instance's disk must never be taken for a spare one.
                record.save_claim(state_dir)
            stack.push_async_callback(self._release_disk, record)
            plan = replace(self._disk_plan(driver, record), copy_of=None if origin is None else origin.disk)
            root, upper = await self._make_root(driver, record, plan, stack)
            steps.stamp(InstanceState.IMAGE_GENERATED)
            endpoint = GuestEndpoint(state_dir / "link")
            await _expect(driver, endpoint)
            stack.push_async_callback(endpoint.close, remove=True)
            machine_plan = MachinePlan(
                machine_id=machine_id,
                rootfs=root,
                hostname=record.hostname,
                netns=slot.netns_path,
                agent_dir=self._agent_dir.parent / record.agent,
                link_dir=endpoint.directory,
                state_dir=state_dir,
                memory_mb=shape.memory_mb,
                vcpu_count=shape.vcpu_count,
                as_template=as_template,
                same_guest=origin is not None and origin.same_guest,
            )
            if driver.needs.dialled:
                endpoint.dial()
            running = await self._run(driver, machine_plan, slot, origin, whole)
            running.exited.add_done_callback(lambda _: endpoint.give_up(running.why()))
            stack.push_async_callback(driver.stop, machine_id)
            steps.stamp(InstanceState.VM_STARTED)
            await endpoint.link(timeout_seconds=driver.patience_seconds)
            steps.stamp(InstanceState.VM_BOOTED)
            return Machine(
                record=record,
                state_dir=state_dir,
                driver=driver,
                running=running,
                endpoint=endpoint,
                upper=upper,
                lowers=self._lowers(driver, record),
                resources=stack.pop_all(),
                freeze_after_seconds=self._freeze_after_seconds,
                restored=origin is not None and origin.memory is not None,
                cloned=origin is not None and origin.template is not None,
                # What was saved may run programs; nobody has asked it yet.
                user_processes=0 if origin is None or origin.memory is None else 1,
            )

    async def _make_root(
        self, driver: Driver, record: MachineRecord, plan: DiskPlan, stack: AsyncExitStack
    ) -> tuple[Path | DiskFiles, Path | None]:
        """The root as the driver takes it, and where what the guest writes appears on the host, if it does."""
        if driver.needs.disk_files:
            return DiskFiles(self._images.file(record.shape.image_digest), await find_disk(self._disks, plan)), None
        mounted = await mount_root(self._disks, plan)
        stack.push_async_callback(release, plan.mount_directory)
        return mounted.root, mounted.upper

    async def _run(
        self, driver: Driver, plan: MachinePlan, slot: Slot, origin: Origin | None, whole: asyncio.Task[None] | None
    ) -> RunningMachine:
        """The machine of a plan, started, or going on from the memory of its origin."""
        descriptor = await self._network.open_tap(slot) if driver.needs.tap else None
        try:
            if descriptor is not None:
                plan = replace(plan, tap=Tap(descriptor, slot.mac))
            if origin is not None and origin.template is not None:
                return await templating(driver).clone(plan, origin.template)
            if origin is not None and origin.memory is not None:
                return await checkpointing(driver).restore(plan, origin.memory, whole=whole)
            return await driver.start(plan)
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _agent_of(self, origin: Origin | None) -> str:
        """The version of the agent. Memory that was saved has parts of the program's file mapped, and needs the very same."""
        return self._agent_dir.name if origin is None or not origin.agent else origin.agent

    async def adopt(self, record: MachineRecord) -> Machine | None:
        """The machine of a record, if everything of it is still there; None when it must be cleaned away instead."""
        state_dir = self._directories.machines / record.machine_id
        driver = self._drivers.of(record)
        if driver is None:
            return None
        plan = self._disk_plan(driver, record)
        running = await driver.adopt(record.machine_id, state_dir)
        if running is None:
            return None
        mounted = not driver.needs.disk_files
        if mounted:
            # Not by the list of mounts, which is as long as there are guests: a hundred of them would read it a hundred times.
            if not os.path.ismount(plan.overlay.target):  # noqa: ASYNC240 - two lstat(2)
                return None
            # A daemon that was killed in the moment of a backup left it frozen: its guest's next write would never end.
            thaw(plan.mount_directory / "disk")
        if (state_dir / HELD_STILL).exists():
            # Likewise in the moment of a checkpoint.
            await checkpointing(driver).resume(record.machine_id)
            (state_dir / HELD_STILL).unlink()
        async with AsyncExitStack() as stack:
            try:
                slot = await self._network.adopt(record.slot_index, _policy(record.shape))
            except InnkeeperError:
                return None
            stack.callback(shutil.rmtree, state_dir, ignore_errors=True)
            stack.push_async_callback(self._network.release, slot)
            stack.push_async_callback(self._release_disk, record)
            if mounted:
                stack.push_async_callback(release, plan.mount_directory)
            endpoint = GuestEndpoint(state_dir / "link")
            await _expect(driver, endpoint)
            stack.push_async_callback(endpoint.close, remove=True)
            stack.push_async_callback(driver.stop, record.machine_id)
            running.exited.add_done_callback(lambda _: endpoint.give_up(running.why()))
            frozen = driver.is_frozen(record.machine_id)
            if not frozen:
                # The earlier daemon may have ended in the middle of a freeze, which would take hold behind our back.
                driver.thaw(record.machine_id)
            if driver.needs.dialled:
                endpoint.dial()
            return Machine(
                record=record,
                state_dir=state_dir,
                driver=driver,
                running=running,
                endpoint=endpoint,
                upper=plan.overlay.upper if mounted else None,
                lowers=self._lowers(driver, record),
                resources=stack.pop_all(),
                freeze_after_seconds=self._freeze_after_seconds,
                frozen=frozen,
                # Unknown until it is asked: it is not frozen before that.
                user_processes=1,
            )
        return None

    def _lowers(self, driver: Driver, record: MachineRecord) -> tuple[Path, ...]:
        return () if driver.needs.disk_files else (self._images.mount(record.shape.image_digest),)

    def _disk_plan(self, driver: Driver, record: MachineRecord) -> DiskPlan:
        return DiskPlan(
            name=record.disk,
            size_mib=record.shape.disk_mb,
            lowers=self._lowers(driver, record),
            mount_directory=self._directories.mounts / record.machine_id,
        )

    async def _release_disk(self, record: MachineRecord) -> None:
        """Remove a machine's disk, unless it is an instance's: that one outlives its machines."""
        if record.instance_id is None:
            # A spare guest's disk is the one that was made with it; any other is somebody's.
            owned = record.disk != record.machine_id
        else:
            try:
                owned = self._directories.disk_of(record.instance_id) == record.disk
            except UnavailableError:
                owned = True
        if not owned:
            await self._disks.remove_disk(record.disk)

    async def remove_disk(self, name: str) -> None:
        """Remove a disk that no machine uses any more."""
        await self._disks.remove_disk(name)

    async def prime(self, machine: Machine, pool: WarmPool) -> None:
        """Give a guest of a pool its identity ahead, and what makes its first command fast."""
        identity = Identity(pool.user or pool.shape.user, pool.workdir, pool.env)
        # What a template ran before it was kept is in the memory of its clones. Once more, it would be memory of their own: where instructions are translated
        # 30 MB of translations.
        await self._configure(machine, identity, warm=[] if machine.cloned else list(WARM_LINES))
        machine.primed = identity
        machine.record.save_primed(machine.state_dir)

    async def warm_up(self, machine: Machine) -> None:
        """Have a machine that is to be a template run what every guest runs first. What it is configured as is nobody's.

        Nothing of it goes on running: a shell that does would have the same random numbers in every clone. Its network stays down, since a clone would have
        to take it down first, for which a kernel waits several of its ticks. Its files of names are the shortest that there are: a clone then writes its
        own over them, and has nothing to cut off.
        """
        await self._configure(
            machine,
            Identity(machine.record.shape.user, None, {}),
            hostname=NOBODY,
            hosts=hosts_file(NOBODY),
            resolv_conf=resolv_conf(NOWHERE),
            spare_shell=False,
            network=None,
            warm=list(WARM_LINES),
        )

    async def configure(self, machine: Machine, request: EnsureMachine) -> bool:
        """Give a guest its identity: the last step before ready. Whether that wrote to it. Raises GuestError when it cannot be used."""
        identity = Identity(request.user or request.shape.user, request.workdir, request.env)
        if machine.primed == identity:
            # It has all that already; what is left to know is that its agent answers.
            patience = machine.driver.patience_seconds
            if machine.driver.needs.clock:
                await machine.set_clock(timeout_seconds=patience)
                return False
            link = await machine.endpoint.link(timeout_seconds=patience)
            async with asyncio.timeout(patience):
                await link.ping()
            return False
        await self._configure(machine, identity, sudo=not request.bare, spare_shell=not request.bare)
        machine.primed = identity
        return True

    async def _configure(self, machine: Machine, identity: Identity, **special: Any) -> None:
        """Send the verb `configure` with what a machine's identity is, and `special` parameters in place of these."""
        slot = self._network.plan.slot(machine.record.slot_index)
        hostname = machine.record.hostname
        params: dict[str, Any] = {
            "hostname": hostname,
            # Derived, so that a guest that starts again on its disk stays the same machine to its programs.
            "machine_id": hashlib.sha256(machine.record.disk.encode()).hexdigest()[:32],
            "user": identity.user,
            "workdir": identity.workdir,
            "env": identity.env,
            "time_unix_ns": time.time_ns(),
            "entropy_b64": base64.b64encode(os.urandom(ENTROPY_BYTES)).decode(),
            "hosts": hosts_file(hostname),
            "resolv_conf": resolv_conf(slot.resolver_ip),
            "sudo": True,
            "spare_shell": True,
            "restored": machine.restored,
            "network": _network_of(slot) if machine.driver.needs.tap else None,
            **special,
        }
        machine.clock_set_at = time.monotonic()
        answer = await machine.endpoint.request("configure", params, timeout_seconds=machine.driver.patience_seconds)
        if answer.get("tmp_is_tmpfs"):
            # Files there would escape the disk, its quota and files_changed.
            raise GuestError("The image has an empty /tmp, which gVisor covers with a tmpfs: put a file into it")

    async def discard(self, machine: Machine) -> None:
        """Stop a machine and release everything of it."""
        await asyncio.shield(machine.close(stop=True))


async def _expect(driver: Driver, endpoint: GuestEndpoint) -> None:
    """Have a place for the guest's link, listening there where the guest is who dials."""
    if driver.needs.dialled:
        endpoint.directory.mkdir(mode=0o755, exist_ok=True)
    else:
        await endpoint.listen()


def _network_of(slot: Slot) -> dict[str, Any]:
    """What a guest behind a tap makes of its interface."""
    return {
        "interface": slot.guest_interface,
        "mac": slot.mac,
        "address": str(slot.guest_ip),
        "prefix": slot.prefix_length,
        "gateway": str(slot.gateway_ip),
    }


async def _memory_needs(driver: Driver) -> dict[str, str]:
    return await checkpointing(driver).memory_needs() if driver.capabilities.checkpoint else {}


def hosts_file(hostname: str) -> str:
    """/etc/hosts of a guest."""
    return f"127.0.0.1\tlocalhost\n127.0.1.1\t{hostname}\n::1\tlocalhost ip6-localhost ip6-loopback\n"


def resolv_conf(resolver: IPv4Address) -> str:
    """/etc/resolv.conf of a guest: our resolver and nothing else."""
    return f"nameserver {resolver}\noptions timeout:5 attempts:2\n"


def _policy(shape: MachineShape) -> Policy:
    if shape.egress_mode == "limited":
        return Limited(shape.egress_ports, tuple(map(IPv4Network, shape.egress_cidrs)))
    return PolicyClass(shape.egress_mode)
