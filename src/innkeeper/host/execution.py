"""One command that runs or has just ended, for everyone who waits for its output or its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from innkeeper.core.host_verbs import Execute
from innkeeper.errors import InnkeeperError, InstanceFailedError
from innkeeper.host.channels import STDOUT, Channels
from innkeeper.host.guest_program import GuestProgram
from innkeeper.host.journal import Journal, read_output
from innkeeper.host.machine import Machine
from innkeeper.wire.stream import Data

READ_STEP = 262_144


@dataclass(slots=True)
class Execution:
    """A command in progress or just ended. `changed` is set whenever there is more output or an end."""

    request: Execute
    machine: Machine
    program: GuestProgram
    directory: Path
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    # Whether the agent said that it has started.
    begun: bool = False
    answer: dict[str, Any] | None = None
    failure: InnkeeperError | None = None
    # Bytes of output at the moment the command itself ended; a background child may write more later.
    answer_bytes: int = 0

    @property
    def journal(self) -> Journal:
        """What is kept of it."""
        return self.program.journal

    def heard(self, data: Data) -> None:
        """Keep output and let the readers know. Raises OSError when the host's disk is full."""
        self.journal.write(data.data, data.channel)
        self.changed.set()

    def started(self) -> None:
        """The guest says that it runs."""
        if not self.begun:
            self.begun = True
            if self.request.detach:
                self.changed.set()

    @property
    def over(self) -> bool:
        """Whether the answer, or the reason that there is none, is known."""
        return self.answer is not None or self.failure is not None

    async def output(self, offset: int = 0) -> AsyncIterator[tuple[int, int, bytes]]:
        """(offset, channel, bytes) from an offset on until the command's end. Read from the journal, so a slow reader costs no memory and holds nobody back."""
        channels = None if self.request.merge else Channels(f"{self.directory}/{self.request.execution_id}.channels")
        while True:
            self.changed.clear()
            end = self.answer_bytes if self.over else self.journal.record.total_bytes
            while offset < end:
                piece = read_output(self.directory, self.journal.record, offset, min(READ_STEP, end - offset))
                if not piece.data:
                    # Destroyed, pruned or never written (a full disk): nothing more can come, and to wait for it would be to spin.
                    raise self.failure or InstanceFailedError("The output is not kept any more")
                offset = piece.offset + len(piece.data)
                if channels is None:
                    yield piece.offset, STDOUT, piece.data
                    continue
                channels.refresh()
                at = piece.offset
                for channel, data in channels.split(piece.offset, piece.data):
                    yield at, channel, data
                    at += len(data)
            if self.over and offset >= self.answer_bytes:
                return
            if offset >= self.journal.record.total_bytes and not self.over:
                await self.changed.wait()

    async def beginning(self) -> None:
        """Wait until the guest has begun it. Raises the typed error when it could not."""
        while not self.begun and not self.over:
            self.changed.clear()
            await self.changed.wait()
        if self.failure is not None:
            raise self.failure

    async def result(self) -> dict[str, Any]:
        """The answer. Raises the typed error when there is none."""
        while not self.over:
            self.changed.clear()
            await self.changed.wait()
        if self.failure is not None:
            raise self.failure
        assert self.answer is not None  # noqa: S101 - `over` without a failure
        return self.answer
