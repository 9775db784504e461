"""The changes of machines whose files the host has mounted: it scans them from outside, and believes its own kernel on whether it must."""

from __future__ import annotations

from pathlib import Path

from innkeeper.errors import NotHereError
from innkeeper.host.change_result import ChangeSet
from innkeeper.host.change_scanner import ChangeScanner, ScanTarget
from innkeeper.host.change_source import excluded
from innkeeper.host.machine import Machine


class MountedChanges:
    """A source that is the host's scanner."""

    def __init__(self, scanner: ChangeScanner) -> None:
        self._scanner = scanner

    @property
    def saved(self) -> int:
        """Scans that were not needed."""
        return self._scanner.saved

    def watch(self, machine: Machine) -> None:
        """See ChangeSource."""
        self._scanner.watch(_upper(machine))

    def release(self, machine: Machine) -> None:
        """See ChangeSource."""
        self._scanner.unwatch(_upper(machine))

    async def take_baseline(self, machine: Machine, baseline: Path) -> None:
        """See ChangeSource. The file is the baseline itself."""
        await self._scanner.baseline(_target(machine, baseline))

    async def changes(
        self, machine: Machine, baseline: Path, *, result: Path, limit: int, writes: int | None
    ) -> ChangeSet:
        """See ChangeSource."""
        return await self._scanner.changes(_target(machine, baseline), result=result, limit=limit)


def _target(machine: Machine, baseline: Path) -> ScanTarget:
    return ScanTarget(upper=_upper(machine), lowers=machine.lowers, baseline=baseline, excluded=excluded(machine))


def _upper(machine: Machine) -> Path:
    if machine.upper is None:
        raise NotHereError(f"The host does not see the files of guests of the driver {machine.driver.name}")
    return machine.upper
