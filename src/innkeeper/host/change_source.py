"""Where it is found what changed in a machine's files: on the host, which has them mounted, or in the guest, which alone has."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from innkeeper.host.change_result import ChangeSet
from innkeeper.host.machine import Machine

# What the agent writes itself when it is configured, and what no command can change on the disk.
EXCLUDED = ("/proc", "/sys", "/dev", "/run", "/.innkeeper")


class ChangeSource(Protocol):
    """One of the two. `baseline` is a file of the host's: there is a baseline, and it is the instance's, where it exists. All raise `ChangeScanError`."""

    @property
    def saved(self) -> int:
        """Scans that were not needed."""
        ...

    def watch(self, machine: Machine) -> None:
        """Begin to notice when nothing changes. In a thread: it takes up to 5 ms."""
        ...

    def release(self, machine: Machine) -> None:
        """Forget a machine that ends, before its disk is unmounted."""
        ...

    async def take_baseline(self, machine: Machine, baseline: Path) -> None:
        """Have what there is now count as known."""
        ...

    async def changes(
        self, machine: Machine, baseline: Path, *, result: Path, limit: int, writes: int | None
    ) -> ChangeSet:
        """What changed since the last baseline or report, with the first `limit` rows; all of them are kept in `result`, which is each command's own.

        `writes` is what the guest said at the command's end of its disk, if it said anything. Without changes no file is made. Asked again with
        the same `result` it gives the same rows.
        """
        ...


def excluded(machine: Machine) -> tuple[str, ...]:
    """Paths of the machine's guest that are outside: the system's, and those of its volumes."""
    return (*EXCLUDED, *(volume.path for volume in machine.volumes.values()))
