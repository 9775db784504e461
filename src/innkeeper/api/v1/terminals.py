"""Terminals of an instance, whatever its handle is: the endpoints around them. The WebSocket is in `terminal_socket`."""

# Annotations are evaluated where they stand: the names of parameters differ by base.
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Path

from innkeeper.api.json_app import CurrentPrincipal
from innkeeper.api.v1.terminal_schemas import TerminalAnswer, TerminalCreate, TerminalSize
from innkeeper.api.v1.vms import session_id
from innkeeper.control import lifecycle, rooms, sessions, terminals, vms
from innkeeper.control.context import Control
from innkeeper.control.live_table import Entry
from innkeeper.control.terminals import TerminalRequest, TerminalView
from innkeeper.core.token import Principal
from innkeeper.errors import InvalidRequestError, TerminalNotFoundError
from innkeeper.ids import parse_uuid

FindReady = Callable[[Control, Principal, str], Awaitable[Entry]]
# None: the handle is there, and has no instance.
FindExisting = Callable[[Control, Principal, str], Awaitable[Entry | None]]


@dataclass(frozen=True)
class TerminalBase:
    """A handle that has terminals: the template of its path, and who finds the instance of its parameter, `ready` waking it."""

    path: str
    ready: FindReady
    existing: FindExisting

    @property
    def parameter(self) -> str:
        """The name of the path's one parameter."""
        return self.path.partition("{")[2].partition("}")[0]


async def existing_room(control: Control, principal: Principal, instance_id: str) -> Entry:
    """The room of an instance. Raises InvalidRequestError, InstanceNotFoundError."""
    value = parse_uuid(instance_id)
    if value is None:
        raise InvalidRequestError("instance_id: must be a UUID")
    return rooms.entry_of_instance(control, principal, value)


async def ready_room(control: Control, principal: Principal, instance_id: str) -> Entry:
    """The same, ready."""
    return await lifecycle.ready(control, principal, await existing_room(control, principal, instance_id))


async def existing_of_session(control: Control, principal: Principal, session: str) -> Entry | None:
    """The living VM of a session. Raises SessionNotFoundError."""
    return await sessions.existing_entry(control, principal, session_id(session))


async def ready_of_session(control: Control, principal: Principal, session: str) -> Entry:
    """The VM of a session, ready; made where it has none."""
    return await sessions.ready_entry(control, principal, session_id(session))


ROOM_BASES = (TerminalBase("/v1/rooms/{instance_id}", ready_room, existing_room),)
VM_BASES = (
    TerminalBase("/v1/vms/{vm_id}", vms.ready_entry, vms.existing_entry),
    TerminalBase("/v1/sessions/{session}", ready_of_session, existing_of_session),
)


def add_terminal_routes(router: APIRouter, control: Control, bases: Sequence[TerminalBase]) -> None:
    """Add the routes of these bases."""
    for base in bases:
        _add_routes(router, control, base)


def _add_routes(router: APIRouter, control: Control, base: TerminalBase) -> None:
    path = f"{base.path}/pty/sessions"

    async def existing(principal: Principal, handle: str) -> Entry:
        entry = await base.existing(control, principal, handle)
        if entry is None:
            raise TerminalNotFoundError
        return entry

    Handle = Annotated[str, Path(alias=base.parameter)]  # noqa: N806 - a type

    @router.post(path, status_code=201)
    async def create_terminal(principal: CurrentPrincipal, handle: Handle, body: TerminalCreate) -> TerminalAnswer:
        """Start a program on a terminal; it runs on whether anybody looks or not. 409 `conflict` for an id that is taken, 429 beyond the limit."""
        entry = await base.ready(control, principal, handle)
        request = TerminalRequest(body.cols, body.rows, body.shell, body.command, body.id)
        return _answer(await terminals.create(control, principal, entry, request))

    @router.get(path)
    async def list_terminals(principal: CurrentPrincipal, handle: Handle) -> list[TerminalAnswer]:
        """The terminals whose program runs, oldest first."""
        entry = await base.existing(control, principal, handle)
        found = [] if entry is None else await terminals.list_all(control, entry)
        return [_answer(view) for view in found if view.alive]

    @router.get(f"{path}/{{pid}}")
    async def get_terminal(principal: CurrentPrincipal, handle: Handle, pid: str) -> TerminalAnswer:
        """One terminal, also one of the last 32 that ended. 404 `terminal_not_found`."""
        return _answer(await terminals.find(control, await existing(principal, handle), pid))

    @router.post(f"{path}/{{pid}}/resize")
    async def resize_terminal(
        principal: CurrentPrincipal, handle: Handle, pid: str, body: TerminalSize
    ) -> TerminalAnswer:
        """Give a terminal another size. 409 `conflict` when its program has ended."""
        entry = await existing(principal, handle)
        return _answer(await terminals.resize(control, entry, pid, cols=body.cols, rows=body.rows))

    @router.delete(f"{path}/{{pid}}")
    async def delete_terminal(principal: CurrentPrincipal, handle: Handle, pid: str) -> TerminalAnswer:
        """Hang up on the terminal's programs, kill after a second what is left of them, and forget the terminal."""
        entry = await existing(principal, handle)
        return _answer(await terminals.end(control, principal, entry, pid))


def _answer(view: TerminalView) -> TerminalAnswer:
    return TerminalAnswer(
        session_id=view.id,
        id=view.id,
        alive=view.alive,
        exit_code=view.exit_code,
        cols=view.cols,
        rows=view.rows,
        command=view.label,
        created_at=view.started_at,
        viewers=view.viewers,
        offset=view.offset,
    )
