"""Executions of VMs and sessions: code and programs, with their outputs apart; findable by their id alone, whatever happens to who asked."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from innkeeper.bus.contract import Data, Message
from innkeeper.control import clock, executions, guest_calls
from innkeeper.control.access import require
from innkeeper.control.executions import (
    Execution,
    ExecutionRequest,
    ExecutionResult,
    FilesChangedPage,
    KernelState,
    OutputPage,
    kernel_state,
)
from innkeeper.control.silences import with_silences
from innkeeper.control.vm_entry import VmEntry
from innkeeper.core.cell_results import CellResult, parse_results
from innkeeper.core.execution import ExecutionRow
from innkeeper.core.host_verbs import FollowOutput, ReadOutput, ReadResults, SignalExecution, to_wire
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import ExecutionNotFoundError, InvalidRequestError
from innkeeper.store import executions as store

if TYPE_CHECKING:
    from innkeeper.control.context import Control

TEXT_BYTES = 1_048_576
STDERR = 2
KERNEL = "session"
PAGE_MAX = 1_000
# What is said of a field here begins with its name; anything else about a program is in the guest's words.
_OURS = re.compile(r"(argv|command|cwd|env|stdin|timeout|user)(\.[^:]*)?: ")


@dataclass(frozen=True, slots=True)
class Outputs:
    """The first mebibyte of each output."""

    stdout: bytes
    stderr: bytes


@dataclass(frozen=True, slots=True)
class ExecutionState:
    """An execution as far as it has come. `lost` says why there will be no result; times in Unix seconds and milliseconds."""

    row: ExecutionRow
    entry: VmEntry
    ended: bool
    exit_code: int | None
    signal: int | None
    timed_out: bool
    duration_ms: float | None
    cpu_ms: float | None
    lost: str | None
    started_at: float
    total_bytes: int
    stderr_bytes: int
    kernel: KernelState | None
    result_bytes: int
    results_truncated: bool


def request_for(kind: str, code: str, *, timeout_seconds: float) -> ExecutionRequest:
    """The request that runs code of a language: `python` in the session's interpreter, `bash`, or `node`. Raises InvalidRequestError."""
    if kind == "node":
        return ExecutionRequest("", timeout_seconds, merge=False, argv=("node", "-e", code))
    # A VM belongs to one session, so one name is enough.
    return ExecutionRequest(code, timeout_seconds, merge=False, kernel=KERNEL if kind == "python" else None)


@asynccontextmanager
async def start(
    control: Control, principal: Principal, entry: VmEntry, kind: str, request: ExecutionRequest
) -> AsyncIterator[Execution]:
    """Run it in a VM that is ready; as `executions.start`. Its id can be looked up from then on."""
    async with _named_field(kind), executions.start(control, principal, entry, request) as execution:
        control.later.execution(_row(entry, kind, execution.execution_id))
        yield execution


async def run(
    control: Control, principal: Principal, entry: VmEntry, kind: str, request: ExecutionRequest
) -> tuple[UUID, Outputs, ExecutionResult]:
    """Run it to its end: its id, what it wrote, how it ended. Raises as `start`, `output` and `result` of an execution."""
    async with start(control, principal, entry, kind, request) as execution:
        kept = (bytearray(), bytearray())
        async for piece in execution.output:
            kept[piece.channel == STDERR].extend(piece.data)
        result = await execution.result()
    return execution.execution_id, Outputs(bytes(kept[0]), bytes(kept[1])), result


async def begin(
    control: Control, principal: Principal, entry: VmEntry, kind: str, request: ExecutionRequest
) -> ExecutionRow:
    """Begin it, and leave it to itself; answers when the guest has begun and its id is stored. Raises what keeps it from beginning."""
    async with (
        _named_field(kind),
        executions.start(control, principal, entry, request, detach=True) as execution,
    ):
        row = _row(entry, kind, execution.execution_id)
        await asyncio.gather(execution.answer(), control.database.write(store.insert, row))
    return row


async def find(control: Control, principal: Principal, execution_id: UUID) -> tuple[ExecutionRow, VmEntry]:
    """An execution and the VM that it ran in. Raises ExecutionNotFoundError, also when its VM has ended."""
    require(principal, Scope.ROOMS)
    row: ExecutionRow | None = await control.database.read(store.get, execution_id)
    if row is None:
        # It may be among what is still to be written.
        await control.later.flush(control)
        row = await control.database.read(store.get, execution_id)
    if row is None or row.organization_id != principal.organization_id:
        raise ExecutionNotFoundError
    entry = control.live.by_instance(row.instance_id)
    if not isinstance(entry, VmEntry) or entry.doomed:
        raise ExecutionNotFoundError("The execution's VM has ended, and what it left is gone")
    return row, entry


async def list_of_vm(
    control: Control, entry: VmEntry, *, before: UUID | None = None, limit: int = PAGE_MAX
) -> list[ExecutionRow]:
    """A VM's executions, newest first."""
    await control.later.flush(control)
    rows: list[ExecutionRow] = await control.database.read(store.page, entry.instance.id, before=before, limit=limit)
    return rows


async def state(
    control: Control, principal: Principal, execution_id: UUID
) -> tuple[ExecutionState, Outputs, tuple[CellResult, ...]]:
    """How far an execution has come, what it wrote and what it displayed. Raises ExecutionNotFoundError."""
    row, entry = await find(control, principal, execution_id)
    verb = ReadOutput(entry.instance.id, execution_id, limit=TEXT_BYTES, each=True)
    kept = (bytearray(), bytearray())
    head, _ = await guest_calls.kept(
        control, entry, verb, lambda piece: kept[piece.channel == STDERR].extend(piece.data)
    )
    found = _state(row, entry, head)
    shown = await results(control, entry, execution_id, found.result_bytes)
    return found, Outputs(bytes(kept[0]), bytes(kept[1])), shown


async def results(control: Control, entry: VmEntry, execution_id: UUID, size: int) -> tuple[CellResult, ...]:
    """What a cell displayed; `size` is what its record says. Raises GuestError for what makes no sense."""
    if size == 0:
        return ()
    verb = ReadResults(entry.instance.id, execution_id)
    packed = bytearray()
    await guest_calls.kept(control, entry, verb, lambda piece: packed.extend(piece.data))
    return parse_results(bytes(packed))


async def follow(
    control: Control, row: ExecutionRow, entry: VmEntry, *, offset: int
) -> AsyncGenerator[tuple[int, int, bytes] | ExecutionState | None, None]:
    """(offset, channel, bytes) from an offset on, None while nothing comes, and at last the state at its end. Raises ExecutionNotFoundError."""
    verb = FollowOutput(entry.instance.id, row.id, offset)
    entry.open_streams += 1
    try:
        async with control.bus.open(guest_calls.host_of(entry), FollowOutput.verb, to_wire(verb)) as call:
            async with aclosing(with_silences(call.events())) as events:
                async for event in events:
                    if event is None:
                        yield None
                    elif isinstance(event, Message):
                        offset = int(event.body["offset"])
                    elif isinstance(event, Data):
                        yield offset, event.channel, event.data
                        offset += len(event.data)
            yield _state(row, entry, await call.result())
    finally:
        entry.open_streams -= 1
        control.live.touch(entry)


async def read_output(
    control: Control, principal: Principal, execution_id: UUID, *, offset: int, limit: int
) -> OutputPage:
    """A piece of the kept output, both channels as they came. Raises ExecutionNotFoundError."""
    _, entry = await find(control, principal, execution_id)
    return await executions.read_output(control, entry, execution_id, offset=offset, limit=limit)


async def files_changed(control: Control, principal: Principal, execution_id: UUID, *, cursor: int) -> FilesChangedPage:
    """A page of an execution's file changes. Raises ExecutionNotFoundError."""
    _, entry = await find(control, principal, execution_id)
    return await executions.files_changed(control, entry, execution_id, cursor=cursor)


async def send_signal(control: Control, principal: Principal, execution_id: UUID, number: int) -> None:
    """Signal a running execution's process group; an interrupted cell keeps its interpreter's state.

    Raises:
        ExecutionNotFoundError, InvalidRequestError.
        ConflictError: it has ended.

    """
    if not 1 <= number <= 64:
        raise InvalidRequestError("signal: must be between 1 and 64, or a name such as SIGTERM")
    _, entry = await find(control, principal, execution_id)
    verb = SignalExecution(entry.instance.id, execution_id, number)
    await control.bus.request(
        guest_calls.host_of(entry), verb.verb, to_wire(verb), timeout_seconds=guest_calls.HOST_SECONDS
    )


def _row(entry: VmEntry, kind: str, execution_id: UUID) -> ExecutionRow:
    return ExecutionRow(execution_id, entry.instance.organization_id, entry.instance.id, kind, clock.now())


@asynccontextmanager
async def _named_field(kind: str) -> AsyncIterator[None]:
    """Says of what the guest refuses which field it is about, and of a language that the image does not have its name."""
    try:
        yield
    except InvalidRequestError as error:
        said = error.message
        if kind in ("python", "node") and said.endswith("command not found"):
            raise InvalidRequestError(f"language: the VM's image has no {kind}") from None
        if kind != "exec" or _OURS.match(said):
            raise
        # As guest/account and guest/exec/spawn.go say it.
        about = {"there is no user ": "user", "the working directory ": "cwd"}
        field = next((field for begin, field in about.items() if said.startswith(begin)), "argv")
        raise InvalidRequestError(f"{field}: {said}") from None


def _state(row: ExecutionRow, entry: VmEntry, head: dict[str, Any]) -> ExecutionState:
    return ExecutionState(
        row=row,
        entry=entry,
        ended=bool(head["ended"]),
        exit_code=head["exit_code"],
        signal=head["signal"],
        timed_out=bool(head["timed_out"]),
        duration_ms=head["duration_ms"],
        cpu_ms=head["cpu_ms"],
        lost=head["lost"],
        started_at=head["started_at"],
        total_bytes=head["total_bytes"],
        stderr_bytes=head["stderr_bytes"],
        kernel=kernel_state(head["kernel"]),
        result_bytes=head["result_bytes"],
        results_truncated=bool(head["results_truncated"]),
    )


def moment(unix_seconds: float) -> datetime:
    """A host's time as a date."""
    return datetime.fromtimestamp(unix_seconds, UTC)
