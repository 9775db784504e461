"""Machines as gVisor sandboxes (runsc). Facts and traps behind the choices here: docs/drivers.md."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from innkeeper.core.instance import Isolation
from innkeeper.core.leak import LeakKind
from innkeeper.errors import InnkeeperError
from innkeeper.host.drivers.contract import Capabilities, MachinePlan
from innkeeper.host.drivers.gvisor_spec import oci_spec
from innkeeper.host.linux import command
from innkeeper.host.linux.cgroup import CgroupTree, Group, Usage
from innkeeper.host.linux.pidfd import PidFd

log = structlog.stdlib.get_logger(__name__)

# What the start does in a private mount namespace before it runs runsc, all in one process of mount(8).
MOUNT_AND_RUN = 'mount --all --fstab "$1" && shift && exec "$@"'
MOUNT_TABLE = "mounts"
START_TIMEOUT_SECONDS = 30
SANDBOX_PID = "sandbox.pid"
STRAY_SECONDS = 10.0
_BUNDLE = re.compile(rb"/machines/([^/\0]+)/")


class StartFailedError(InnkeeperError):
    """The sandbox could not be started."""

    code = "start_failed"


@dataclass(slots=True)
class GvisorMachine:
    """A running sandbox; its sentry is watched through a pidfd."""

    machine_id: str
    group: Group
    pid: int
    exited: asyncio.Future[None]
    watcher: asyncio.Task[None] | None = None
    oom_kills_before: int = field(default=0)

    def ran_out_of_memory(self) -> bool:
        """Whether the kernel took a process of it: the sentry, or a stub, which holds a guest process's memory and is often the larger one."""
        return self.group.usage().oom_kills > self.oom_kills_before

    def why(self) -> str:
        """The best known reason for its end."""
        if self.ran_out_of_memory():
            return "The guest ran out of memory"
        return "The sandbox ended"


class GvisorDriver:
    """Runs machines as runsc sandboxes.

    Args:
        runsc: the binary.
        platform: `systrap`, `ptrace` or `kvm`.
        root: runsc's state directory.
        cgroups: this server's control group; each machine gets a child.
        reason: why this platform, for `isolation`.

    """

    name = "gvisor"
    capabilities = Capabilities(freeze=True, host_sees_changes=True)

    def __init__(
        self, *, runsc: str, platform: str, root: Path, tree: CgroupTree, group_name: str, reason: str
    ) -> None:
        self._runsc = runsc
        self._platform = platform
        self._root = root
        self._group_name = group_name
        self._tree = tree
        self._parent = tree.server_root(group_name)
        self._reason = reason
        self._machines: dict[str, GvisorMachine] = {}
        self._nofile = min(65_536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])

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
        ]

    async def start(self, plan: MachinePlan) -> GvisorMachine:
        """Start a sandbox; returns when its init runs."""
        group = self._parent.child(plan.machine_id)
        bundle = plan.state_dir / "bundle"
        bundle.mkdir(mode=0o700, exist_ok=True)
        spec = oci_spec(plan, cgroup_path=group.path, nofile=self._nofile)
        (bundle / "config.json").write_text(json.dumps(spec))
        (bundle / MOUNT_TABLE).write_text(mount_table(plan.agent_dir, plan.link_dir))
        pid_file = plan.state_dir / SANDBOX_PID
        run = [
            self._runsc,
            *self._flags(),
            "run",
            "-detach",
            f"-pid-file={pid_file}",
            f"-bundle={bundle}",
            plan.machine_id,
        ]
        # The group is runsc's to make: one that exists already gets no limits from it, and the guest then sees the host's memory as its own.
        try:
            await self._run_quietly(run, bundle / MOUNT_TABLE)
            machine = self._watch(plan.machine_id, group, int(pid_file.read_text()))
        except BaseException:
            await asyncio.shield(self.stop(plan.machine_id))
            raise
        return machine

    async def _run_quietly(self, run: list[str], mount_table: Path) -> None:
        # The sandbox inherits stdio. gVisor keeps its own offset into regular files, so it gets /dev/null, and errors of the start come by --log.
        script = ["sh", "-c", MOUNT_AND_RUN, "sh", str(mount_table)]
        wrapped = ["unshare", "--mount", "--propagation", "private", *script, *run]
        # From the root directory: a shell hands its directory's name on in the environment, and that is the operator's.
        process = await command.spawn(wrapped, cwd="/")
        try:
            async with asyncio.timeout(START_TIMEOUT_SECONDS):
                status = await process.wait()
        except BaseException:
            await asyncio.shield(command.end(process))
            raise
        if status != 0:
            # The instance's failure is for its user: which tool ended how is for the log.
            log.warning("runsc run failed", status=command.describe_status(status), machine=run[-1])
            raise StartFailedError

    def _watch(self, machine_id: str, group: Group, pid: int) -> GvisorMachine:
        loop = asyncio.get_running_loop()
        machine = GvisorMachine(machine_id, group, pid, loop.create_future(), oom_kills_before=group.usage().oom_kills)
        machine.watcher = loop.create_task(_wait_exited(machine))
        self._machines[machine_id] = machine
        return machine

    async def adopt(self, machine_id: str, state_dir: Path) -> GvisorMachine | None:
        """Take over a sandbox that survived a restart of the daemon."""
        pid = self.running_pid(machine_id, state_dir)
        return None if pid is None else self._watch(machine_id, self._parent.child(machine_id), pid)

    def running_pid(self, machine_id: str, state_dir: Path) -> int | None:
        """The sandbox's process, or None when it does not run."""
        try:
            pid = int((state_dir / SANDBOX_PID).read_text())
        except (OSError, ValueError):
            return None
        # The pid alone proves nothing after a reboot: it must be in this machine's group.
        return pid if pid in self._parent.child(machine_id).procs() else None

    async def freeze(self, machine_id: str) -> None:
        """Freeze the sandbox's processes: systrap burns 4 % of a core even when it is idle."""
        await self._parent.child(machine_id).freeze()

    def is_frozen(self, machine_id: str) -> bool:
        """Whether the sandbox is frozen."""
        return self._parent.child(machine_id).frozen()

    def thaw(self, machine_id: str) -> None:
        """Thaw the sandbox's processes."""
        self._parent.child(machine_id).thaw()

    async def stop(self, machine_id: str) -> None:
        """Kill every process of the sandbox and remove its group and runtime files.

        `runsc delete` is not used: it takes 1.7 s where an orphan is reaped late, and hangs on a frozen sandbox. Killing while frozen, thawing and
        removing the three files takes 20 ms.
        """
        group = self._parent.child(machine_id)
        if group.exists():
            await group.kill_all()
            await group.remove()
        machine = self._machines.pop(machine_id, None)
        if machine is not None:
            await machine.exited
        for path in self._runtime_files(machine_id):
            path.unlink(missing_ok=True)

    def _runtime_files(self, machine_id: str) -> list[Path]:
        return [
            self._root / f"{machine_id}_sandbox:{machine_id}.state",
            self._root / f"{machine_id}_sandbox:{machine_id}.lock",
            self._root / f"runsc-{machine_id}.sock",
        ]

    async def found(self) -> set[str]:
        """Ids with a group or runtime files."""
        return set(self._parent.children()) | {machine_id for _, machine_id in self._runtime_state()}

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
        for process, line in self._strays(keep):
            with process:
                machine_id = min(_machines_in(line), default="unknown")
                found.append((LeakKind.PROCESS, f"{process.pid} {_words(line)}", machine_id))
        return found

    async def end_strays(self, keep: Set[str]) -> int:
        """See Driver. A `runsc run` whose daemon was killed goes on, outside of any group until late; it is known by our state directory."""
        strays = [process for process, _ in self._strays(keep)]
        try:
            for process in strays:
                process.send_signal(signal.SIGKILL)
            async with asyncio.timeout(STRAY_SECONDS):
                for process in strays:
                    await process.wait()
        finally:
            for process in strays:
                process.close()
        return len(strays)

    def _strays(self, keep: Set[str]) -> list[tuple[PidFd, bytes]]:
        return [stray for pid in _pids() if (stray := self._stray(pid, keep)) is not None]

    def _stray(self, pid: int, keep: Set[str]) -> tuple[PidFd, bytes] | None:
        """A process and its command line, if it is one of runsc's for this server and names no machine of `keep`.

        And root's, since anybody may have such a command line.
        """
        path, mark = Path(f"/proc/{pid}"), os.fsencode(f"--root={self._root}")
        try:
            if mark not in (path / "cmdline").read_bytes():
                return None
            process = PidFd(pid)
        except OSError:
            return None
        try:
            # Again, now that the pid cannot become another process's.
            line = (path / "cmdline").read_bytes()
            if mark in line.split(b"\0") and path.stat().st_uid == 0 and not _machines_in(line) & keep:
                return process, line
        except OSError:
            pass
        process.close()
        return None

    def usage(self, machine_id: str) -> Usage:
        """See the contract."""
        return self._parent.child(machine_id).usage()

    async def close(self, *, keep_running: bool) -> None:
        """Let go of the machines (they run on), or stop them all and remove the server's group."""
        for machine in list(self._machines.values()):
            if not keep_running:
                await self.stop(machine.machine_id)
            elif machine.watcher is not None:
                machine.watcher.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await machine.watcher
        # A machine that was let go of is nobody's here any more: its end would be waited for in vain.
        self._machines.clear()
        if not keep_running:
            await self._parent.remove()


def _machines_in(line: bytes) -> set[str]:
    """The machines that a command line of runsc names, by their bundles."""
    return {name.decode(errors="replace") for name in _BUNDLE.findall(line)}


def _words(line: bytes) -> str:
    return line.replace(b"\0", b" ").decode(errors="replace")[:120].strip()


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - names only, thousands of them


async def _wait_exited(machine: GvisorMachine) -> None:
    # Cancelled when the daemon lets go of a machine that runs on: then it has not exited, and nobody may be told so.
    with contextlib.suppress(ProcessLookupError), PidFd(machine.pid) as pidfd:
        await pidfd.wait()
    machine.exited.set_result(None)


def mount_table(*read_only: Path) -> str:
    """The fstab(5) of a start.

    Kernels that show /proc/sys/net/core/rmem_default in every network namespace make runsc refuse network=sandbox ("cannot run with network enabled in
    root network namespace"). Hiding /proc/sys/net is harmless where the trap does not exist.

    runsc keeps `ro` of a bind mount in the sentry alone: on the host, the gofer's and the sentry's descriptors would come from a mount that can be
    written. A sentry that was taken over could put another agent in place of the one that every guest, and the host's change scanner, runs. So the
    directories `read_only` are read-only to the kernel before runsc binds them.
    """
    lines = ["none /proc/sys/net tmpfs size=4k 0 0"]
    lines += [f"{_field(path)} {_field(path)} none bind,ro,nosuid,nodev 0 0" for path in read_only]
    return "\n".join(lines) + "\n"


def _field(path: Path) -> str:
    return "".join(f"\\{ord(character):03o}" if character in " \t\n\\#" else character for character in str(path))
