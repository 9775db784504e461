"""Commands: run in the guest, journalled on the host, their file changes scanned when they end.

An execution belongs to its machine, not to the call that started it: a client that goes away changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import structlog

from innkeeper.core.host_verbs import Execute
from innkeeper.errors import (
    ConflictError,
    FileMissingError,
    GuestError,
    InnkeeperError,
    InstanceFailedError,
    InstanceSuspendedError,
    InvalidRequestError,
)
from innkeeper.host.cells import keep_cell, kernel_of
from innkeeper.host.change_scanner import ChangeScanError
from innkeeper.host.execution import Execution
from innkeeper.host.exhaustion import unavailable
from innkeeper.host.file_changes import FileChanges
from innkeeper.host.guest_program import GuestProgram, checked_count, checked_integer
from innkeeper.host.journal import Journal, unfinished
from innkeeper.host.kept_executions import Excess, Headroom, prune, size_of
from innkeeper.host.machine import Machine
from innkeeper.host.metrics import CommandClock, HostMetrics
from innkeeper.host.turns import Turns

log = structlog.stdlib.get_logger(__name__)

# The agent enforces the timeout; an agent that does not is cut off this much later.
OVERTIME_SECONDS = 15.0
MAX_TIMEOUT_SECONDS = 3_600.0
# Free disk under which no command begins: what it says, and the records of those that run, have to go somewhere.
OUTPUT_RESERVE_BYTES = 16_777_216
OUTPUT_RESERVE_FILES = 100
MAX_CPU_US = 1 << 50
NO_CHANGES: Mapping[str, Any] = {"files_changed": [], "files_changed_total": 0, "files_changed_truncated": False}


class Executions:
    """Starts executions and follows them to their end."""

    def __init__(self, *, changes: FileChanges, turns: Turns, metrics: HostMetrics) -> None:
        self._metrics = metrics
        self._changes = changes
        self._turns = turns
        self._live: dict[UUID, Execution] = {}
        self._pruning: set[Path] = set()

    async def start(self, machine: Machine, request: Execute, directory: Path) -> Execution:
        """Start a command; returns when the agent was asked. Raises ConflictError for an id that was used before."""
        journal = Journal(directory, request.execution_id)
        if str(request.execution_id) in machine.journals or journal.exists():
            raise ConflictError("There is an execution of that id already")
        execution = Execution(request, machine, _program(machine, request, journal), directory)
        self._add(execution)
        started = asyncio.Event()
        task = machine.start_task(self._run(execution, started))
        # A task that is cancelled before its first step never enters its body.
        task.add_done_callback(lambda _: self._never_ran(execution, started))
        await started.wait()
        return execution

    def live(self, instance_id: UUID, execution_id: UUID) -> Execution | None:
        """An execution of the instance whose output may still grow."""
        found = self._live.get(execution_id)
        return found if found is not None and found.request.instance_id == instance_id else None

    async def signal(self, instance_id: UUID, execution_id: UUID, number: int) -> None:
        """Signal a running execution's process group. Raises ConflictError when it has ended, and before it has begun."""
        execution = self.live(instance_id, execution_id)
        if execution is None or execution.over:
            raise ConflictError("The execution has ended")
        async with execution.machine.in_use():
            try:
                await execution.program.signal(number)
            except GuestError as error:
                if error.guest_code != "no_such_process":
                    raise
                # The guest knows first how things stand.
                raise ConflictError(f"The execution has {'ended' if execution.begun else 'not begun yet'}") from None

    def _add(self, execution: Execution) -> None:
        execution_id = execution.request.execution_id
        execution.machine.journals[str(execution_id)] = execution.journal
        self._live[execution_id] = execution

    def _remove(self, execution: Execution) -> None:
        execution_id = execution.request.execution_id
        execution.machine.journals.pop(str(execution_id), None)
        self._live.pop(execution_id, None)

    def _never_ran(self, execution: Execution, started: asyncio.Event) -> None:
        if not started.is_set():
            self._remove(execution)
            self._lose(execution, InstanceFailedError(execution.machine.failure or "The machine was taken away"))
            execution.journal.close()
            started.set()

    def resume(self, machine: Machine, directory: Path) -> None:
        """Go on with the commands that an earlier daemon began in the machine. Whoever asked for them is gone; their journals are not."""
        assert machine.record.instance_id is not None  # noqa: S101 - only instances run commands
        if any(directory.glob("*")):
            # How much there is by now nobody knows: a guest that ends itself again and again must not begin anew each time with room for more.
            machine.headroom = Headroom(0, 0)
        for execution_id in unfinished(directory):
            journal = Journal.resume(directory, execution_id)
            # The agent still holds the real time limit.
            request = Execute(
                machine.record.instance_id, execution_id, "", timeout_seconds=MAX_TIMEOUT_SECONDS, merge=False
            )
            execution = Execution(request, machine, _program(machine, request, journal), directory, begun=True)
            self._add(execution)
            machine.start_task(self._run(execution, asyncio.Event(), resumed=True))

    async def _run(self, execution: Execution, started: asyncio.Event, *, resumed: bool = False) -> None:
        machine = execution.machine
        clock = self._metrics.command_clock()
        try:
            async with machine.in_use():
                clock.lap("thaw")
                await self._run_in(execution, started, clock, resumed=resumed)
            if not resumed:
                clock.end(timed_out=execution.journal.record.timed_out)
        except TimeoutError:
            machine.fail("The guest agent did not end a command at its time limit")
            self._lose(execution, InstanceFailedError(machine.failure))
        except FileMissingError as error:
            # The only path in a shell line's request is its working directory; "file not found" would sound as if a file had been asked for.
            self._lose(execution, InvalidRequestError(_at_fault(execution.request) + error.message))
        except InnkeeperError as error:
            self._lose(execution, error)
        except OSError as error:
            # Above all a full disk: output that cannot be kept must not look as if there had been none.
            log.error("an execution cannot be kept", machine=machine.id, error=str(error))
            self._lose(execution, unavailable(error) or InnkeeperError())
            await self._kill(execution)
        except Exception:
            # Whatever it is, the one who waits must hear of an end, and no internals.
            log.exception("an execution failed", machine=machine.id)
            self._lose(execution, InnkeeperError())
        except asyncio.CancelledError:
            if machine.failure is None:
                # The daemon ends, the guest does not: the mark stays, and the next daemon goes on; so does the next machine of a suspended instance.
                execution.journal.close()
                if machine.suspended:
                    self._put_off(execution)
            else:
                self._lose(execution, InstanceFailedError(machine.failure))
            raise
        finally:
            started.set()
        await self._background_output(execution)

    async def _run_in(
        self, execution: Execution, started: asyncio.Event, clock: CommandClock, *, resumed: bool
    ) -> None:
        machine, request, record = execution.machine, execution.request, execution.journal.record
        began = time.monotonic()
        try:
            if not request.exact_env:
                await self._changes.ensure_baseline(machine)
        except ChangeScanError as error:
            # The command is what was asked for; its file changes cannot be told, and `files_changed_truncated` says so.
            log.warning("no baseline", machine=machine.id, code=error.code)
        clock.lap("baseline")
        turn = await self._turns.take()
        clock.lap("turn")
        try:
            if resumed:
                await execution.program.attach()
            else:
                _check_room(execution.directory)
                await execution.program.start(_exec_params(request))
                # While the guest starts the command, not before: nobody waits for this file then.
                execution.journal.begin()
            started.set()
            async with asyncio.timeout(request.timeout_seconds + OVERTIME_SECONDS):
                exited = await execution.program.follow(
                    keep=execution.heard, skip=execution.journal.skip_to, begun=execution.started
                )
        finally:
            turn.end()
        clock.lap("guest")
        if exited.get("exit_code") != 0 and machine.running.ran_out_of_memory():
            # The kernel took one process of the sandbox from under the sentry: what still works in there is chance.
            machine.fail("The guest ran out of memory")
            raise InstanceFailedError(machine.failure)
        machine.user_processes = checked_integer(exited, "user_processes")
        record.exit_code, record.signal = checked_integer(exited, "exit_code"), _signal(exited)
        record.timed_out = bool(exited.get("timed_out"))
        record.duration_ms = round((time.monotonic() - began) * 1000, 3)
        record.cpu_ms = _cpu_ms(exited)
        execution.answer_bytes = record.total_bytes
        cell = exited.get("cell")
        if isinstance(cell, dict):
            await keep_cell(execution.machine, execution.directory, record, cell)
            self._metrics.count_cell("lost" if record.kernel_lost else "fresh" if record.kernel_fresh else "kept")
        changes = NO_CHANGES
        if not request.exact_env:
            changes = await self._changes_of(machine, request.execution_id, checked_count(exited, "writes"))
        clock.lap("changes")
        record.ended = True
        try:
            execution.journal.finish()
        except OSError as error:
            # The command was carried out and its result is known: only those who ask later get none.
            log.error("an execution's end is not recorded", machine=machine.id, error=str(error))
        execution.answer = {
            "exit_code": record.exit_code,
            "signal": record.signal,
            "timed_out": record.timed_out,
            "duration_ms": record.duration_ms,
            "started_at": record.started_at,
            "cpu_ms": record.cpu_ms,
            "output_bytes": execution.answer_bytes,
            "stderr_bytes": record.stderr_bytes,
            "output_truncated": max(record.stderr_bytes, execution.answer_bytes - record.stderr_bytes)
            > request.answer_bytes,
            "kernel": kernel_of(record),
            "result_bytes": record.result_bytes,
            "results_truncated": record.results_truncated,
            **changes,
        }
        execution.changed.set()
        machine.check_disk()

    async def _changes_of(self, machine: Machine, execution_id: UUID, writes: int | None) -> dict[str, Any]:
        """What the command changed. It was carried out, so a scan that fails costs its list, never its result."""
        try:
            return await self._changes.after_command(machine, execution_id, writes=writes)
        except ChangeScanError as error:
            log.warning("no report of changes", machine=machine.id, code=error.code)
            if error.code in ("bad_baseline", "no_baseline"):
                self._changes.forget_baseline(machine)
            return {**NO_CHANGES, "files_changed_truncated": True}

    async def _background_output(self, execution: Execution) -> None:
        """Keep journalling what background children write, until the last of them has closed the output."""
        journal = execution.journal
        try:
            if execution.failure is None:
                await execution.program.rest(execution.heard)
        except InnkeeperError:
            pass
        except OSError as error:
            log.error("background output is not kept", machine=execution.machine.id, error=str(error))
        finally:
            if journal.record.total_bytes != execution.answer_bytes and execution.over:
                with contextlib.suppress(OSError):
                    journal.finish()
            journal.close()
            self._remove(execution)
            self._count(execution)

    async def _kill(self, execution: Execution) -> None:
        """End a command that nobody follows any more, with the whole of its process group."""
        with contextlib.suppress(InnkeeperError):
            await execution.program.signal(signal.SIGKILL)
        execution.program.let_go()

    def _count(self, execution: Execution) -> None:
        machine, instance_id = execution.machine, execution.request.instance_id
        headroom = machine.headroom
        headroom.take(
            size_of(str(execution.request.execution_id), execution.directory, self._changes.folder(instance_id))
        )
        if headroom.used_up and execution.directory not in self._pruning:
            machine.start_task(self._prune(execution))

    async def _prune(self, execution: Execution) -> None:
        """Keep an instance's executions within their limits."""
        machine, instance_id = execution.machine, execution.request.instance_id
        # So much later again, if this fails.
        machine.headroom = Headroom()
        try:
            excess = await self._dropped(instance_id, execution.directory, frozenset(machine.journals), 0.0)
        except OSError as error:
            log.warning("old executions could not be removed", machine=machine.id, error=str(error))
        else:
            if excess is not None:
                machine.headroom = excess.headroom

    async def prune_old(self, instance_id: UUID, directory: Path, *, running: frozenset[str], older_than: float) -> int:
        """Drop what ended before `older_than` (Unix time) of an instance's executions; how many went. `running` stay."""
        excess = await self._dropped(instance_id, directory, running, older_than)
        return 0 if excess is None else len(excess.sizes)

    async def _dropped(
        self, instance_id: UUID, directory: Path, running: frozenset[str], older_than: float
    ) -> Excess | None:
        """In a thread, and one at a time (None: one does it already): the folder may hold tens of thousands of files."""
        if directory in self._pruning:
            return None
        self._pruning.add(directory)
        try:
            folders = (directory, self._changes.folder(instance_id))
            return await asyncio.to_thread(prune, *folders, keep=running, older_than=older_than)
        finally:
            self._pruning.discard(directory)

    def _put_off(self, execution: Execution) -> None:
        """Whoever waits for it hears that it goes on later; its mark and journal stay for then."""
        self._remove(execution)
        execution.answer_bytes = execution.journal.record.total_bytes
        execution.failure = InstanceSuspendedError("The instance was suspended; what runs in it goes on when it does")
        execution.changed.set()

    def _lose(self, execution: Execution, error: InnkeeperError) -> None:
        self._metrics.count_lost_command()
        record = execution.journal.record
        record.ended, record.lost = True, error.message
        execution.answer_bytes = record.total_bytes
        with contextlib.suppress(OSError):
            execution.journal.finish()
        execution.failure = error
        execution.changed.set()


def _program(machine: Machine, request: Execute, journal: Journal) -> GuestProgram:
    return GuestProgram(machine, str(request.execution_id), journal)


def _at_fault(request: Execute) -> str:
    return "" if request.argv or request.kernel is not None else "cwd: "


def _cpu_ms(exited: dict[str, Any]) -> float | None:
    """Processor time as the guest counts it; None from an agent that does not."""
    value = exited.get("cpu_us")
    return value / 1000 if type(value) is int and 0 <= value < MAX_CPU_US else None


def _check_room(directory: Path) -> None:
    """Refuse a command before it has begun where its output could not be kept."""
    found = os.statvfs(directory)
    # File systems that make inodes as they go say that they have none at all.
    files = found.f_favail if found.f_files else OUTPUT_RESERVE_FILES
    if found.f_bavail * found.f_frsize < OUTPUT_RESERVE_BYTES or files < OUTPUT_RESERVE_FILES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _exec_params(request: Execute) -> dict[str, Any]:
    params: dict[str, Any] = {"merge": request.merge, "timeout_ms": int(request.timeout_seconds * 1000)}
    if request.exact_env:
        params["exact_env"] = True
    if request.kernel is not None:
        params["cell"] = {"kernel": request.kernel, "code": request.command}
    elif request.argv:
        params["argv"] = list(request.argv)
    else:
        params["shell"] = request.command
    if request.user is not None:
        params["user"] = request.user
    if request.cwd is not None:
        params["cwd"] = request.cwd
    if request.env:
        params["env"] = request.env
    if request.stdin:
        params["stdin"] = True
    return params


def _signal(body: dict[str, Any]) -> int | None:
    value = body.get("signal")
    return value if type(value) is int and 1 <= value <= 64 else None
