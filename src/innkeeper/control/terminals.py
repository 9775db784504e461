"""Terminals: programs on pseudo terminals of guests, which several may look at and which outlive all of them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from innkeeper.bus.contract import Call, Data, Message
from innkeeper.control import audit, lifecycle
from innkeeper.control.guest_calls import host_of
from innkeeper.control.live_table import Entry
from innkeeper.core.event import AuditEvent
from innkeeper.core.host_verbs import to_wire
from innkeeper.core.terminal_verbs import (
    COMMAND_BYTES_MAX,
    SIZE_RANGE,
    TERMINAL_NAME,
    AttachTerminal,
    EndTerminal,
    ListTerminals,
    ResizeTerminal,
    StartTerminal,
)
from innkeeper.core.token import Principal
from innkeeper.errors import (
    InstanceNotFoundError,
    InvalidRequestError,
    LinkLostError,
    TerminalNotFoundError,
)

if TYPE_CHECKING:
    from innkeeper.control.context import Control

# Thawing, and queueing for its turn to start.
START_SECONDS = 60.0
ASK_SECONDS = 30.0
# What is started as an interactive login shell; other programs get no arguments.
SHELL_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("sh", "bash", "zsh", "dash", "ash", "fish", "ksh"), ("-il",)),
    **dict.fromkeys(("csh", "tcsh"), ("-i",)),
}
DEFAULT_PROGRAMS = (("/bin/bash", "-il"), ("/bin/sh", "-il"))
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class TerminalRequest:
    """A terminal to start: a `shell` (a program, run interactively) or a `command` (a line for bash, or sh where there is none); a login shell by default."""

    cols: int = 80
    rows: int = 24
    shell: str | None = None
    command: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class TerminalView:
    """A terminal as a client sees it. `exit_code` is None while it runs, and for one that was lost with its machine; `offset` counts its output."""

    id: str
    alive: bool
    exit_code: int | None
    cols: int
    rows: int
    label: str
    started_at: datetime
    viewers: int
    offset: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """What follows begins at this offset of the output: said first, and wherever bytes were left out."""

    offset: int


class Attachment:
    """A look at a terminal."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.exit_code: int | None = None

    async def output(self) -> AsyncIterator[bytes | Skipped]:
        """The output until the program has ended; then `exit_code` is known. Raises the typed error when it is gone otherwise."""
        async for event in self._call.events():
            if isinstance(event, Data):
                yield event.data
            elif isinstance(event, Message) and "offset" in event.body:
                yield Skipped(event.body["offset"])
        self.exit_code = (await self._call.result())["exit_code"]

    async def type(self, data: bytes) -> None:
        """Type into it; waits while the program takes nothing. What comes after its end is dropped: `output` says how it ended."""
        with contextlib.suppress(LinkLostError):
            await self._call.send_data(data)

    async def resize(self, cols: int, rows: int) -> None:
        """Say how large the window is now. Raises InvalidRequestError."""
        check_size(cols, rows)
        with contextlib.suppress(LinkLostError):
            await self._call.send_message({"resize": {"cols": cols, "rows": rows}})


async def create(control: Control, principal: Principal, entry: Entry, request: TerminalRequest) -> TerminalView:
    """Start a program on a terminal of an instance that is ready.

    Raises:
        InvalidRequestError: a bad size, name or command, or no such program.
        ConflictError: the name is that of a terminal that runs.
        RateLimitedError: the instance has as many as it may have.

    """
    check_size(request.cols, request.rows)
    if request.name is not None:
        _check_name(request.name)
    programs, label = _programs(request)
    verb = StartTerminal(
        entry.instance.id, programs, label, request.cols, request.rows, request.name, entry.environment()
    )
    try:
        answer = await _ask(control, entry, verb, timeout_seconds=START_SECONDS)
    except InstanceNotFoundError:
        # The host has no such machine any more: it gets a new one on its disk.
        entry = await lifecycle.revive(control, principal, entry)
        answer = await _ask(control, entry, verb, timeout_seconds=START_SECONDS)
    except InvalidRequestError as error:
        # In the guest's words, which name no field.
        if request.shell is None or not error.message.startswith(f"{request.shell}: "):
            raise
        raise InvalidRequestError(f"shell: {error.message}") from None
    view = _view(answer["terminal"])
    control.metrics.terminals += 1
    control.live.touch(entry)
    # Its command may hold secrets, so the log says only that there is a terminal.
    control.later.audit(_event(principal, "terminal.create", entry, view.id))
    return view


async def list_all(control: Control, entry: Entry) -> list[TerminalView]:
    """The terminals of an instance, oldest first: those that run, then those that ended not long ago. None where no machine runs."""
    if not entry.ready:
        return []
    try:
        answer = await _ask(control, entry, ListTerminals(entry.instance.id))
    except InstanceNotFoundError:
        return []
    return [_view(row) for row in answer["terminals"]]


async def find(control: Control, entry: Entry, name: str) -> TerminalView:
    """One terminal. Raises TerminalNotFoundError."""
    for view in await list_all(control, entry):
        if view.id == name:
            return view
    raise TerminalNotFoundError


async def resize(control: Control, entry: Entry, name: str, *, cols: int, rows: int) -> TerminalView:
    """Give a terminal another size. Raises TerminalNotFoundError, InvalidRequestError, ConflictError (it has ended)."""
    check_size(cols, rows)
    return await _of_one(control, entry, ResizeTerminal(entry.instance.id, _known_name(name), cols, rows))


async def end(control: Control, principal: Principal, entry: Entry, name: str) -> TerminalView:
    """End a terminal's program and forget the terminal. Raises TerminalNotFoundError."""
    view = await _of_one(control, entry, EndTerminal(entry.instance.id, _known_name(name)))
    control.later.audit(_event(principal, "terminal.delete", entry, view.id))
    return view


@asynccontextmanager
async def attach(
    control: Control, principal: Principal, entry: Entry, name: str, *, offset: int = 0
) -> AsyncIterator[Attachment]:
    """Look at a terminal, from `offset` of its output on as far as it is kept. Leaving the context looks away, and changes nothing else.

    Raises:
        TerminalNotFoundError, RateLimitedError (too many look at it), InstanceFailedError: from `output`.

    """
    verb = AttachTerminal(entry.instance.id, _known_name(name), max(0, offset))
    entry.open_streams += 1
    control.metrics.terminal_attachments += 1
    control.live.touch(entry)
    control.later.audit(_event(principal, "terminal.attach", entry, name))
    try:
        async with control.bus.open(host_of(entry), verb.verb, to_wire(verb)) as call:
            yield Attachment(call)
    finally:
        entry.open_streams -= 1
        control.live.touch(entry)


def check_size(cols: int, rows: int) -> None:
    """Raise InvalidRequestError for a size that no window has."""
    low, high = SIZE_RANGE
    for field, value in (("cols", cols), ("rows", rows)):
        if not low <= value <= high:
            raise InvalidRequestError(f"{field}: must be between {low} and {high}")


def _programs(request: TerminalRequest) -> tuple[tuple[tuple[str, ...], ...], str]:
    """What is tried, one after the other, and what the terminal is called by."""
    if request.shell is not None and request.command is not None:
        raise InvalidRequestError("shell, command: give one of them")
    for field, text in (("shell", request.shell), ("command", request.command)):
        if text is None:
            continue
        if not text.strip() or "\0" in text or SURROGATE.search(text):
            raise InvalidRequestError(f"{field}: must be text, without NUL, and not empty")
        if len(text.encode()) > COMMAND_BYTES_MAX:
            raise InvalidRequestError(f"{field}: at most {COMMAND_BYTES_MAX} bytes")
    if request.command is not None:
        return tuple((shell, "-lc", request.command) for shell, _ in DEFAULT_PROGRAMS), request.command
    if request.shell is not None:
        shell = request.shell.strip()
        return ((shell, *SHELL_ARGUMENTS.get(PurePosixPath(shell).name, ())),), shell
    return DEFAULT_PROGRAMS, ""


def _check_name(name: str) -> None:
    if not TERMINAL_NAME.fullmatch(name):
        raise InvalidRequestError("id: 1 to 64 of A-Z, a-z, 0-9, dot, colon, dash and underscore")


def _known_name(name: str) -> str:
    if not TERMINAL_NAME.fullmatch(name):
        raise TerminalNotFoundError
    return name


async def _of_one(control: Control, entry: Entry, verb: ResizeTerminal | EndTerminal) -> TerminalView:
    if not entry.ready:
        raise TerminalNotFoundError
    try:
        return _view((await _ask(control, entry, verb))["terminal"])
    except InstanceNotFoundError:
        raise TerminalNotFoundError from None


async def _ask(control: Control, entry: Entry, verb: Any, *, timeout_seconds: float = ASK_SECONDS) -> dict[str, Any]:
    return await control.bus.request(host_of(entry), verb.verb, to_wire(verb), timeout_seconds=timeout_seconds)


def _event(principal: Principal, action: str, entry: Entry, name: str) -> AuditEvent:
    return audit.event(principal, action, "terminal", name, {"instance_id": str(entry.instance.id), **entry.marks})


def _view(row: Mapping[str, Any]) -> TerminalView:
    return TerminalView(**{**row, "started_at": datetime.fromtimestamp(row["started_at"], UTC)})
