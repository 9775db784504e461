"""Logs of instances, whatever their handle is: read by pages, and followed."""

# Annotations are evaluated where they stand: the names of parameters differ by base.
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Response
from fastapi.responses import StreamingResponse

from innkeeper.api import sse
from innkeeper.api.errors import describe
from innkeeper.api.json_app import CurrentPrincipal
from innkeeper.api.v1.log_schemas import LogAnswer, LogLineAnswer
from innkeeper.api.v1.schemas import error_shape
from innkeeper.api.v1.terminals import existing_room
from innkeeper.control import logs, vms
from innkeeper.control.context import Control
from innkeeper.control.live_table import Entry
from innkeeper.control.logs import LogGap
from innkeeper.control.silences import with_silences
from innkeeper.core.log_line import LogLine
from innkeeper.core.log_verbs import LINES_MAX
from innkeeper.core.token import Principal
from innkeeper.errors import InvalidRequestError

DEFAULT_LINES = 200
SEQUENCE_MAX = 2**53

Find = Callable[[Control, Principal, str], Awaitable[Entry]]
Lines = Annotated[int, Query(ge=0, le=LINES_MAX, description="How many of the newest, or after `after` at most.")]
After = Annotated[int | None, Query(ge=0, le=SEQUENCE_MAX, description="The sequence of the last known line.")]


@dataclass(frozen=True)
class LogBase:
    """A handle that has a log: its path, the name of the path's parameter, and who finds the instance."""

    path: str
    parameter: str
    find: Find


VM_LOGS = LogBase("/v1/vms/{vm_id}/logs", "vm_id", vms.existing_entry)
ROOM_LOGS = LogBase("/v1/rooms/{instance_id}/logs", "instance_id", existing_room)


def add_log_routes(router: APIRouter, control: Control, base: LogBase) -> None:
    """Add the two routes of a kind of handle."""
    Handle = Annotated[str, Path(alias=base.parameter)]  # noqa: N806 - a type

    @router.get(base.path)
    async def read_log(
        principal: CurrentPrincipal, handle: Handle, lines: Lines = DEFAULT_LINES, after: After = None
    ) -> LogAnswer:
        """The newest lines of the instance's log, or those after `after`, oldest first. The instance may run or not."""
        entry = await base.find(control, principal, handle)
        if after is None:
            page = await logs.newest(control, entry, lines)
        else:
            page = await logs.after(control, entry, after, limit=max(1, lines))
        return LogAnswer(lines=[show_line(line) for line in page.lines], first=page.first, last=page.last)

    @router.get(f"{base.path}/stream", response_class=StreamingResponse, responses={200: {"content": sse.CONTENT}})
    async def follow_log(
        principal: CurrentPrincipal,
        handle: Handle,
        lines: Lines = DEFAULT_LINES,
        after: After = None,
        last_event_id: Annotated[str | None, Header(max_length=20)] = None,
    ) -> Response:
        """The same as server-sent events as lines come: `log` with a line, `gap` where some are not kept any more, and at last `end` with the instance's.

        It begins with the newest `lines`, or after the line that a client saw last.
        """
        entry = await base.find(control, principal, handle)
        found = await logs.follow(control, entry, sequence=_sequence(last_event_id, after), lines=lines)
        return sse.EventStream(_frames(found))


def show_line(line: LogLine) -> LogLineAnswer:
    """The wire form of a line."""
    return LogLineAnswer(
        sequence=line.sequence,
        at=datetime.fromtimestamp(line.at, UTC),
        source=line.source.value,
        level=line.level.value,
        message=line.message,
    )


def _sequence(last_event_id: str | None, after: int | None) -> int | None:
    if last_event_id is None:
        return after
    if not (last_event_id.isascii() and last_event_id.isdecimal()) or int(last_event_id) > SEQUENCE_MAX:
        raise InvalidRequestError("Last-Event-ID: not the id of a line")
    return int(last_event_id)


async def _frames(found: AsyncGenerator[list[LogLine] | LogGap, None]) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(with_silences(found)) as told:
            async for one in told:
                if one is None:
                    yield sse.PING
                elif isinstance(one, LogGap):
                    yield sse.frame("gap", {"first": one.first, "last": one.last}, event_id=one.last)
                else:
                    yield b"".join(_frame(line) for line in one)
        yield sse.frame("end", {})
    except Exception as error:
        # The status line is gone: the error travels as an event.
        _, code, message, _ = describe(error)
        yield sse.frame("error", error_shape(code, message))


def _frame(line: LogLine) -> bytes:
    body: dict[str, Any] = show_line(line).model_dump(mode="json")
    return sse.frame("log", body, event_id=line.sequence)
