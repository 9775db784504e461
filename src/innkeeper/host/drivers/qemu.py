"""Machines as microVMs (QEMU): a kernel of their own on virtual hardware. Facts and traps behind the choices here: docs/drivers.md."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Set
from dataclasses import replace
from pathlib import Path

import structlog

from innkeeper.core.instance import Isolation
from innkeeper.core.leak import LeakKind
from innkeeper.errors import CheckpointFailedError, InstanceNotFoundError, UnavailableError, VolumeFailedError
from innkeeper.host.completion import to_its_end
from innkeeper.host.drivers.accelerator import ask_version, why_not_running
from innkeeper.host.drivers.contract import Capabilities, DiskFiles, MachinePlan, Needs, VolumeDisk
from innkeeper.host.drivers.memory_needs import ProgramVersion, cpu_digest
from innkeeper.host.drivers.process_machine import ProcessMachine, ProcessMachines
from innkeeper.host.drivers.qemu_command import Accelerator, VmPlan, host_memory_mb, options_digest, qemu_command
from innkeeper.host.drivers.qmp import Event, Qmp, QmpError, QmpLostError, ignore
from innkeeper.host.drivers.strays import Strays
from innkeeper.host.drivers.vm_jail import INITRAMFS, KERNEL, PIDS_MAX, PLAN, JailFailedError, VmJail, heard
from innkeeper.host.drivers.vm_memory import STATE, STOP_SECONDS, Stops, go_on, load_state, save_state
from innkeeper.host.drivers.vm_template import TemplateMemories
from innkeeper.host.drivers.vm_volumes import Unplugged, plug_in, pull_out
from innkeeper.host.guest_link import SOCKET_NAME
from innkeeper.host.kernels.kernel_store import BootFiles
from innkeeper.host.linux import guest_written, unix_socket
from innkeeper.host.linux.cgroup import CgroupTree, Usage
from innkeeper.host.linux.command import CommandFailed

log = structlog.stdlib.get_logger(__name__)

VM_PID = "vm.pid"
CONTROL_SOCKET = "control.sock"
# QEMU takes one connection at a time; another waits for it.
BACKLOG = 4
MIB = 1_048_576
# Of a migration: without memory that is a file which both sides have.
BUT_SHARED = ("x-ignore-shared",)
# Without memory a state has 70 KiB.
DEVICES_BYTES = 64 * MIB
_MACHINE = re.compile(rb"/machines/([^/\0]+)/")


class QemuDriver:
    """Runs machines as microVMs.

    Args:
        qemu: the binary.
        accelerator: what runs the guests' instructions here.
        tsc_khz: the rate of the host's time stamp counter; TCG needs it.
        boot: the guests' kernel, and their first root with the agent as init; None for a driver that starts nothing.
        directory: the driver's own, for the roots of its jails.
        uid: the user that every QEMU runs as, and nobody else.
        gid: that user's group.
        kvm_group: the group that may open /dev/kvm.
        reason: why this accelerator, for `isolation`.

    """

    name = "qemu"
    capabilities = Capabilities(
        freeze=True, templates=True, volumes=True, checkpoint=True, fork=True, disk_snapshot=True, stands_still=True
    )
    needs = Needs(disk_files=True, tap=True, dialled=True, clock=True)

    def __init__(
        self,
        *,
        qemu: str,
        accelerator: Accelerator,
        tsc_khz: int | None,
        boot: BootFiles | None,
        directory: Path,
        tree: CgroupTree,
        group_name: str,
        uid: int,
        gid: int,
        kvm_group: int | None = None,
        reason: str,
    ) -> None:
        self._qemu = qemu
        self._accelerator = accelerator
        self._tsc_khz = tsc_khz
        self._boot = boot
        # A kernel whose instructions are translated boots in 4 s on a quiet host, and was seen to take 25 s on a busy one.
        self.patience_seconds = 15.0 if accelerator is Accelerator.KVM else 180.0
        self._parent = tree.server_root(group_name)
        self._reason = reason
        self._jail = VmJail(
            root=directory / "root",
            mark=f"microvm:{self._parent.path}",
            uid=uid,
            gid=gid,
            groups=() if kvm_group is None else (kvm_group,),
            devices=(Path("/dev/kvm"),) if accelerator is Accelerator.KVM else (),
        )
        self._machines = ProcessMachines(self._parent, pid_file=VM_PID, ended="The virtual machine ended")
        self._strays = Strays(os.fsencode(self._jail.mark), _MACHINE)
        self._version = ProgramVersion(qemu, self._ask_version)
        self._cpu = cpu_digest()
        self._memories = TemplateMemories()
        # Where each running machine's QEMU takes commands, and whose turn it is.
        self._controls: dict[str, tuple[Path, asyncio.Lock]] = {}

    @property
    def isolation(self) -> Isolation:
        """A kernel of the guest's own between it and the host's, on virtual hardware."""
        return Isolation(
            level="microvm",
            driver=self.name,
            platform=self._accelerator.value,
            reason=self._reason,
            accelerator=self._accelerator.value,
        )

    async def start(self, plan: MachinePlan) -> ProcessMachine:
        """Start a microVM; returns when QEMU says that its processors run."""
        return await self._launch(plan, state=None)

    async def restore(self, plan: MachinePlan, folder: Path, *, whole: Awaitable[None] | None = None) -> ProcessMachine:
        """See Checkpointing. Name and address are the agent's to set, which still has those of the guest that was saved."""
        return await self._launch(plan, state=folder / STATE, whole=whole)

    async def keep(self, machine_id: str, folder: Path) -> None:
        """See Templating: devices by QEMU, and memory, which it shares with us, as it is."""
        try:
            async with self._control(machine_id) as session:
                await session.execute("stop")
                await save_state(session, folder / STATE, limit_bytes=DEVICES_BYTES, capabilities=BUT_SHARED)
            await self._memories.keep(machine_id, folder)
        except (QmpError, OSError) as error:
            raise CheckpointFailedError(f"The virtual machine could not be kept: {error}") from error

    async def clone(self, plan: MachinePlan, folder: Path) -> ProcessMachine:
        """See Templating."""
        try:
            # One of our own, should the template be forgotten meanwhile.
            memory = os.dup(await self._memories.of(folder))
        except OSError as error:
            raise JailFailedError(f"A template's memory cannot be read: {error.strerror}") from error
        try:
            return await self._launch(plan, state=folder / STATE, memory=memory)
        finally:
            os.close(memory)

    async def memory_needs(self) -> dict[str, str]:
        """See Checkpointing. Kernel and agent are in the memory, so an upgrade of either leaves it usable; the options stand for all that is made of them."""
        return {
            "qemu": await self._version.text(),
            "accelerator": self._accelerator.value,
            "options": options_digest(self._accelerator, self._tsc_khz),
            "cpu": self._cpu,
        }

    async def template_needs(self) -> dict[str, str]:
        """See Templating. New guests get the newest kernel and agent."""
        return {**await self.memory_needs(), "kernel": "" if self._boot is None else self._boot.identity}

    async def _ask_version(self) -> str:
        found = await ask_version(self._qemu)
        return "" if found is None else found.text

    def forget(self, folder: Path) -> None:
        """See Templating."""
        self._memories.forget(folder)

    def held_bytes(self) -> int:
        """See Templating."""
        return self._memories.held_bytes()

    async def _launch(
        self,
        plan: MachinePlan,
        *,
        state: Path | None,
        memory: int | None = None,
        whole: Awaitable[None] | None = None,
    ) -> ProcessMachine:
        try:
            with contextlib.ExitStack() as files:
                return await self._start(plan, files, state, memory, whole)
        except BaseException as error:
            await asyncio.shield(self.stop(plan.machine_id))
            if isinstance(error, CommandFailed):
                log.warning("qemu could not be begun", machine=plan.machine_id, error=str(error))
                raise JailFailedError from error
            raise

    async def _start(
        self,
        plan: MachinePlan,
        files: contextlib.ExitStack,
        state: Path | None,
        memory: int | None,
        whole: Awaitable[None] | None,
    ) -> ProcessMachine:
        if self._boot is None:
            raise JailFailedError("There is no kernel for virtual machines")
        hears, said = os.pipe()
        files.callback(os.close, hears)
        files.callback(os.close, said)
        os.set_blocking(hears, False)
        if plan.as_template:
            memory = self._memories.begin(plan.machine_id, plan.memory_mb * MIB)
        vm = replace(
            self._vm_plan(plan, files), incoming=state is not None, memory=memory, memory_shared=plan.as_template
        )
        self._jail.prepare()
        group = self._parent.child(plan.machine_id)
        group.create()
        group.set_limits(memory_bytes=host_memory_mb(vm) * MIB, cpu_quota=float(plan.vcpu_count), pids_max=PIDS_MAX)
        jail = self._jail.plan(
            kernel=self._boot.kernel,
            initramfs=self._boot.initramfs,
            groups=[directory / "cgroup.procs" for directory in group.directories()],
            netns=plan.netns,
            file_bytes=_disk_files(plan).disk.stat().st_size,
        )
        (plan.state_dir / PLAN).write_text(json.dumps(jail))
        command = self._jail.command(self._boot.agent, plan.state_dir / PLAN, qemu_command(self._qemu, vm))
        descriptors = [
            number for number in (vm.control, vm.link, vm.image, vm.disk, vm.tap, vm.memory) if number is not None
        ]
        try:
            pid = await self._jail.start(command, pass_fds=descriptors, said=said)
            (plan.state_dir / VM_PID).write_text(str(pid))
            machine = self._watch(plan.machine_id, plan.state_dir, pid)
            async with self._control(plan.machine_id) as session:
                if state is not None:
                    await load_state(session, state, capabilities=() if memory is None else BUT_SHARED)
                    if whole is not None:
                        await whole
                    await session.execute("cont")
                await self._confirm(session)
        except (JailFailedError, QmpError) as error:
            # The instance's failure is for its user: what QEMU said is for the log.
            log.warning("qemu did not start", machine=plan.machine_id, error=str(error), said=heard(hears))
            raise JailFailedError from error
        return machine

    def _vm_plan(self, plan: MachinePlan, files: contextlib.ExitStack) -> VmPlan:
        """The plan with everything open that QEMU gets, until `files` closes."""
        root = _disk_files(plan)

        def opened(path: Path, flags: int) -> int:
            descriptor = os.open(path, flags | os.O_CLOEXEC)
            files.callback(os.close, descriptor)
            return descriptor

        disk = opened(root.disk, os.O_RDWR)
        # Before the guest can write it: from then on the host's kernel does not mount it.
        guest_written.mark(disk)
        return VmPlan(
            name=plan.machine_id,
            accelerator=self._accelerator,
            memory_mb=plan.memory_mb,
            vcpu_count=plan.vcpu_count,
            kernel=KERNEL,
            initramfs=INITRAMFS,
            # Made here, so that there is no moment in which nobody listens, and no path that QEMU must know.
            control=files.enter_context(unix_socket.listen(plan.state_dir / CONTROL_SOCKET, backlog=BACKLOG)).fileno(),
            link=files.enter_context(unix_socket.listen(plan.link_dir / SOCKET_NAME, backlog=BACKLOG)).fileno(),
            image=opened(root.image, os.O_RDONLY),
            disk=disk,
            tap=None if plan.tap is None else plan.tap.descriptor,
            mac=None if plan.tap is None else plan.tap.mac,
            tsc_khz=self._tsc_khz,
        )

    @contextlib.asynccontextmanager
    async def _control(self, machine_id: str, on_event: Callable[[Event], None] = ignore) -> AsyncIterator[Qmp]:
        """A session on a running machine's control socket, of which there is one at a time. Raises QmpError."""
        try:
            path, turn = self._controls[machine_id]
        except KeyError:
            raise QmpLostError("The virtual machine does not run") from None
        async with turn:
            session = await Qmp.connect(path, on_event=on_event)
            try:
                yield session
            finally:
                await session.close()

    def _watch(self, machine_id: str, state_dir: Path, pid: int) -> ProcessMachine:
        self._controls[machine_id] = (state_dir / CONTROL_SOCKET, asyncio.Lock())
        return self._machines.watch(machine_id, pid)

    async def _confirm(self, session: Qmp) -> None:
        """Return when the guest's processors run, by what they are meant to. Raises QmpError."""
        status, kvm = await session.execute("query-status"), await session.execute("query-kvm")
        if (reason := why_not_running(status, kvm, self._accelerator)) is not None:
            raise QmpError(reason)

    async def adopt(self, machine_id: str, state_dir: Path) -> ProcessMachine | None:
        """Take over a microVM that survived a restart of the daemon."""
        pid = self._machines.running_pid(machine_id, state_dir)
        return None if pid is None else self._watch(machine_id, state_dir, pid)

    def runs(self, machine_id: str, state_dir: Path) -> bool:
        """See the contract."""
        return self._machines.running_pid(machine_id, state_dir) is not None

    async def freeze(self, machine_id: str) -> None:
        """Freeze QEMU's threads.

        Not by QMP's `stop`: it lets the guest's clock stand still, which the agent would have to set after every thaw, and QEMU itself would go on
        waking up for whoever writes to the link.
        """
        await self._parent.child(machine_id).freeze()

    def is_frozen(self, machine_id: str) -> bool:
        """Whether QEMU is frozen."""
        return self._parent.child(machine_id).frozen()

    def thaw(self, machine_id: str) -> None:
        """Thaw QEMU's threads."""
        self._parent.child(machine_id).thaw()

    async def pause(self, machine_id: str) -> None:
        """See Checkpointing. Requests of the guest to its disk that are under way have their end before it returns."""
        self._check_thawed(machine_id)
        with _failing_checkpoint():
            async with self._control(machine_id) as session:
                await session.execute("stop", timeout_seconds=STOP_SECONDS)

    async def resume(self, machine_id: str) -> None:
        """See Checkpointing."""
        if machine_id in self._parent.children():
            with _failing_checkpoint():
                async with self._control(machine_id) as session:
                    await go_on(session)

    @contextlib.asynccontextmanager
    async def saved(
        self, machine_id: str, folder: Path, *, limit_bytes: int, on_still: Callable[[], None]
    ) -> AsyncIterator[None]:
        """See Checkpointing."""
        self._check_thawed(machine_id)
        stops = Stops(on_still)
        try:
            with _failing_checkpoint():
                async with self._control(machine_id, stops) as session:
                    await save_state(
                        session,
                        folder / STATE,
                        limit_bytes=limit_bytes,
                        log_is_exact=self._accelerator is Accelerator.KVM,
                        stops=stops,
                    )
            yield
        finally:
            await to_its_end(self.resume(machine_id))

    def _check_thawed(self, machine_id: str) -> None:
        if self.is_frozen(machine_id):
            raise CheckpointFailedError("The guest is frozen")

    async def stands_still(self, machine_id: str) -> bool:
        """See StandingStill. That QEMU stops a guest for a write without room, and fails it for any other error, is its default."""
        _, turn = self._controls.get(machine_id, (None, None))
        # Whoever has the control socket, for minutes where memory is saved, sees to it that the guest runs in the end.
        if turn is None or turn.locked() or self.is_frozen(machine_id):
            return False
        try:
            async with self._control(machine_id) as session:
                answer = await session.execute("query-status")
        except QmpError:
            return False
        return isinstance(answer, dict) and answer.get("status") == "io-error"

    async def go_on(self, machine_id: str) -> None:
        """See StandingStill."""
        try:
            async with self._control(machine_id) as session:
                await session.execute("cont")
        except QmpError as error:
            raise UnavailableError("The virtual machine does not go on") from error

    async def stop(self, machine_id: str) -> None:
        """Kill QEMU and remove its group. The guest's disk is as after a loss of power: its journal mends it at the next start."""
        self._controls.pop(machine_id, None)
        await self._machines.end(machine_id)
        self._memories.end(machine_id)

    async def found(self) -> set[str]:
        """Ids with a group."""
        return set(self._parent.children())

    def leftovers(self, keep: Set[str]) -> list[tuple[LeakKind, str, str]]:
        """See Driver."""
        groups = [
            (LeakKind.CONTROL_GROUP, self._parent.child(name).path, name)
            for name in self._parent.children()
            if name not in keep
        ]
        return [*groups, *((LeakKind.PROCESS, process, owner) for process, owner in self._strays.names(keep))]

    async def end_strays(self, keep: Set[str]) -> int:
        """See Driver. Until it joins its group a start is known by the mark in its command line."""
        return await self._strays.end(keep)

    def usage(self, machine_id: str) -> Usage:
        """See the contract."""
        return self._parent.child(machine_id).usage()

    async def attach(self, machine_id: str, volume: VolumeDisk) -> None:
        """See Attaching. The guest has another disk, whose serial number is the volume's name."""
        if machine_id not in self._controls:
            raise InstanceNotFoundError
        pid = self._machines.running_pid(machine_id, self._controls[machine_id][0].parent)
        if pid is None:
            raise InstanceNotFoundError
        try:
            async with self._control(machine_id) as session:
                await plug_in(session, pid, volume)
        except QmpError as error:
            log.warning("a volume could not be plugged in", machine=machine_id, error=str(error))
            raise VolumeFailedError("The virtual machine did not take the volume") from error

    async def detach(self, machine_id: str, volume: VolumeDisk) -> None:
        """See Attaching."""
        unplugged = Unplugged()
        try:
            async with self._control(machine_id, unplugged.hear) as session:
                await pull_out(session, unplugged, volume)
        except QmpError as error:
            control = self._controls.get(machine_id)
            if control is not None and self._machines.running_pid(machine_id, control[0].parent) is not None:
                log.warning("a volume could not be pulled out", machine=machine_id, error=str(error))
                raise VolumeFailedError("The virtual machine does not let go of the volume") from error

    def mounted_at(self, machine_id: str, volume: VolumeDisk) -> Path | None:
        """See Attaching: the host never reads what a virtual machine writes."""
        return None

    async def has_let_go(self, machine_id: str, volume: VolumeDisk) -> bool:
        """See Attaching: QEMU has closed the file by the time that it is detached."""
        return True

    async def close(self, *, keep_running: bool) -> None:
        """Let go of the machines (they run on), or stop them all and remove the server's group."""
        if keep_running:
            await self._machines.let_go()
            self._controls.clear()
            self._memories.close()
            return
        for machine_id in self._machines:
            await self.stop(machine_id)
        self._memories.close()
        await self._parent.remove()


@contextlib.contextmanager
def _failing_checkpoint() -> Iterator[None]:
    """Say by CheckpointFailedError what QEMU, or the writing of its state, says in the block."""
    try:
        yield
    except QmpError as error:
        raise CheckpointFailedError(error.message) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "The host's disk is full" if full else f"The memory could not be written: {error.strerror}"
        raise CheckpointFailedError(reason) from error


def _disk_files(plan: MachinePlan) -> DiskFiles:
    if not isinstance(plan.rootfs, DiskFiles):
        raise TypeError("a microVM mounts its root itself: it takes the files")
    return plan.rootfs
