"""Programs of an instance that belong to whoever runs them: every byte of their input and output arrives, and they end when their owner goes away."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from innkeeper.bus.contract import Call, Data, Message
from innkeeper.control import lifecycle
from innkeeper.control.guest_calls import host_of, in_use, next_event
from innkeeper.control.live_table import Entry
from innkeeper.control.terminals import check_size
from innkeeper.core.host_verbs import to_wire
from innkeeper.core.program_verbs import RunProgram
from innkeeper.core.terminal_verbs import COMMAND_BYTES_MAX
from innkeeper.core.token import Principal
from innkeeper.errors import (
    InstanceFailedError,
    InstanceNotFoundError,
    InvalidRequestError,
    LinkLostError,
    UnavailableError,
)

if TYPE_CHECKING:
    from innkeeper.control.context import Control

# A login shell as an SSH server starts it: on a terminal one to talk to, else one that reads what it is sent.
INTERACTIVE = (("/bin/bash", "-il"), ("/bin/sh", "-il"))
READING = (("/bin/bash", "-l"), ("/bin/sh", "-l"))
# The guest's agent, as the server of a file transfer: as the instance's user, with that user's rights alone.
SFTP_SERVER = (("/.innkeeper/bin/inn-agent", "sftp-server"),)


@dataclass(frozen=True, slots=True)
class ProgramRequest:
    """A shell line (`command`), or else the first of `programs` that is there; on a terminal of `size` (columns, rows), where it is given.

    Raises:
        InvalidRequestError: a bad size or line.

    """

    command: str | None = None
    programs: tuple[tuple[str, ...], ...] = ()
    env: dict[str, str] = field(default_factory=dict, repr=False)
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.size is not None:
            check_size(*self.size)
        if self.command is not None and ("\0" in self.command or len(self.command.encode()) > COMMAND_BYTES_MAX):
            raise InvalidRequestError(f"The command must not contain NUL and has at most {COMMAND_BYTES_MAX} bytes")


@dataclass(frozen=True, slots=True)
class ProgramEnd:
    """How it ended: its status, 128+n after signal n, which is `signal` then."""

    exit_code: int
    signal: int | None


class Program:
    """A program that runs."""

    def __init__(self, call: Call, events: AsyncIterator[object]) -> None:
        self._call = call
        self._events = events

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """(channel, bytes) until its end; 2 is stderr. Raises the typed error when it is gone otherwise."""
        async for event in self._events:
            if isinstance(event, Data):
                yield event.channel, event.data

    async def end(self) -> ProgramEnd:
        """How it ended; after `output`."""
        answer = await self._call.result()
        return ProgramEnd(answer["exit_code"], answer["signal"])

    async def write(self, data: bytes) -> None:
        """Pass input on; waits while the program takes nothing. What comes after its end is dropped."""
        with contextlib.suppress(LinkLostError):
            await self._call.send_data(data)

    async def end_input(self) -> None:
        """Say that no more input comes."""
        await self._say({"end": True})

    async def signal(self, number: int) -> None:
        """Send its process group a signal."""
        await self._say({"signal": number})

    async def resize(self, cols: int, rows: int) -> None:
        """Say how large its window is now. Raises InvalidRequestError."""
        check_size(cols, rows)
        await self._say({"resize": {"cols": cols, "rows": rows}})

    async def _say(self, body: dict[str, object]) -> None:
        with contextlib.suppress(LinkLostError):
            await self._call.send_message(body)


@asynccontextmanager
async def run(control: Control, principal: Principal, entry: Entry, request: ProgramRequest) -> AsyncIterator[Program]:
    """A program that runs in an instance, which is woken where it sleeps. Leaving the context hangs up on it. It counts as use of the instance.

    Raises:
        FileMissingError: no such program.
        RateLimitedError: the instance has as many as it may have.
        And as `lifecycle.usable`.

    """
    await lifecycle.usable(control, principal, entry)
    with in_use(control, entry):
        for attempt in range(2):
            cols, rows = request.size or (None, None)
            env = entry.environment(request.env)
            verb = RunProgram(entry.instance.id, request.command, request.programs, env, cols, rows)
            async with control.bus.open(host_of(entry), verb.verb, to_wire(verb)) as call:
                events = aiter(call.events())
                try:
                    if not isinstance(await next_event(events), Message):
                        raise UnavailableError("The host answered out of turn")
                except InstanceNotFoundError:
                    if attempt:
                        raise InstanceFailedError("The guest is gone") from None
                else:
                    yield Program(call, events)
                    return
            await lifecycle.revive(control, principal, entry)
