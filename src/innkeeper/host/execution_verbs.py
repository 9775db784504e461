"""The daemon's handlers for executions: run, follow, read what was kept, signal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from innkeeper.bus.contract import Data, Handler, ServerCall
from innkeeper.core import host_verbs as verbs
from innkeeper.host import journal
from innkeeper.host.cells import kernel_of, read_results
from innkeeper.host.channels import STDERR, STDOUT, Channels
from innkeeper.host.execution import READ_STEP
from innkeeper.host.executions import Executions
from innkeeper.host.fleet import Fleet
from innkeeper.host.journal import ExecutionRecord, OutputSlice
from innkeeper.host.verbs import bind_handler

MAX_SLICE = 16 * 1_048_576


class ExecutionVerbs:
    """Translates calls to the executions and their journals."""

    def __init__(self, fleet: Fleet, executions: Executions) -> None:
        self._fleet = fleet
        self._executions = executions

    def handlers(self) -> Mapping[str, Handler]:
        """Handlers by verb."""
        return {
            verbs.Execute.verb: bind_handler(verbs.Execute, self._execute),
            verbs.ReadOutput.verb: bind_handler(verbs.ReadOutput, self._read_output),
            verbs.FollowOutput.verb: bind_handler(verbs.FollowOutput, self._follow),
            verbs.ReadResults.verb: bind_handler(verbs.ReadResults, self._results),
            verbs.SignalExecution.verb: bind_handler(verbs.SignalExecution, self._signal),
        }

    async def _execute(self, request: verbs.Execute, call: ServerCall) -> dict[str, Any]:
        machine = self._fleet.machine(request.instance_id)
        execution = await self._executions.start(machine, request, self._fleet.journals(request.instance_id))
        feeding = machine.start_task(_feed(execution.program.write, call)) if request.stdin else None
        try:
            if request.detach:
                if feeding is not None:
                    # Waits for no program: what the API takes fits into the credit that a guest's agent gives, and lies there until it is read.
                    await asyncio.wait([feeding])
                await execution.beginning()
                return {}
            if request.stream:
                async for _, channel, piece in execution.output():
                    await call.send_data(piece, channel=channel)
                return await execution.result()
            answer = await execution.result()
            stderr = execution.journal.record.stderr_bytes
            left = {STDOUT: execution.answer_bytes - stderr, STDERR: stderr}
            limited = {channel: min(request.answer_bytes, size) for channel, size in left.items()}
            await _send_beginnings(execution.output(), limited, call)
            return answer
        finally:
            if feeding is not None:
                feeding.cancel()

    async def _read_output(self, request: verbs.ReadOutput, call: ServerCall) -> dict[str, Any]:
        directory, record = self._kept(request.instance_id, request.execution_id)
        piece = journal.read_output(directory, record, max(0, request.offset), max(0, min(request.limit, MAX_SLICE)))
        await call.send_message({"offset": piece.offset, **_described(record, piece)})
        if request.each:
            limit, stderr = max(0, min(request.limit, MAX_SLICE)), record.stderr_bytes
            left = {STDOUT: min(limit, piece.total_bytes - stderr), STDERR: min(limit, stderr)}
            await _send_beginnings(_kept_output(directory, record, 0), left, call)
            return {"next_offset": piece.total_bytes}
        for channel, data in _channels(directory, record).split(piece.offset, piece.data):
            await call.send_data(data, channel=channel)
        return {"next_offset": piece.offset + len(piece.data)}

    async def _follow(self, request: verbs.FollowOutput, call: ServerCall) -> dict[str, Any]:
        expected = max(0, request.offset)
        live = self._executions.live(request.instance_id, request.execution_id)
        kept = self._kept(request.instance_id, request.execution_id)
        pieces = _kept_output(*kept, expected) if live is None or live.over else live.output(expected)
        async for offset, channel, piece in pieces:
            if offset != expected:
                await call.send_message({"offset": offset})
            await call.send_data(piece, channel=channel)
            expected = offset + len(piece)
        if live is not None:
            # An execution that was lost has a record, which says so; its follower is told that, and no error.
            while not live.over:
                live.changed.clear()
                await live.changed.wait()
        directory, record = self._kept(request.instance_id, request.execution_id)
        return _described(record, journal.read_output(directory, record, 0, 0))

    async def _results(self, request: verbs.ReadResults, call: ServerCall) -> dict[str, Any]:
        directory, record = self._kept(request.instance_id, request.execution_id)
        await call.send_data(read_results(directory, record.execution_id))
        return {}

    async def _signal(self, request: verbs.SignalExecution, call: ServerCall) -> dict[str, Any]:
        self._kept(request.instance_id, request.execution_id)
        await self._executions.signal(request.instance_id, request.execution_id, request.signal)
        return {}

    def _kept(self, instance_id: UUID, execution_id: UUID) -> tuple[Path, ExecutionRecord]:
        """Where an execution's journal is, and its record as far as it has come. Raises ExecutionNotFoundError."""
        directory = self._fleet.journals(instance_id)
        live = self._executions.live(instance_id, execution_id)
        return directory, journal.read_record(directory, execution_id) if live is None else live.journal.record


def _channels(directory: Path, record: ExecutionRecord) -> Channels:
    channels = Channels(f"{directory}/{record.execution_id}.channels")
    channels.refresh()
    return channels


def _described(record: ExecutionRecord, piece: OutputSlice) -> dict[str, Any]:
    return {
        "started_at": record.started_at,
        "total_bytes": piece.total_bytes,
        "stderr_bytes": record.stderr_bytes,
        "gap": None if piece.gap is None else {"from": piece.gap[0], "to": piece.gap[1]},
        "ended": record.ended,
        "exit_code": record.exit_code,
        "signal": record.signal,
        "timed_out": record.timed_out,
        "duration_ms": record.duration_ms,
        "cpu_ms": record.cpu_ms,
        "lost": record.lost,
        "kernel": kernel_of(record),
        "result_bytes": record.result_bytes,
        "results_truncated": record.results_truncated,
    }


async def _kept_output(directory: Path, record: ExecutionRecord, offset: int) -> AsyncIterator[tuple[int, int, bytes]]:
    channels = _channels(directory, record)
    while (piece := journal.read_output(directory, record, offset, READ_STEP)).data:
        at = piece.offset
        for channel, data in channels.split(piece.offset, piece.data):
            yield at, channel, data
            at += len(data)
        offset = at


async def _send_beginnings(
    pieces: AsyncIterator[tuple[int, int, bytes]], left: dict[int, int], call: ServerCall
) -> None:
    """The first bytes of each channel, as many as `left` says."""
    passed_over = 0
    async for _, channel, piece in pieces:
        if left[channel] > 0:
            await call.send_data(piece[: left[channel]], channel=channel)
            left[channel] -= len(piece)
        else:
            passed_over += len(piece)
            if passed_over >= READ_STEP:
                # Nothing else gives way here while megabytes of one output lie before the first byte of the other.
                passed_over = 0
                await asyncio.sleep(0)
        if all(rest <= 0 for rest in left.values()):
            return


async def _feed(stdin: Callable[[bytes | None], Awaitable[None]], call: ServerCall) -> None:
    try:
        async for event in call.events():
            if isinstance(event, Data):
                await stdin(event.data)
    finally:
        # Also when the client went away in the middle of its input: the command gets the end of it, not an eternal wait.
        await stdin(None)
