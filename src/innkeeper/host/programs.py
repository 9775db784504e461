"""Programs that belong to whoever runs them (`core.program_verbs`): their bytes pass through, and nobody outlives the call but what ignores a hang-up."""

from __future__ import annotations

import contextlib
import signal
from collections import Counter
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from innkeeper.bus.contract import Data, Handler, Message, ServerCall
from innkeeper.core.program_verbs import RunProgram
from innkeeper.core.terminal_verbs import SIZE_RANGE
from innkeeper.errors import (
    FileMissingError,
    GuestError,
    InnkeeperError,
    InstanceFailedError,
    LinkLostError,
    RateLimitedError,
)
from innkeeper.host.fleet import Fleet
from innkeeper.host.guest_program import GUEST_RESTARTED, RELINK_SECONDS, SIGNAL_SECONDS, checked_integer
from innkeeper.host.machine import Machine
from innkeeper.host.turns import Turns
from innkeeper.host.verbs import bind_handler
from innkeeper.wire.stream import Stream

# What tells them from executions and terminals, which outlive a daemon, in the agent's list.
ID_PREFIX = "program-"
LAST_SIGNAL = 64


class Programs:
    """Serves the verb, and hangs up on programs whose owner went away with an earlier daemon."""

    def __init__(self, fleet: Fleet, turns: Turns, *, limit: int) -> None:
        self._fleet = fleet
        self._turns = turns
        self._limit = limit
        self._running: Counter[str] = Counter()

    def handlers(self) -> Mapping[str, Handler]:
        """Handlers by verb."""
        return {RunProgram.verb: bind_handler(RunProgram, self._run)}

    async def _run(self, request: RunProgram, call: ServerCall) -> dict[str, Any]:
        machine = self._fleet.machine(request.instance_id)
        if self._running[machine.id] >= self._limit:
            raise RateLimitedError(f"The instance has {self._limit} such programs, which is its limit: end one first")
        self._running[machine.id] += 1
        try:
            async with machine.in_use():
                turn = await self._turns.take()
                try:
                    program = await _start(machine, request, call)
                finally:
                    turn.end()
                return await program.run()
        finally:
            self._running[machine.id] -= 1
            if not self._running[machine.id]:
                del self._running[machine.id]

    def hang_up_on_orphans(self, machine: Machine) -> None:
        """End what earlier calls ran in a machine that was adopted, or that goes on from a checkpoint. A frozen one has no such program."""
        if not machine.frozen:
            machine.start_task(_hang_up_on_orphans(machine))


async def _hang_up_on_orphans(machine: Machine) -> None:
    with contextlib.suppress(InnkeeperError):
        async with machine.in_use():
            answer = await machine.endpoint.request("processes", {}, timeout_seconds=RELINK_SECONDS)
            rows = answer.get("executions")
            for row in rows if isinstance(rows, list) else ():
                program_id = row.get("id") if isinstance(row, dict) else None
                if isinstance(program_id, str) and program_id.startswith(ID_PREFIX) and row.get("running") is True:
                    await _hang_up(machine, program_id)


async def _hang_up(machine: Machine, program_id: str) -> None:
    params = {"id": program_id, "signal": int(signal.SIGHUP), "session": True}
    with contextlib.suppress(InnkeeperError):
        async with machine.in_use():
            await machine.endpoint.request("signal", params, timeout_seconds=SIGNAL_SECONDS)


async def _start(machine: Machine, request: RunProgram, call: ServerCall) -> _Program:
    """The program, which runs. Raises what the guest says where none of them does."""
    params: dict[str, Any] = {"env": request.env, "stdin": True, "merge": False, "detach_on_cancel": True}
    if request.cols is not None and request.rows is not None:
        params["pty"] = {"cols": request.cols, "rows": request.rows}
    choices: list[dict[str, Any]] = (
        [{"shell": request.command}]
        if request.command is not None
        else [{"argv": list(words)} for words in request.programs]
    )
    for number, choice in enumerate(choices, 1):
        program_id = ID_PREFIX + uuid4().hex
        stream = await machine.endpoint.open("exec", {"id": program_id, **params, **choice})
        try:
            # Its first word is that the program runs, or that there is none.
            await stream.next_event()
        except FileMissingError:
            if number == len(choices):
                raise
        except BaseException:
            # Whoever asked is gone, and the program may just be starting.
            stream.cancel()
            machine.start_task(_hang_up(machine, program_id))
            raise
        else:
            return _Program(machine, program_id, stream, call, on_terminal="pty" in params)
    raise AssertionError


class _Program:
    """One program that runs for one call."""

    def __init__(
        self, machine: Machine, program_id: str, stream: Stream, call: ServerCall, *, on_terminal: bool
    ) -> None:
        self._machine = machine
        self._id = program_id
        self._stream = stream
        self._call = call
        self._on_terminal = on_terminal
        self._exited: dict[str, Any] | None = None
        self._sent = 0
        # Whether anything was passed to its input, and whether that has ended.
        self._was_fed = False
        self._input_ended = False

    async def run(self) -> dict[str, Any]:
        """Pass its output on until it has ended, and its input beside. Whoever gives the call up hangs up on the program."""
        await self._call.send_message({"started": True})
        inward = self._machine.start_task(self._obey())
        try:
            await self._show()
        finally:
            inward.cancel()
            self._stream.cancel()
            if self._exited is None:
                self._machine.start_task(_hang_up(self._machine, self._id))
        return self._end()

    async def _show(self) -> None:
        while True:
            try:
                event = await self._stream.next_event()
            except LinkLostError:
                await self._relink()
                continue
            if event is None:
                return
            if isinstance(event, Data):
                self._sent += len(event.data)
                await self._call.send_data(event.data, channel=event.channel)
            elif isinstance(event, Message) and event.body.get("exited") and self._exited is None:
                self._exited = event.body
                self._machine.user_processes = checked_integer(event.body, "user_processes")
                if self._on_terminal:
                    return

    async def _relink(self) -> None:
        """Go on over the link that follows a broken one: a checkpoint of the guest does that. Raises InstanceFailedError where bytes may be missing."""
        if self._machine.running.exited.done():
            raise InstanceFailedError(self._machine.running.why())
        if self._was_fed and not self._on_terminal:
            # How much of it has arrived nobody knows; a key that is typed twice or never is seen by whoever typed it.
            raise InstanceFailedError("The link to the guest broke while the program was sent its input")
        params = {"id": self._id, "offset": self._sent}
        self._stream = await self._machine.endpoint.open("attach", params, timeout_seconds=RELINK_SECONDS)
        try:
            first = await self._stream.next_event()
        except GuestError as error:
            raise InstanceFailedError(
                GUEST_RESTARTED if error.guest_code == "no_such_process" else error.message
            ) from None
        if not isinstance(first, Message) or first.body.get("offset") != self._sent:
            raise InstanceFailedError("Output of the program was lost while the link to the guest was broken")
        if self._input_ended:
            await self._stream.send_end()

    async def _obey(self) -> None:
        """Pass on what the call's opener says. What goes wrong here ends the stream, and whoever reads its other direction says so."""
        async for event in self._call.events():
            with contextlib.suppress(InnkeeperError):
                if isinstance(event, Data):
                    self._was_fed = True
                    await self._stream.send_data(event.data)
                elif isinstance(event, Message):
                    await self._order(event.body)

    async def _order(self, body: dict[str, Any]) -> None:
        number, size = body.get("signal"), body.get("resize")
        if type(number) is int and 1 <= number <= LAST_SIGNAL:
            await self._stream.send_message({"signal": number})
        if isinstance(size, dict):
            cols, rows = size.get("cols"), size.get("rows")
            low, high = SIZE_RANGE
            if type(cols) is int and type(rows) is int and low <= cols <= high and low <= rows <= high:
                await self._stream.send_message({"resize": {"rows": rows, "cols": cols}})
        if body.get("end") is True and not self._input_ended:
            self._input_ended = True
            await self._stream.send_end()

    def _end(self) -> dict[str, Any]:
        if self._exited is None:
            raise GuestError("The guest agent ended a program without saying how")
        number = self._exited.get("signal")
        return {
            "exit_code": checked_integer(self._exited, "exit_code"),
            "signal": number if type(number) is int and 1 <= number <= LAST_SIGNAL else None,
        }
