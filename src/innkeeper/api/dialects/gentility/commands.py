"""Running commands: one JSON answer, or the same as a stream of events; and reading back what was kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any, TypeVar
from uuid import UUID

import anyio
from starlette.responses import JSONResponse

from innkeeper.api import sse
from innkeeper.api.body import read_json_body
from innkeeper.api.dialects.gentility.file_changes import show_changes
from innkeeper.api.dialects.gentility.room_call import RoomCall
from innkeeper.api.dialects.gentility.schemas import CommandRequest, error_shape
from innkeeper.api.disconnect import cancelled_on_disconnect
from innkeeper.api.errors import describe, validate_json
from innkeeper.api.raw_path import decode_text
from innkeeper.api.utf8 import OUTPUT_MAX_BYTES, Utf8Pieces, output_text, whole_characters
from innkeeper.control import executions
from innkeeper.control.executions import Execution, ExecutionResult
from innkeeper.errors import ExecutionNotFoundError, InvalidRequestError
from innkeeper.ids import parse_uuid

# A command is a kernel argument (128 KiB at most); the rest of this is stdin.
COMMAND_BODY_MAX_BYTES = 4 << 20
FILES_CHANGED_PAGE = 1_000
CHUNKS_PER_TURN = 32
T = TypeVar("T")


async def run_command(call: RoomCall) -> None:
    """POST .../command."""
    body = await read_json_body(call.scope, call.receive, max_bytes=COMMAND_BODY_MAX_BYTES)
    if not body:
        raise InvalidRequestError("A JSON body is required.")
    request = validate_json(CommandRequest, body)
    streamed = sse.wants_events(call.scope["headers"])
    wanted = executions.ExecutionRequest(
        command=request.command,
        timeout_seconds=request.timeout,
        cwd=request.cwd,
        env=request.env or {},
        stdin=None if request.stdin is None else request.stdin.encode(),
        stream=streamed,
    )
    if streamed:
        async with cancelled_on_disconnect(call.receive, after_seconds=0):
            room = await call.ready()
            async with executions.start(call.control, call.principal, room, wanted) as execution:
                await _EventStream(call, execution, request.command).run()
        return
    async with (
        cancelled_on_disconnect(call.receive),
        executions.start(call.control, call.principal, await call.ready(), wanted) as execution,
    ):
        kept = bytearray()
        async for piece in _in_turns(execution.output):
            chunk = piece.data
            kept += chunk[: OUTPUT_MAX_BYTES - len(kept)] if len(kept) + len(chunk) > OUTPUT_MAX_BYTES else chunk
        result = await execution.result()
        answer = _answer(execution, request.command, bytes(kept), result)
    await JSONResponse(answer)(call.scope, call.receive, call.send)


async def _in_turns(chunks: AsyncIterator[T]) -> AsyncIterator[T]:
    """The chunks, giving way now and then: a guest that sends a megabyte in single bytes must not hold up every other request."""
    count = 0
    async for chunk in chunks:
        yield chunk
        count += 1
        if count % CHUNKS_PER_TURN == 0:
            await asyncio.sleep(0)


def _answer(execution: Execution, command: str, kept: bytes, result: ExecutionResult) -> dict[str, Any]:
    public_id = execution.instance.public_id
    truncated = result.output_truncated or result.output_bytes > len(kept)
    return {
        "instance_id": str(public_id),
        "command": command,
        "result": {
            "output": output_text(kept, truncated=truncated),
            "exit_code": result.exit_code,
            "files_changed": show_changes(public_id, result.files_changed),
            "execution_id": str(execution.execution_id),
            "output_truncated": truncated,
            "files_changed_total": result.files_changed_total,
            "files_changed_truncated": result.files_changed_truncated,
        },
        "status": "success" if result.exit_code == 0 else "error",
    }


class _EventStream:
    """The events of one command: started, output..., result or error; comments while it is silent."""

    def __init__(self, call: RoomCall, execution: Execution, command: str) -> None:
        self._call = call
        self._execution = execution
        self._command = command
        self._sent_at = monotonic()
        self._lock = asyncio.Lock()

    async def run(self) -> None:
        """Send the stream to its end. Leaving it early leaves the command running."""
        await self._call.send({"type": "http.response.start", "status": 200, "headers": list(sse.HEADERS)})
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._ping)
            try:
                await self._events()
            except Exception as error:
                # The status line is gone: the error travels as an event.
                _, code, message, _ = describe(error)
                await self._send(sse.frame("error", error_shape(code, message)))
            tasks.cancel_scope.cancel()
        await self._call.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> None:
        await self._send(sse.frame("started", {"execution_id": str(self._execution.execution_id)}))
        kept = bytearray()
        pieces = Utf8Pieces()
        async for chunk in _in_turns(self._execution.output):
            kept += chunk.data[: OUTPUT_MAX_BYTES - len(kept)]
            await self._output(pieces.feed(chunk.data))
        await self._output(pieces.end())
        result = await self._execution.result()
        await self._send(sse.frame("result", _answer(self._execution, self._command, bytes(kept), result)))

    async def _output(self, text: str) -> None:
        if text:
            await self._send(sse.frame("output", {"data": text}))

    async def _send(self, data: bytes) -> None:
        async with self._lock:
            self._sent_at = monotonic()
            await self._call.send({"type": "http.response.body", "body": data, "more_body": True})

    async def _ping(self) -> None:
        while True:
            quiet = monotonic() - self._sent_at
            if quiet >= sse.PING_SECONDS:
                await self._send(sse.PING)
                quiet = 0
            await asyncio.sleep(sse.PING_SECONDS - quiet)


def _execution_id(call: RoomCall) -> UUID:
    value = parse_uuid(decode_text(call.rest, "execution_id"))
    if value is None:
        raise ExecutionNotFoundError
    return value


async def read_output(call: RoomCall) -> None:
    """GET .../command/{execution_id}/output: a piece of the kept output, from a byte offset."""
    execution_id = _execution_id(call)
    offset = call.query.integer("offset", default=0)
    limit = call.query.integer("limit", default=OUTPUT_MAX_BYTES, minimum=4, maximum=OUTPUT_MAX_BYTES)
    async with cancelled_on_disconnect(call.receive):
        piece = await executions.read_output(
            call.control, await call.existing(), execution_id, offset=offset, limit=limit
        )
    at_end = piece.ended and piece.offset + len(piece.data) >= piece.total_bytes
    data = piece.data if at_end else whole_characters(piece.data)
    answer = {
        "execution_id": str(execution_id),
        "offset": piece.offset,
        "output": data.decode("utf-8", "replace"),
        "next_offset": piece.offset + len(data),
        "total_bytes": piece.total_bytes,
        "gap": None if piece.gap is None else {"from": piece.gap[0], "to": piece.gap[1]},
        "ended": piece.ended,
        "exit_code": piece.exit_code,
    }
    await JSONResponse(answer)(call.scope, call.receive, call.send)


async def read_files_changed(call: RoomCall) -> None:
    """GET .../command/{execution_id}/files_changed: a page of its changes."""
    execution_id = _execution_id(call)
    cursor = call.query.integer("cursor", default=0)
    page = await executions.files_changed(
        call.control,
        await call.existing(),
        execution_id,
        cursor=cursor,
        limit=FILES_CHANGED_PAGE,
    )
    answer = {
        "files_changed": show_changes(page.instance.public_id, page.files_changed),
        "files_changed_total": page.total,
        "next_cursor": None if page.next_cursor is None else str(page.next_cursor),
    }
    await JSONResponse(answer)(call.scope, call.receive, call.send)
