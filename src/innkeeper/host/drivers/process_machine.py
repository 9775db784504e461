"""Machines that are, to the host, one process in a control group of their own: the sentry of a sandbox, or QEMU."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from innkeeper.host.linux.cgroup import Group
from innkeeper.host.linux.pidfd import PidFd


@dataclass(slots=True)
class ProcessMachine:
    """A running machine, watched through a pidfd. `ended` is what is said of an end without a better reason."""

    machine_id: str
    group: Group
    pid: int
    ended: str
    exited: asyncio.Future[None]
    watcher: asyncio.Task[None] | None = None
    oom_kills_before: int = field(default=0)

    def ran_out_of_memory(self) -> bool:
        """Whether the kernel took a process of it: the one that is watched, or another, which may be the larger one."""
        return self.group.usage().oom_kills > self.oom_kills_before

    def why(self) -> str:
        """The best known reason for its end."""
        return "The guest ran out of memory" if self.ran_out_of_memory() else self.ended


class ProcessMachines:
    """The running machines of one driver, by id.

    Args:
        parent: the group whose children are the machines' groups.
        pid_file: the name of the file in a machine's state directory that names its process.
        ended: see ProcessMachine.

    """

    def __init__(self, parent: Group, *, pid_file: str, ended: str) -> None:
        self._parent = parent
        self._pid_file = pid_file
        self._ended = ended
        self._machines: dict[str, ProcessMachine] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._machines))

    def watch(self, machine_id: str, pid: int) -> ProcessMachine:
        """A machine from now on, whose end is noticed."""
        loop = asyncio.get_running_loop()
        group = self._parent.child(machine_id)
        machine = ProcessMachine(
            machine_id, group, pid, self._ended, loop.create_future(), oom_kills_before=group.usage().oom_kills
        )
        machine.watcher = loop.create_task(_wait_exited(machine))
        self._machines[machine_id] = machine
        return machine

    def adopt(self, machine_id: str, state_dir: Path) -> ProcessMachine | None:
        """The machine that survived a restart of the daemon, or None."""
        pid = self.running_pid(machine_id, state_dir)
        return None if pid is None else self.watch(machine_id, pid)

    def running_pid(self, machine_id: str, state_dir: Path) -> int | None:
        """The machine's process, or None when it does not run."""
        try:
            pid = int((state_dir / self._pid_file).read_text())
        except (OSError, ValueError):
            return None
        # The pid alone proves nothing after a reboot: it must be in this machine's group.
        return pid if pid in self._parent.child(machine_id).procs() else None

    async def end(self, machine_id: str) -> None:
        """Kill every process of the machine and remove its group; on return none of it runs. Fine for one that is gone."""
        group = self._parent.child(machine_id)
        if group.exists():
            await group.kill_all()
            await group.remove()
        machine = self._machines.pop(machine_id, None)
        if machine is not None:
            await machine.exited

    async def let_go(self) -> None:
        """Watch none of them any more; they run on."""
        for machine in self._machines.values():
            if machine.watcher is not None:
                machine.watcher.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await machine.watcher
        # A machine that was let go of is nobody's here any more: its end would be waited for in vain.
        self._machines.clear()


async def _wait_exited(machine: ProcessMachine) -> None:
    # Cancelled when the daemon lets go of a machine that runs on: then it has not exited, and nobody may be told so.
    with contextlib.suppress(ProcessLookupError), PidFd(machine.pid) as pidfd:
        await pidfd.wait()
    machine.exited.set_result(None)
