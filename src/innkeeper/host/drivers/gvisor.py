"""Machines as gVisor sandboxes (runsc). Facts and traps behind the choices here: docs/drivers.md."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Set
from pathlib import Path

import structlog

from innkeeper.core.instance import Isolation
from innkeeper.core.leak import LeakKind
from innkeeper.errors import CheckpointFailedError, VolumeFailedError
from innkeeper.host.completion import to_its_end
from innkeeper.host.drivers.contract import Capabilities, MachinePlan, Needs, StartFailedError, VolumeDisk
from innkeeper.host.drivers.gvisor_checkpoint import SandboxCheckpoints
from innkeeper.host.drivers.gvisor_spec import oci_spec
from innkeeper.host.drivers.gvisor_volumes import VolumeHubs, is_free
from innkeeper.host.drivers.process_machine import ProcessMachine, ProcessMachines
from innkeeper.host.drivers.strays import Strays
from innkeeper.host.exhaustion import unavailable
from innkeeper.host.linux import command
from innkeeper.host.linux.cgroup import CgroupTree, Usage
from innkeeper.host.linux.mounts import fstab_field

log = structlog.stdlib.get_logger(__name__)

# What the start does in a private mount namespace before it runs runsc, all in one process of mount(8).
MOUNT_AND_RUN = 'mount --all --fstab "$1" && shift && exec "$@"'
MOUNT_TABLE = "mounts"
START_TIMEOUT_SECONDS = 30
# It reads the whole memory of the guest first.
RESTORE_TIMEOUT_SECONDS = 300
SANDBOX_PID = "sandbox.pid"
_BUNDLE = re.compile(rb"/machines/([^/\0]+)/")


class GvisorDriver:
    """Runs machines as runsc sandboxes.

    Args:
        runsc: the binary.
        platform: `systrap`, `ptrace` or `kvm`.
        root: runsc's state directory.
        hubs: a directory of the driver's own, below which it mounts volumes.
        cgroups: this server's control group; each machine gets a child.
        reason: why this platform, for `isolation`.

    """

    name = "gvisor"
    capabilities = Capabilities(
        freeze=True, host_sees_changes=True, checkpoint=True, fork=True, disk_snapshot=True, volumes=True
    )
    needs = Needs()
    patience_seconds = 15.0

    def __init__(
        self, *, runsc: str, platform: str, root: Path, hubs: Path, tree: CgroupTree, group_name: str, reason: str
    ) -> None:
        self._runsc = runsc
        self._platform = platform
        self._root = root
        self._group_name = group_name
        self._tree = tree
        self._parent = tree.server_root(group_name)
        self._reason = reason
        self._machines = ProcessMachines(self._parent, pid_file=SANDBOX_PID, ended="The sandbox ended")
        self._strays = Strays(b"--root=" + os.fsencode(root), _BUNDLE)
        self._nofile = min(65_536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        self._hubs = VolumeHubs(hubs)
        self._checkpoints = SandboxCheckpoints(runsc, self._flags())

    @property
    def isolation(self) -> Isolation:
        """gVisor: a kernel in user space between the guest and the host's kernel."""
        return Isolation(level="gvisor", driver=self.name, platform=self._platform, reason=self._reason)

    def _flags(self) -> list[str]:
        return [
            f"--root={self._root}",
            f"--platform={self._platform}",
            # The default (root:self) would hide every write in a file of its own: no host-side scan, no quota.
            "--overlay2=none",
            "--file-access=exclusive",
            "--file-access-mounts=shared",
            "--host-uds=open",
            "--host-fifo=none",
            "--network=sandbox",
            # A checkpoint breaks the guest's open connections to other machines; without this it would be refused while there is one.
            "--net-disconnect-ok",
        ]

    async def start(self, plan: MachinePlan) -> ProcessMachine:
        """Start a sandbox; returns when its init runs."""
        return await self._launch(plan, ["run"], seconds=START_TIMEOUT_SECONDS)

    async def restore(self, plan: MachinePlan, folder: Path, *, whole: Awaitable[None] | None = None) -> ProcessMachine:
        """See Checkpointing. The sandbox's network is the plan's; its host name was saved with the memory, and is changed from outside."""
        if whole is not None:
            # One run of runsc reads the memory and has the guest go on.
            await whole
        machine = await self._launch(plan, ["restore", f"-image-path={folder}"], seconds=RESTORE_TIMEOUT_SECONDS)
        if plan.same_guest:
            # A run of runsc's less.
            return machine
        try:
            await self._checkpoints.rename(plan.machine_id, plan.hostname)
        except BaseException as error:
            await asyncio.shield(self.stop(plan.machine_id))
            if isinstance(error, CheckpointFailedError):
                raise StartFailedError from error
            raise
        return machine

    async def _launch(self, plan: MachinePlan, verb: list[str], *, seconds: float) -> ProcessMachine:
        bundle, pid_file = plan.state_dir / "bundle", plan.state_dir / SANDBOX_PID
        run = [
            self._runsc,
            *self._flags(),
            *verb,
            "-detach",
            f"-pid-file={pid_file}",
            f"-bundle={bundle}",
            plan.machine_id,
        ]
        # The group is runsc's to make: one that exists already gets no limits from it, and the guest then sees the host's memory as its own.
        try:
            self._write_bundle(plan, bundle, self._hubs.prepare(plan.machine_id))
            await self._run_quietly(run, bundle / MOUNT_TABLE, seconds=seconds)
            machine = self._machines.watch(plan.machine_id, int(pid_file.read_text()))
        except BaseException:
            await asyncio.shield(self.stop(plan.machine_id))
            raise
        return machine

    def _write_bundle(self, plan: MachinePlan, bundle: Path, hub: Path) -> None:
        bundle.mkdir(mode=0o700, exist_ok=True)
        spec = oci_spec(plan, hub=hub, cgroup_path=self._parent.child(plan.machine_id).path, nofile=self._nofile)
        (bundle / "config.json").write_text(json.dumps(spec))
        (bundle / MOUNT_TABLE).write_text(mount_table(plan.agent_dir, plan.link_dir, hub))

    async def _run_quietly(self, run: list[str], mount_table: Path, *, seconds: float) -> None:
        # The sandbox inherits stdio. gVisor keeps its own offset into regular files, so it gets /dev/null, and errors of the start come by --log.
        script = ["sh", "-c", MOUNT_AND_RUN, "sh", str(mount_table)]
        # Slaves of the host's mounts, so that what is mounted in the machine's hub later comes to the sandbox. Nothing goes the other way.
        wrapped = ["unshare", "--mount", "--propagation", "slave", *script, *run]
        # From the root directory: a shell hands its directory's name on in the environment, and that is the operator's.
        process = await command.spawn(wrapped, cwd="/")
        try:
            async with asyncio.timeout(seconds):
                status = await process.wait()
        except BaseException:
            await asyncio.shield(command.end(process))
            raise
        if status != 0:
            # The instance's failure is for its user: which tool ended how is for the log.
            log.warning("a sandbox could not be started", status=command.describe_status(status), machine=run[-1])
            raise StartFailedError

    async def adopt(self, machine_id: str, state_dir: Path) -> ProcessMachine | None:
        """Take over a sandbox that survived a restart of the daemon."""
        return self._machines.adopt(machine_id, state_dir)

    def runs(self, machine_id: str, state_dir: Path) -> bool:
        """Whether its sandbox runs."""
        return self._machines.running_pid(machine_id, state_dir) is not None

    async def freeze(self, machine_id: str) -> None:
        """Freeze the sandbox's processes: systrap burns 4 % of a core even when it is idle."""
        await self._parent.child(machine_id).freeze()

    def is_frozen(self, machine_id: str) -> bool:
        """Whether the sandbox is frozen."""
        return self._parent.child(machine_id).frozen()

    def thaw(self, machine_id: str) -> None:
        """Thaw the sandbox's processes."""
        self._parent.child(machine_id).thaw()

    async def pause(self, machine_id: str) -> None:
        """See Checkpointing. Not by the control group: the sentry itself has to work while it is saved."""
        if self.is_frozen(machine_id):
            raise CheckpointFailedError("The guest is frozen")
        await self._checkpoints.pause(machine_id)

    async def resume(self, machine_id: str) -> None:
        """See Checkpointing."""
        if machine_id in self._parent.children():
            await self._checkpoints.resume(machine_id)

    @contextlib.asynccontextmanager
    async def saved(
        self, machine_id: str, folder: Path, *, limit_bytes: int, on_still: Callable[[], None]
    ) -> AsyncIterator[None]:
        """See Checkpointing. Nothing of it is written while the guest runs."""
        try:
            on_still()
            await self.pause(machine_id)
            await self._checkpoints.save(machine_id, folder)
            yield
        finally:
            await to_its_end(self.resume(machine_id))

    async def memory_needs(self) -> dict[str, str]:
        """See Checkpointing."""
        return await self._checkpoints.needs(self._platform)

    async def stop(self, machine_id: str) -> None:
        """Kill every process of the sandbox and remove its group and runtime files.

        `runsc delete` is not used: it takes 1.7 s where an orphan is reaped late, and hangs on a frozen sandbox. Killing while frozen, thawing and
        removing the three files takes 20 ms.
        """
        await self._machines.end(machine_id)
        for path in self._runtime_files(machine_id):
            path.unlink(missing_ok=True)
        await self._hubs.release(machine_id)

    def _runtime_files(self, machine_id: str) -> list[Path]:
        return [
            self._root / f"{machine_id}_sandbox:{machine_id}.state",
            self._root / f"{machine_id}_sandbox:{machine_id}.lock",
            self._root / f"runsc-{machine_id}.sock",
        ]

    async def found(self) -> set[str]:
        """Ids with a group, runtime files or a hub."""
        marked = [*self._runtime_state(), *self._hubs.machines()]
        return set(self._parent.children()) | {machine_id for _, machine_id in marked}

    def _runtime_state(self) -> Iterator[tuple[str, str]]:
        """The names of runsc's own files, each with the machine's id."""
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self._root):
                if entry.name.endswith((".state", ".lock")):
                    yield entry.name, entry.name.partition("_sandbox:")[0]
                elif entry.name.startswith("runsc-"):
                    yield entry.name, entry.name.removeprefix("runsc-").removesuffix(".sock")

    def leftovers(self, keep: Set[str]) -> list[tuple[LeakKind, str, str]]:
        """See Driver."""
        found = [
            (LeakKind.CONTROL_GROUP, self._parent.child(name).path, name)
            for name in self._parent.children()
            if name not in keep
        ]
        found += [
            (LeakKind.RUNTIME_FILE, str(self._root / name), machine_id)
            for name, machine_id in self._runtime_state()
            if machine_id not in keep
        ]
        found += [
            (LeakKind.MOUNT, path, machine_id) for path, machine_id in self._hubs.machines() if machine_id not in keep
        ]
        found += [(LeakKind.PROCESS, process, machine_id) for process, machine_id in self._strays.names(keep)]
        return found

    async def end_strays(self, keep: Set[str]) -> int:
        """See Driver. A `runsc run` whose daemon was killed goes on, outside of any group until late; it is known by our state directory."""
        return await self._strays.end(keep)

    def usage(self, machine_id: str) -> Usage:
        """See the contract."""
        return self._parent.child(machine_id).usage()

    async def close(self, *, keep_running: bool) -> None:
        """Let go of the machines (they run on), or stop them all and remove the server's group."""
        if keep_running:
            await self._machines.let_go()
            return
        for machine_id in self._machines:
            await self.stop(machine_id)
        await self._parent.remove()
        await self._hubs.close()

    async def attach(self, machine_id: str, volume: VolumeDisk) -> None:
        """See Attaching. The host's kernel mounts it, so none that a virtual machine has written."""
        try:
            await self._hubs.attach(machine_id, volume)
        except OSError as error:
            if unavailable(error) is not None:
                raise
            raise VolumeFailedError(f"The host cannot mount the volume: {error.strerror}") from error

    async def detach(self, machine_id: str, volume: VolumeDisk) -> None:
        """See Attaching."""
        await self._hubs.detach(machine_id, volume)

    def mounted_at(self, machine_id: str, volume: VolumeDisk) -> Path | None:
        """See Attaching."""
        return self._hubs.mounted_at(machine_id, volume)

    async def has_let_go(self, machine_id: str, volume: VolumeDisk) -> bool:
        """See Attaching. The sentry keeps descriptors of what it has looked at, and so the file system in use, after it was unmounted."""
        return volume.read_only or await asyncio.to_thread(is_free, volume.image)


def mount_table(*read_only: Path) -> str:
    """The fstab(5) of a start.

    Kernels that show /proc/sys/net/core/rmem_default in every network namespace make runsc refuse network=sandbox ("cannot run with network enabled in
    root network namespace"). Hiding /proc/sys/net is harmless where the trap does not exist.

    runsc keeps `ro` of a bind mount in the sentry alone: on the host, the gofer's and the sentry's descriptors would come from a mount that can be
    written. A sentry that was taken over could put another agent in place of the one that every guest, and the host's change scanner, runs. So the
    directories `read_only` are read-only to the kernel before runsc binds them; what is mounted in one of them later is as it is mounted.
    """
    lines = ["none /proc/sys/net tmpfs size=4k 0 0"]
    lines += [f"{fstab_field(path)} {fstab_field(path)} none bind,ro,nosuid,nodev 0 0" for path in read_only]
    return "\n".join(lines) + "\n"
