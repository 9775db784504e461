"""Machines, disks and records on their way out: ended while somebody waits, released and removed beside what goes on."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
from collections.abc import Coroutine
from typing import Any
from uuid import UUID

import structlog

from innkeeper.errors import InnkeeperError
from innkeeper.host.directories import Directories
from innkeeper.host.file_changes import FileChanges
from innkeeper.host.machine import Machine
from innkeeper.host.machine_builder import MachineBuilder
from innkeeper.host.usage import UsageLedger

log = structlog.stdlib.get_logger(__name__)


class Departures:
    """Sees machines off. `held` are all of which something exists: from their start until nothing of them is left."""

    def __init__(
        self, *, directories: Directories, builder: MachineBuilder, changes: FileChanges, usage: UsageLedger
    ) -> None:
        self.held: set[Machine] = set()
        self._directories = directories
        self._builder = builder
        self._changes = changes
        self._usage = usage
        self._tasks: set[asyncio.Task[None]] = set()
        # By the machine's disk.
        self._leaving: dict[str, asyncio.Task[None]] = {}

    # --- machines --------------------------------------------------------------------------------------------------

    def leave(self, machine: Machine) -> None:
        """Release a machine beside what goes on; its disk is not mounted again before that is done."""
        disk = machine.record.disk
        if disk in self._leaving:
            return
        task = self.later(self.discard(machine))
        self._leaving[disk] = task
        task.add_done_callback(lambda _: self._leaving.pop(disk, None))

    async def gone(self, disk: str) -> bool:
        """Wait until the machine that leaves the disk, if there is one, has left it; whether there was."""
        leaving = self._leaving.get(disk)
        if leaving is not None:
            await asyncio.wait([leaving])
        return leaving is not None

    async def end(self, machine: Machine) -> None:
        """Stop a machine; returns when its guest no longer runs, and the rest is released beside."""
        machine.failure = machine.failure or "The machine was destroyed"
        if await self.gone(machine.record.disk):
            return
        self._note_usage(machine)
        try:
            await machine.driver.stop(machine.id)
        finally:
            self.leave(machine)

    async def discard(self, machine: Machine) -> None:
        """Release everything of a machine that nobody is to use any more. Raises what went wrong; it is still held then."""
        if machine.failure is None:
            machine.failure = "The machine was taken away"
        self._changes.release(machine)
        self._note_usage(machine)
        await self._builder.discard(machine)
        self.held.discard(machine)

    def _note_usage(self, machine: Machine) -> None:
        self._usage.note_end(machine.record, machine.driver.usage(machine.id))

    # --- disks and records -----------------------------------------------------------------------------------------

    async def remove_disk(self, disk: str) -> None:
        """Remove a disk that no instance has any more, after the machine that still leaves it."""
        await self.gone(disk)
        await self._builder.remove_disk(disk)

    def trash(self, instance_id: UUID, *, log_too: bool) -> None:
        """Unlink an instance's records in one step each, and its log; what they named is removed now or at the next start."""
        # The records last: while they are there, whoever repeats this finds the instance.
        logs = [self._directories.logs] if log_too else []
        for parent in (*logs, self._directories.instances, self._directories.changes):
            with contextlib.suppress(FileNotFoundError):
                # A name of its own each time: one that an earlier failure left must not be in the way.
                trash = self._directories.trash / f"{parent.name}-{instance_id}-{secrets.token_hex(4)}"
                (parent / str(instance_id)).rename(trash)

    def empty_trash(self) -> None:
        """Remove beside what goes on, and in a thread, what was unlinked."""
        self.later(asyncio.to_thread(self._empty_trash))

    def _empty_trash(self) -> None:
        for entry in self._directories.trash.iterdir():
            shutil.rmtree(entry, ignore_errors=True)

    # --- work beside what goes on ----------------------------------------------------------------------------------

    def later(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[None]:
        """Begin work that nobody waits for; what goes wrong in it is logged."""

        async def run() -> None:
            try:
                await work
            except (InnkeeperError, OSError, TimeoutError):
                log.exception("cleaning up failed; the next start does it again")

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def settle(self) -> None:
        """Wait until all of that is done, what it begins meanwhile included."""
        while self._tasks:
            await asyncio.wait(self._tasks)
