"""Running code and programs in VMs and sessions, and reading it again: `/execute`, `/v1/vms/{vm_id}/exec`, `/v1/executions`."""

from __future__ import annotations

import signal as signals
from collections.abc import AsyncGenerator
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from innkeeper.api import sse
from innkeeper.api.disconnect import cancelled_on_disconnect
from innkeeper.api.errors import describe
from innkeeper.api.json_app import CurrentPrincipal
from innkeeper.api.raw_path import show_path
from innkeeper.api.utf8 import Utf8Pieces, whole_characters
from innkeeper.api.v1.execution_schemas import (
    ChangedFile,
    DisplayedAnswer,
    ExecRequest,
    Executed,
    ExecuteRequest,
    ExecutionRowAnswer,
    FilesChangedAnswer,
    KernelAnswer,
    OutputAnswer,
    Signalled,
    SignalRequest,
    TaskAnswer,
    TaskStarted,
)
from innkeeper.api.v1.schemas import error_shape
from innkeeper.api.v1.vms import session_id
from innkeeper.control import sessions, vm_executions, vms
from innkeeper.control.context import Control
from innkeeper.control.executions import OUTPUT_LIMIT_MAX, ExecutionRequest, ExecutionResult, FileChange, KernelState
from innkeeper.control.vm_entry import VmEntry
from innkeeper.control.vm_executions import ExecutionState, Outputs
from innkeeper.core.cell_results import CellResult
from innkeeper.core.execution import ExecutionRow
from innkeeper.core.host_verbs import path_from_wire
from innkeeper.core.token import Principal
from innkeeper.core.vm import VmRequest
from innkeeper.errors import ExecutionNotFoundError, InvalidRequestError
from innkeeper.ids import parse_uuid

# The clients give up when `timeout` is over, so the answer has to be with them by then.
ANSWER_SECONDS = 1.0


def add_execution_routes(router: APIRouter, control: Control) -> None:
    """Add the routes; each is one use case."""
    _add_running(router, control)
    _add_reading(router, control)


def _add_running(router: APIRouter, control: Control) -> None:
    @router.post("/execute")
    async def execute(request: Request, principal: CurrentPrincipal, body: ExecuteRequest) -> Executed:
        """Run code in a session, whose VM is made on first use. Python keeps its state. A failing command is a 200 with its exit code."""
        wanted = _code(body, margin=min(ANSWER_SECONDS, body.timeout / 10))
        async with cancelled_on_disconnect(request.receive):
            entry = await _entry(control, principal, body)
            return await _run(control, principal, entry, body.language, wanted)

    @router.post("/execute_async")
    async def execute_async(principal: CurrentPrincipal, body: ExecuteRequest) -> TaskStarted:
        """The same without waiting for its end: GET /v1/executions/{task_id} tells of it, also after the client or the server was away."""
        wanted = _code(body, margin=0)
        entry = await _entry(control, principal, body)
        return _started(await vm_executions.begin(control, principal, entry, body.language, wanted), entry)

    @router.post("/v1/vms/{vm_id}/exec", response_model=Executed, responses={202: {"model": TaskStarted}})
    async def exec_in_vm(request: Request, principal: CurrentPrincipal, vm_id: str, body: ExecRequest) -> Any:
        """Run a program or a shell line in a VM. With `background` 202 as soon as it has begun."""
        wanted = ExecutionRequest(
            body.command or "",
            body.timeout,
            cwd=body.cwd,
            env=body.env or {},
            stdin=None if body.stdin is None else body.stdin.encode("utf-8", "surrogatepass"),
            argv=tuple(body.argv or ()),
            user=body.user,
            merge=body.merge,
        )
        async with cancelled_on_disconnect(request.receive):
            entry = await vms.ready_entry(control, principal, vm_id)
            if not body.background:
                return await _run(control, principal, entry, "exec", wanted)
            row = await vm_executions.begin(control, principal, entry, "exec", wanted)
        return JSONResponse(_started(row, entry).model_dump(mode="json"), 202)

    @router.post("/v1/executions/{task_id}/signal")
    async def signal_execution(principal: CurrentPrincipal, task_id: str, body: SignalRequest) -> Signalled:
        """Send a signal to its process group; SIGINT interrupts a cell, SIGKILL ends its interpreter. 409 `conflict` when it has ended."""
        await vm_executions.send_signal(control, principal, _id(task_id), _number(body.signal))
        return Signalled(status="ok")


def _add_reading(router: APIRouter, control: Control) -> None:
    @router.get("/v1/executions/{task_id}")
    async def get_execution(principal: CurrentPrincipal, task_id: str) -> TaskAnswer:
        """An execution as far as it has come."""
        return _task(*await vm_executions.state(control, principal, _id(task_id)))

    @router.get(
        "/v1/executions/{task_id}/stream",
        response_class=StreamingResponse,
        responses={200: {"content": sse.CONTENT}},
    )
    async def stream_execution(
        principal: CurrentPrincipal,
        task_id: str,
        offset: Annotated[int, Query(ge=0, le=2**62)] = 0,
        last_event_id: Annotated[str | None, Header(max_length=20)] = None,
    ) -> Response:
        """Its output as server-sent events `output` (`stream`, `data`), `gap` (`from`, `to`), and at last `result` or `error`.

        It begins at the output's beginning, at an offset, or after the event that a client saw last.
        """
        if last_event_id is not None:
            if not last_event_id.isdecimal():
                raise InvalidRequestError("Last-Event-ID: not one that this stream gave")
            offset = int(last_event_id)
        row, entry = await vm_executions.find(control, principal, _id(task_id))
        return sse.EventStream(_frames(control, row, entry, offset))

    @router.get("/v1/executions/{task_id}/output")
    async def read_output(
        principal: CurrentPrincipal,
        task_id: str,
        offset: Annotated[int, Query(ge=0, le=2**62)] = 0,
        limit: Annotated[int, Query(ge=4, le=OUTPUT_LIMIT_MAX)] = 1_048_576,
    ) -> OutputAnswer:
        """A piece of the kept output from a byte offset on, both outputs as they came."""
        piece = await vm_executions.read_output(control, principal, _id(task_id), offset=offset, limit=limit)
        at_end = piece.ended and piece.offset + len(piece.data) >= piece.total_bytes
        data = piece.data if at_end else whole_characters(piece.data)
        return OutputAnswer(
            execution_id=task_id,
            offset=piece.offset,
            output=data.decode("utf-8", "replace"),
            next_offset=piece.offset + len(data),
            total_bytes=piece.total_bytes,
            gap=None if piece.gap is None else {"from": piece.gap[0], "to": piece.gap[1]},
            ended=piece.ended,
            exit_code=piece.exit_code,
        )

    @router.get("/v1/executions/{task_id}/files_changed")
    async def read_files_changed(
        principal: CurrentPrincipal, task_id: str, cursor: Annotated[int, Query(ge=0, le=2**31)] = 0
    ) -> FilesChangedAnswer:
        """A page of its file changes."""
        page = await vm_executions.files_changed(control, principal, _id(task_id), cursor=cursor)
        return FilesChangedAnswer(
            files_changed=_changed(page.files_changed),
            files_changed_total=page.total,
            next_cursor=None if page.next_cursor is None else str(page.next_cursor),
        )

    @router.get("/v1/vms/{vm_id}/executions")
    async def list_executions(
        principal: CurrentPrincipal,
        vm_id: str,
        before: str | None = None,
        limit: Annotated[int, Query(ge=1, le=vm_executions.PAGE_MAX)] = 100,
    ) -> list[ExecutionRowAnswer]:
        """A VM's executions, newest first; `before` is the id of the last one of the page before."""
        entry = await vms.existing_entry(control, principal, vm_id)
        known = None if before is None else _id(before)
        rows = await vm_executions.list_of_vm(control, entry, before=known, limit=limit)
        return [
            ExecutionRowAnswer(
                execution_id=str(row.id), vm_id=entry.vm.vm_id, language=row.kind, created_at=row.created_at
            )
            for row in rows
        ]


def _code(body: ExecuteRequest, *, margin: float) -> ExecutionRequest:
    """The request of a body, checked before anything is made for it. Raises InvalidRequestError."""
    code = body.command if body.command is not None else body.code or ""
    try:
        return vm_executions.request_for(body.language, code, timeout_seconds=body.timeout - margin)
    except InvalidRequestError as error:
        field, _, said = error.message.partition(": ")
        if field not in ("argv", "command"):
            raise
        # Whatever it becomes, the client knows it by the name that it gave it.
        raise InvalidRequestError(f"{'code' if body.command is None else 'command'}: {said}") from None


async def _entry(control: Control, principal: Principal, body: ExecuteRequest) -> VmEntry:
    if body.vm_id is not None:
        return await vms.ready_entry(control, principal, body.vm_id)
    if body.session_id is not None:
        return await sessions.ready_entry(control, principal, session_id(body.session_id))
    view = await sessions.create(control, principal, VmRequest())
    return await sessions.ready_entry(control, principal, view.session.id)


async def _run(control: Control, principal: Principal, entry: VmEntry, kind: str, wanted: ExecutionRequest) -> Executed:
    execution_id, outputs, result = await vm_executions.run(control, principal, entry, kind, wanted)
    shown = await vm_executions.results(control, entry, execution_id, result.result_bytes)
    return _executed(entry, execution_id, outputs, result, shown)


def _executed(
    entry: VmEntry, execution_id: UUID, outputs: Outputs, result: ExecutionResult, shown: tuple[CellResult, ...]
) -> Executed:
    stdout_cut = result.output_bytes - result.stderr_bytes > len(outputs.stdout)
    stderr_cut = result.stderr_bytes > len(outputs.stderr)
    stdout = _text(outputs.stdout, cut=stdout_cut)
    return Executed(
        execution_id=str(execution_id),
        vm_id=entry.vm.vm_id,
        session_id=str(entry.vm.session_id),
        created_at=vm_executions.moment(result.started_at),
        exit_code=result.exit_code,
        signal=result.signal,
        timed_out=result.timed_out,
        execution_time=result.duration_ms / 1000,
        cpu_time=None if result.cpu_ms is None else result.cpu_ms / 1000,
        stdout=stdout,
        stderr=_text(outputs.stderr, cut=stderr_cut),
        output=stdout,
        stdout_truncated=stdout_cut,
        stderr_truncated=stderr_cut,
        results=_shown(shown),
        results_truncated=result.results_truncated,
        kernel=_kernel(result.kernel),
        files_changed=_changed(result.files_changed),
        files_changed_total=result.files_changed_total,
        files_changed_truncated=result.files_changed_truncated,
    )


def _task(state: ExecutionState, outputs: Outputs, shown: tuple[CellResult, ...]) -> TaskAnswer:
    status = "running" if not state.ended else "completed" if state.lost is None else "lost"
    stdout_cut = state.total_bytes - state.stderr_bytes > len(outputs.stdout)
    stderr_cut = state.stderr_bytes > len(outputs.stderr)
    return TaskAnswer(
        task_id=str(state.row.id),
        execution_id=str(state.row.id),
        vm_id=state.entry.vm.vm_id,
        session_id=str(state.entry.vm.session_id),
        language=state.row.kind,
        created_at=vm_executions.moment(state.started_at),
        is_complete=state.ended,
        status=status,
        error=state.lost,
        exit_code=state.exit_code,
        signal=state.signal,
        timed_out=state.timed_out,
        execution_time=None if state.duration_ms is None else state.duration_ms / 1000,
        cpu_time=None if state.cpu_ms is None else state.cpu_ms / 1000,
        serialized_stdout=_text(outputs.stdout, cut=stdout_cut or not state.ended),
        serialized_stderr=_text(outputs.stderr, cut=stderr_cut or not state.ended),
        stdout_truncated=stdout_cut,
        stderr_truncated=stderr_cut,
        results=_shown(shown),
        results_truncated=state.results_truncated,
        kernel=_kernel(state.kernel),
    )


def _started(row: ExecutionRow, entry: VmEntry) -> TaskStarted:
    return TaskStarted(
        task_id=str(row.id),
        execution_id=str(row.id),
        vm_id=entry.vm.vm_id,
        session_id=str(entry.vm.session_id),
        status="running",
        created_at=row.created_at,
    )


async def _frames(control: Control, row: ExecutionRow, entry: VmEntry, offset: int) -> AsyncGenerator[bytes, None]:
    """The events of one execution. An event's id is the offset after its last character, as long as none of the other channel is cut in two before."""
    pieces = (Utf8Pieces(), Utf8Pieces())
    expected = offset
    told = vm_executions.follow(control, row, entry, offset=offset)
    try:
        async for item in told:
            if item is None:
                yield sse.PING
            elif isinstance(item, ExecutionState):
                for stream, rest in zip(("stdout", "stderr"), pieces, strict=True):
                    if text := rest.end():
                        yield sse.frame("output", {"stream": stream, "data": text}, event_id=expected)
                shown = await vm_executions.results(control, entry, row.id, item.result_bytes)
                answer = _task(item, Outputs(b"", b""), shown).model_dump(
                    mode="json",
                    exclude={"serialized_stdout", "serialized_stderr", "stdout_truncated", "stderr_truncated"},
                )
                yield sse.frame("result", answer, event_id=expected)
            else:
                at, channel, data = item
                if at != expected:
                    yield sse.frame("gap", {"from": expected, "to": at}, event_id=at)
                expected = at + len(data)
                stderr = channel == vm_executions.STDERR
                this, other = pieces[stderr], pieces[not stderr]
                if text := this.feed(data):
                    yield sse.frame(
                        "output",
                        {"stream": "stderr" if stderr else "stdout", "data": text},
                        event_id=None if other.unfinished else expected - this.unfinished,
                    )
    except Exception as error:
        # The status line is gone: the error travels as an event.
        _, code, message, _ = describe(error)
        yield sse.frame("error", error_shape(code, message))
    finally:
        await told.aclose()


def _id(text: str) -> UUID:
    value = parse_uuid(text)
    if value is None:
        raise ExecutionNotFoundError
    return value


def _number(signal: int | str) -> int:
    if isinstance(signal, int):
        return signal
    name = signal.upper()
    try:
        return int(signals.Signals[name if name.startswith("SIG") else f"SIG{name}"])
    except KeyError:
        raise InvalidRequestError("signal: must be between 1 and 64, or a name such as SIGTERM") from None


def _text(data: bytes, *, cut: bool) -> str:
    return (whole_characters(data) if cut else data).decode("utf-8", "replace")


def _shown(shown: tuple[CellResult, ...]) -> list[DisplayedAnswer]:
    return [
        DisplayedAnswer(kind="result" if one.kind == "result" else "display", data=one.data, omitted=one.omitted)
        for one in shown
    ]


def _kernel(state: KernelState | None) -> KernelAnswer | None:
    return None if state is None else KernelAnswer(fresh=state.fresh, lost=state.lost)


def _changed(rows: tuple[FileChange, ...]) -> list[ChangedFile]:
    return [
        ChangedFile.model_validate(
            {
                "path": show_path(path_from_wire(row.path)),
                "status": row.status,
                "size": row.size,
                "mime_type": row.mime_type,
            }
        )
        for row in rows
    ]
