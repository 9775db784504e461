"""A program in a guest as its agent shows it: started, spoken to, and followed to its end over links that break. Commands and terminals are such programs."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from innkeeper.errors import GuestError, InnkeeperError, InstanceFailedError, LinkLostError
from innkeeper.host.journal import Journal
from innkeeper.host.machine import Machine
from innkeeper.wire.stream import Data, Message, Stream

RELINK_SECONDS = 10.0
SIGNAL_SECONDS = 5.0
GUEST_RESTARTED = "The guest was started again on its disk; the command did not outlive it"


class GuestProgram:
    """One process that the agent was asked to start. Its output is read into a journal, whose length says where a later link goes on."""

    __slots__ = ("_attached", "_stream", "id", "journal", "machine")

    def __init__(self, machine: Machine, program_id: str, journal: Journal) -> None:
        self.machine = machine
        self.id = program_id
        self.journal = journal
        self._stream: Stream | None = None
        # Whether the agent was asked for a process that ran already.
        self._attached = False

    async def start(self, params: dict[str, Any]) -> Stream:
        """Ask the agent to start it; the stream's first event, which `follow` takes too, is that it runs, or the error that it does not."""
        request = {"id": self.id, "detach_on_cancel": True, **params}
        self._stream = await self.machine.endpoint.open("exec", request)
        return self._stream

    async def attach(self) -> None:
        """Go on with a process that runs already, where its journal ends."""
        self._attached = True
        params = {"id": self.id, "offset": self.journal.record.total_bytes}
        self._stream = await self.machine.endpoint.open("attach", params, timeout_seconds=RELINK_SECONDS)

    async def follow(
        self,
        *,
        keep: Callable[[Data], None],
        skip: Callable[[int], None],
        begun: Callable[[], None] = lambda: None,
        pause: Callable[[], Awaitable[None]] | None = None,
    ) -> dict[str, Any]:
        """The agent's `exited` message, when it has come. A link that breaks meanwhile is picked up again where the journal stands.

        `keep` gets the output, `skip` the offset at which it goes on where the guest dropped some; `begun` is called with each link's first word, which is
        that it runs; `pause` is awaited after each piece, and the guest's writer waits with it.

        Raises:
            InstanceFailedError: the machine has ended, or the guest was started again and knows the program no more.
            InnkeeperError: what the agent answers.

        """
        while True:
            try:
                return await self._read_until_exit(keep, skip, begun, pause)
            except LinkLostError:
                if self.machine.running.exited.done():
                    raise InstanceFailedError(self.machine.running.why()) from None
                await self.attach()
            except GuestError as error:
                if self._attached and error.guest_code == "no_such_process":
                    raise InstanceFailedError(GUEST_RESTARTED) from None
                raise

    async def _read_until_exit(
        self,
        keep: Callable[[Data], None],
        skip: Callable[[int], None],
        begun: Callable[[], None],
        pause: Callable[[], Awaitable[None]] | None,
    ) -> dict[str, Any]:
        stream, machine = self._opened(), self.machine
        spoken = False
        while (event := await stream.next_event()) is not None:
            if isinstance(event, Data):
                keep(event)
                await machine.output_pace.take(len(event.data))
                if pause is not None:
                    await pause()
            elif isinstance(event, Message):
                if event.body.get("exited"):
                    return event.body
                # Once: a guest may say something 20,000 times a second.
                if not spoken:
                    spoken = True
                    begun()
                offset = event.body.get("offset")
                if type(offset) is int:
                    skip(offset)
        raise GuestError("The guest agent ended a program without saying how")

    async def rest(self, keep: Callable[[Data], None]) -> None:
        """After its end: what it left running in the background still writes, until the last of that has closed the output."""
        stream = self._opened()
        while (event := await stream.next_event()) is not None:
            if isinstance(event, Data):
                keep(event)
                await self.machine.output_pace.take(len(event.data))

    async def write(self, data: bytes | None) -> None:
        """Pass input on; None is its end. What comes while no link carries it, or after the program's end, is dropped."""
        if self._stream is not None and self.linked:
            with contextlib.suppress(InnkeeperError):
                await (self._stream.send_end() if data is None else self._stream.send_data(data))

    async def tell(self, message: dict[str, Any]) -> None:
        """Say something to the agent about it; dropped like input."""
        if self._stream is not None and self.linked:
            with contextlib.suppress(LinkLostError):
                await self._stream.send_message(message)

    async def signal(self, number: int, *, session: bool = False) -> None:
        """Signal its process group, or every one of its session. Raises what the agent answers."""
        params = {"id": self.id, "signal": number, **({"session": True} if session else {})}
        await self.machine.endpoint.request("signal", params, timeout_seconds=SIGNAL_SECONDS)

    def let_go(self) -> None:
        """Read no more; the program is left alone, and the agent keeps the end of what it writes."""
        if self._stream is not None:
            self._stream.cancel()

    @property
    def linked(self) -> bool:
        """Whether a link carries what is said to it now."""
        return self._stream is not None and not self._stream.over

    def _opened(self) -> Stream:
        if self._stream is None:
            raise RuntimeError("the program was neither started nor attached to")
        return self._stream


def checked_integer(body: dict[str, Any], name: str) -> int:
    """A number of 32 bits that the agent sent. Raises GuestError."""
    value = body.get(name)
    # Not isinstance: JSON's true is an int to Python.
    if type(value) is not int or not -(2**31) <= value < 2**31:
        raise GuestError(f"The guest agent sent no valid {name}")
    return value


def checked_count(body: Mapping[str, Any], name: str) -> int | None:
    """A count that the agent sent, or None where it sent none that makes sense."""
    value = body.get(name)
    return value if type(value) is int and 0 <= value < 2**64 else None
