"""Terminals: programs on pseudo terminals of guests. One belongs to its machine, not to those who look at it: they come and go."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import Any
from uuid import uuid4

import structlog

from innkeeper.bus.contract import Handler, ServerCall
from innkeeper.core import terminal_verbs as verbs
from innkeeper.errors import (
    ConflictError,
    FileMissingError,
    GuestError,
    InnkeeperError,
    InstanceFailedError,
    InstanceSuspendedError,
    InvalidRequestError,
    RateLimitedError,
    TerminalNotFoundError,
)
from innkeeper.host.exhaustion import unavailable
from innkeeper.host.fleet import Fleet
from innkeeper.host.guest_program import SIGNAL_SECONDS, GuestProgram, checked_integer
from innkeeper.host.journal import Journal, read_record, unfinished
from innkeeper.host.machine import Machine
from innkeeper.host.terminal import SCROLLBACK, SUFFIX, Size, Terminal, Viewer
from innkeeper.host.turns import Turns
from innkeeper.host.verbs import bind_handler

log = structlog.stdlib.get_logger(__name__)

START_SECONDS = 15.0
# What a program may do about it when its terminal is hung up.
HANGUP_SECONDS = 1.0
MAX_VIEWERS = 32
# Of those that ended: so that whoever asks how it ended, or comes too late to see it, still finds it.
KEPT_ENDED = 32
# Terminals of all guests whose output waits for their viewers: each holds up to 1 MiB here meanwhile. Beyond that viewers skip instead.
MAX_WAITING = 32


class Terminals:
    """Serves the verbs of `core.terminal_verbs`, and follows each program to its end."""

    def __init__(self, fleet: Fleet, turns: Turns, *, limit: int) -> None:
        self._fleet = fleet
        self._turns = turns
        self._limit = limit
        self._waiting = 0

    def handlers(self) -> dict[str, Handler]:
        """Handlers by verb."""
        return {
            verbs.StartTerminal.verb: bind_handler(verbs.StartTerminal, self._start),
            verbs.ListTerminals.verb: bind_handler(verbs.ListTerminals, self._list),
            verbs.ResizeTerminal.verb: bind_handler(verbs.ResizeTerminal, self._resize),
            verbs.EndTerminal.verb: bind_handler(verbs.EndTerminal, self._end),
            verbs.AttachTerminal.verb: bind_handler(verbs.AttachTerminal, self._attach),
        }

    # --- the verbs -----------------------------------------------------------------------------------------------------

    async def _start(self, request: verbs.StartTerminal, call: ServerCall) -> dict[str, Any]:
        machine = self._fleet.machine(request.instance_id)
        terminal_id = uuid4()
        name = request.name or str(terminal_id)
        old = machine.terminals.get(name)
        if old is not None and old.alive:
            raise ConflictError(f"There is a terminal '{name}' already")
        if sum(one.alive for one in machine.terminals.values()) >= self._limit:
            raise RateLimitedError(f"The instance has {self._limit} terminals, which is its limit: close one first")
        directory = self._fleet.terminals(machine)
        directory.mkdir(mode=0o700, exist_ok=True)
        program = GuestProgram(machine, str(terminal_id), Journal(directory, terminal_id, kept=SCROLLBACK))
        size = Size(request.cols, request.rows)
        terminal = Terminal(terminal_id, name, request.label, size, machine, directory, program)
        if old is not None:
            old.remove()
        machine.terminals[name] = terminal
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = machine.start_task(self._run(terminal, started, request))
        # A task that is cancelled before its first step never enters its body.
        task.add_done_callback(lambda _: None if started.done() else started.cancel())
        try:
            async with asyncio.timeout(START_SECONDS + self._turns.waiting):
                await asyncio.shield(started)
        except TimeoutError:
            task.cancel()
            raise GuestError("The guest did not start the terminal in time") from None
        except asyncio.CancelledError:
            if started.cancelled():
                raise InstanceFailedError(machine.failure or "The machine was taken away") from None
            raise
        return {"terminal": terminal.row()}

    async def _list(self, request: verbs.ListTerminals, call: ServerCall) -> dict[str, Any]:
        machine = self._fleet.machine(request.instance_id)
        found = sorted(machine.terminals.values(), key=lambda one: (not one.alive, one.record.started_at))
        return {"terminals": [one.row() for one in found]}

    async def _resize(self, request: verbs.ResizeTerminal, call: ServerCall) -> dict[str, Any]:
        terminal = _find(self._fleet.machine(request.instance_id), request.name)
        if not terminal.alive:
            raise ConflictError("The terminal's program has ended")
        terminal.resize(Size(request.cols, request.rows))
        return {"terminal": terminal.row()}

    async def _end(self, request: verbs.EndTerminal, call: ServerCall) -> dict[str, Any]:
        machine = self._fleet.machine(request.instance_id)
        terminal = _find(machine, request.name)
        if terminal.alive:
            # Its own task keeps the guest awake until it has ended.
            for number, patience in ((signal.SIGHUP, HANGUP_SECONDS), (signal.SIGKILL, SIGNAL_SECONDS)):
                await self._signal(terminal, number)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience):
                        await terminal.over.wait()
            if terminal.alive:
                raise GuestError("The guest did not end the terminal's program")
        if machine.terminals.get(terminal.name) is terminal:
            del machine.terminals[terminal.name]
        row = terminal.row()
        terminal.remove()
        return {"terminal": row}

    async def _attach(self, request: verbs.AttachTerminal, call: ServerCall) -> dict[str, Any]:
        terminal = _find(self._fleet.machine(request.instance_id), request.name)
        if len(terminal.viewers) >= MAX_VIEWERS:
            raise RateLimitedError(f"{MAX_VIEWERS} look at the terminal already, which is the limit")
        viewer = Viewer(request.offset)
        obeying = terminal.machine.start_task(terminal.obey(call))
        terminal.viewers.add(viewer)
        try:
            return await terminal.show(viewer, call)
        finally:
            obeying.cancel()
            terminal.viewers.discard(viewer)
            terminal.took(0)

    # --- from the program's start to its end ------------------------------------------------------------------------------

    def resume(self, machine: Machine) -> None:
        """Know the terminals that an earlier daemon, or an earlier machine of the instance, had; go on with those that had not ended."""
        directory = self._fleet.terminals(machine)
        running = frozenset(unfinished(directory))
        for path in directory.glob(f"*{SUFFIX}"):
            terminal = Terminal.load(path, machine)
            if terminal is None or terminal.name in machine.terminals:
                continue
            if terminal.id in running:
                terminal.program.journal = Journal.resume(path.parent, terminal.id, kept=SCROLLBACK)
                machine.terminals[terminal.name] = terminal
                machine.start_task(self._run(terminal, asyncio.get_running_loop().create_future()))
            else:
                with contextlib.suppress(InnkeeperError):
                    terminal.journal.record = read_record(path.parent, terminal.id)
                    terminal.over.set()
                    machine.terminals[terminal.name] = terminal

    async def _run(
        self, terminal: Terminal, started: asyncio.Future[None], request: verbs.StartTerminal | None = None
    ) -> None:
        """The program from its start, or (without a request) from where an earlier daemon left it, to its end."""
        machine = terminal.machine
        failure: InnkeeperError | None = None
        try:
            async with machine.in_use():
                if request is None:
                    await terminal.program.attach()
                else:
                    terminal.save()
                    terminal.journal.begin()
                    await self._launch(terminal, request)
                if not started.done():
                    started.set_result(None)
                exited = await terminal.program.follow(
                    keep=terminal.heard,
                    skip=terminal.skip_to,
                    begun=terminal.relinked,
                    pause=lambda: self._wait_for_viewers(terminal),
                )
                machine.user_processes = checked_integer(exited, "user_processes")
                terminal.record.exit_code = checked_integer(exited, "exit_code")
        except asyncio.CancelledError:
            if machine.failure is None and started.done():
                # The daemon ends, the guest does not: the mark stays, and the next daemon goes on; so does the next machine of a suspended instance.
                terminal.journal.close()
                if machine.suspended:
                    terminal.put_off(
                        InstanceSuspendedError("The instance was suspended; its terminals go on when it does")
                    )
                raise
            failure = InstanceFailedError(machine.failure)
            if machine.failure is None:
                # It took too long to start, and may yet.
                machine.start_task(self._signal(terminal, signal.SIGKILL))
            raise
        except FileMissingError as error:
            failure = InvalidRequestError(error.message)
        except InnkeeperError as error:
            failure = error
        except OSError as error:
            log.error("a terminal's output cannot be kept", machine=machine.id, error=str(error))
            failure = unavailable(error) or InnkeeperError()
            await self._signal(terminal, signal.SIGKILL)
        except Exception:
            log.exception("a terminal failed", machine=machine.id)
            failure = InnkeeperError()
        finally:
            if failure is not None or terminal.record.exit_code is not None:
                self._over(terminal, failure, started)

    def _over(self, terminal: Terminal, failure: InnkeeperError | None, started: asyncio.Future[None]) -> None:
        machine = terminal.machine
        terminal.ended(failure)
        # What its children in the background still write is nobody's to read.
        terminal.program.let_go()
        if not started.done():
            # It never began: there is no terminal.
            if machine.terminals.get(terminal.name) is terminal:
                del machine.terminals[terminal.name]
            terminal.remove()
            started.set_exception(failure or InnkeeperError())
            # Whoever asked may have gone away.
            started.exception()
        ended = [one for one in machine.terminals.values() if not one.alive]
        for old in sorted(ended, key=lambda one: one.record.started_at)[: max(0, len(ended) - KEPT_ENDED)]:
            del machine.terminals[old.name]
            old.remove()

    async def _launch(self, terminal: Terminal, request: verbs.StartTerminal) -> None:
        """Start the first of the programs that is there. Raises the last one's error."""
        pty = {"rows": terminal.size.rows, "cols": terminal.size.cols}
        turn = await self._turns.take()
        try:
            for number, words in enumerate(request.programs, 1):
                stream = await terminal.program.start({"argv": list(words), "pty": pty, "env": request.env})
                try:
                    # Its first word is that the program runs, or that there is none.
                    await stream.next_event()
                except FileMissingError:
                    if number == len(request.programs):
                        raise
                else:
                    terminal.told = terminal.size
                    return
        finally:
            turn.end()

    async def _wait_for_viewers(self, terminal: Terminal) -> None:
        if terminal.has_patience() and self._waiting < MAX_WAITING:
            self._waiting += 1
            try:
                await terminal.wait_for_viewers()
            finally:
                self._waiting -= 1

    async def _signal(self, terminal: Terminal, number: int) -> None:
        with contextlib.suppress(InnkeeperError):
            await terminal.program.signal(number, session=True)


def _find(machine: Machine, name: str) -> Terminal:
    terminal = machine.terminals.get(name)
    if terminal is None:
        raise TerminalNotFoundError
    return terminal
