"""Executions: run a command in an instance, and read again what it said and changed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

from innkeeper.bus.contract import Call, Data
from innkeeper.control import audit, guest_calls, lifecycle
from innkeeper.control.live_table import Entry
from innkeeper.core.host_verbs import Execute, ReadFilesChanged, ReadOutput, to_wire
from innkeeper.core.instance import Instance
from innkeeper.core.profile import COMMAND_TIMEOUT_RANGE, validate_env
from innkeeper.core.token import Principal
from innkeeper.errors import (
    InnkeeperError,
    InstanceNotFoundError,
    InvalidRequestError,
    LinkLostError,
    UnavailableError,
)
from innkeeper.ids import uuid7

if TYPE_CHECKING:
    from innkeeper.control.context import Control

# Linux takes no argument of more than 128 KiB; some of it is left for what the guest puts around a command.
COMMAND_BYTES_MAX = 122_880
# What the host may take beyond the command's own time: thawing, queueing for its turn, the scan for changes.
GRACE_SECONDS = 60.0
USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,31})?")
OUTPUT_LIMIT_MAX = 8_388_608
PAGE_MAX = 1_000


@dataclass(frozen=True, slots=True)
class ExecutionRequest:
    """A shell line to run, or with `argv` a program without a shell, or with `kernel` a cell of Python in the interpreter of that name.

    `timeout_seconds` None: the spec's; `stream`: no limit on the output that is sent; `merge`: one output; `user` None: the spec's.

    Raises:
        InvalidRequestError: a bad command, time limit, directory or variable.

    """

    command: str
    timeout_seconds: float | None = None
    cwd: str | None = None
    env: dict[str, str] = field(default_factory=dict, repr=False)
    stdin: bytes | None = field(default=None, repr=False)
    stream: bool = False
    argv: tuple[str, ...] = ()
    user: str | None = None
    merge: bool = True
    kernel: str | None = None

    def __post_init__(self) -> None:
        # Here, so that a bad request is refused before anything is made or woken for it.
        _validate(self)


@dataclass(frozen=True, slots=True)
class FileChange:
    """One changed file. `path` as `host_verbs.path_to_wire` spells it; status `created`, `modified` or `deleted` (size 0)."""

    path: str
    status: str
    size: int
    mime_type: str | None


@dataclass(frozen=True, slots=True)
class KernelState:
    """What became of a cell's interpreter: it began with the cell (`fresh`), it ended with it (`lost`)."""

    fresh: bool
    lost: bool


@dataclass(frozen=True, slots=True)
class ExecutionResult:
    """How a command ended. `exit_code` is 128+n after signal n, 124 after a timeout."""

    exit_code: int
    signal: int | None
    timed_out: bool
    duration_ms: float
    output_bytes: int
    output_truncated: bool
    files_changed: tuple[FileChange, ...]
    files_changed_total: int
    files_changed_truncated: bool
    started_at: float = 0.0
    cpu_ms: float | None = None
    stderr_bytes: int = 0
    kernel: KernelState | None = None
    result_bytes: int = 0
    results_truncated: bool = False


@dataclass(frozen=True, slots=True)
class OutputPage:
    """A piece of the kept output. `gap` is the dropped middle as (from, to); `next_offset` continues."""

    instance: Instance
    offset: int
    data: bytes
    next_offset: int
    total_bytes: int
    gap: tuple[int, int] | None
    ended: bool
    exit_code: int | None


@dataclass(frozen=True, slots=True)
class FilesChangedPage:
    """A piece of the changes; `next_cursor` continues and is None at the end."""

    instance: Instance
    files_changed: tuple[FileChange, ...]
    total: int
    next_cursor: int | None


class Execution:
    """A command that is being run. Read `output` to its end, then ask for the `result`; or the result alone, and the output is dropped."""

    def __init__(
        self, control: Control, principal: Principal, entry: Entry, request: Execute, stdin: bytes | None
    ) -> None:
        self.execution_id = request.execution_id
        self._control = control
        self._principal = principal
        self._entry = entry
        self._request = request
        self._stdin = stdin
        self._stack = AsyncExitStack()
        self._call: Call | None = None
        self._started = False
        self._retried = False

    @property
    def instance(self) -> Instance:
        """The instance that it runs in."""
        return self._entry.instance

    @property
    def output(self) -> AsyncIterator[Data]:
        """The output as it comes; stderr is channel 2 unless they are merged. Raises the typed error when the command could not be run."""
        return self._output()

    async def result(self) -> ExecutionResult:
        """The end of it. Raises the typed error when the command could not be run."""
        return _result(await self.answer())

    async def answer(self) -> dict[str, Any]:
        """The host's answer as it is. Raises the typed error when the command could not be run."""
        while True:
            try:
                async with asyncio.timeout(self._patience_seconds):
                    return await self._opened().result()
            except InstanceNotFoundError:
                await self._again()
            except TimeoutError:
                raise UnavailableError("The host did not answer in time") from None

    async def open(self) -> None:
        """Send the command to the host."""
        host_id = guest_calls.host_of(self._entry)
        self._call = await self._stack.enter_async_context(
            self._control.bus.open(host_id, Execute.verb, to_wire(self._request))
        )
        if self._stdin is not None:
            # Beside, because a command that does not read its input must not keep us from reading its output.
            feeder = asyncio.create_task(_feed(self._call, self._stdin))
            self._stack.push_async_callback(_stop, feeder)

    async def close(self) -> None:
        """Let go of the call. A command that still runs goes on; its output is kept."""
        await self._stack.aclose()

    async def _output(self) -> AsyncIterator[Data]:
        while True:
            try:
                events = aiter(self._opened().events())
                while True:
                    async with asyncio.timeout(self._patience_seconds):
                        event = await anext(events, None)
                    if event is None:
                        return
                    self._started = True
                    if isinstance(event, Data):
                        yield event
            except InstanceNotFoundError:
                await self._again()
            except TimeoutError:
                raise UnavailableError("The host did not answer in time") from None

    async def _again(self) -> None:
        """The host had no such machine: bring it up and send the command anew, once, and only if nothing had begun."""
        if self._started or self._retried:
            raise UnavailableError("The guest is gone; its next use starts it again on its disk")
        self._retried = True
        self._control.metrics.execution_retries += 1
        await self._stack.aclose()
        try:
            await lifecycle.revive(self._control, self._principal, self._entry)
        except InstanceNotFoundError:
            raise UnavailableError(f"The {self._entry.kind} was removed meanwhile") from None
        await self.open()

    @property
    def _patience_seconds(self) -> float:
        return self._request.timeout_seconds + GRACE_SECONDS

    def _opened(self) -> Call:
        if self._call is None:
            raise RuntimeError("the execution is not open")
        return self._call


@asynccontextmanager
async def start(
    control: Control, principal: Principal, entry: Entry, request: ExecutionRequest, *, detach: bool = False
) -> AsyncIterator[Execution]:
    """Run a command in an instance that is ready. Leaving the context early leaves the command running.

    With `detach` nothing of it is sent, and `answer` comes as soon as the guest has begun it.

    Raises what the host refuses; `output` and `result` raise the rest.
    """
    limit = request.timeout_seconds
    verb = Execute(
        instance_id=entry.instance.id,
        execution_id=uuid7(),
        command=request.command,
        timeout_seconds=float(entry.spec.command_timeout_seconds if limit is None else limit),
        cwd=request.cwd,
        env=entry.environment(request.env),
        stdin=request.stdin is not None,
        stream=request.stream,
        argv=request.argv,
        user=request.user,
        merge=request.merge,
        kernel=request.kernel,
        detach=detach,
    )
    execution = Execution(control, principal, entry, verb, request.stdin)
    control.metrics.executions += 1
    control.metrics.cells += verb.kernel is not None
    entry.open_streams += 1
    try:
        await execution.open()
        # The command itself may hold secrets, so the log says only that there was one.
        details = {"instance_id": str(verb.instance_id), **entry.marks}
        control.later.audit(audit.event(principal, "execution.start", "execution", verb.execution_id, details))
        yield execution
    except InnkeeperError:
        control.metrics.execution_failures += 1
        raise
    finally:
        entry.open_streams -= 1
        control.live.touch(entry)
        await execution.close()


async def read_output(
    control: Control,
    entry: Entry,
    execution_id: UUID,
    *,
    offset: int = 0,
    limit: int = 1_048_576,
) -> OutputPage:
    """A piece of an execution's kept output. Raises ExecutionNotFoundError."""
    if offset < 0 or not 1 <= limit <= OUTPUT_LIMIT_MAX:
        raise InvalidRequestError(f"offset: must not be negative; limit: must be between 1 and {OUTPUT_LIMIT_MAX}")
    verb = ReadOutput(entry.instance.id, execution_id, offset=offset, limit=limit)
    data = bytearray()
    head, answer = await guest_calls.kept(control, entry, verb, lambda piece: data.extend(piece.data))
    gap = head.get("gap")
    return OutputPage(
        instance=entry.instance,
        offset=head.get("offset", offset),
        data=bytes(data),
        next_offset=answer["next_offset"],
        total_bytes=head.get("total_bytes", 0),
        gap=None if gap is None else (gap["from"], gap["to"]),
        ended=bool(head.get("ended")),
        exit_code=head.get("exit_code"),
    )


async def files_changed(
    control: Control,
    entry: Entry,
    execution_id: UUID,
    *,
    cursor: int = 0,
    limit: int = PAGE_MAX,
) -> FilesChangedPage:
    """A page of an execution's file changes. Raises ExecutionNotFoundError."""
    if cursor < 0 or not 1 <= limit <= PAGE_MAX:
        raise InvalidRequestError(f"cursor: must not be negative; limit: must be between 1 and {PAGE_MAX}")
    verb = ReadFilesChanged(entry.instance.id, execution_id, cursor=cursor, limit=limit)
    answer = await control.bus.request(
        guest_calls.host_of(entry), verb.verb, to_wire(verb), timeout_seconds=guest_calls.HOST_SECONDS
    )
    return FilesChangedPage(entry.instance, _changes(answer["files_changed"]), answer["total"], answer["next_cursor"])


def _validate(request: ExecutionRequest) -> None:
    if request.argv:
        _check_text("argv", "\n".join(request.argv))
        if not request.argv[0]:
            raise InvalidRequestError("argv: the first word is the program")
    else:
        if not request.command.strip():
            raise InvalidRequestError("command: must not be empty")
        _check_text("command", request.command)
    if request.user is not None and not USER.fullmatch(request.user):
        raise InvalidRequestError("user: not a user of the guest")
    high = COMMAND_TIMEOUT_RANGE[1]
    if request.timeout_seconds is not None and not 0 < request.timeout_seconds <= high:
        raise InvalidRequestError(f"timeout: must be above 0 and at most {high} seconds")
    if request.cwd is not None and (not request.cwd.startswith("/") or "\0" in request.cwd):
        raise InvalidRequestError("cwd: must be an absolute path")
    if request.env:
        validate_env(request.env)


def _check_text(name: str, text: str) -> None:
    if "\0" in text:
        raise InvalidRequestError(f"{name}: must not contain NUL")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequestError(f"{name}: must be valid Unicode") from None
    if size > COMMAND_BYTES_MAX:
        raise InvalidRequestError(f"{name}: at most {COMMAND_BYTES_MAX} bytes; write a file and run that")


async def _feed(call: Call, stdin: bytes) -> None:
    try:
        if stdin:
            await call.send_data(stdin)
        await call.send_end()
    except (InnkeeperError, LinkLostError):
        # The call has ended; its reader hears why.
        pass


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


def _changes(rows: list[dict[str, Any]]) -> tuple[FileChange, ...]:
    return tuple(FileChange(row["path"], row["status"], row["size"], row["mime_type"]) for row in rows)


def _result(answer: dict[str, Any]) -> ExecutionResult:
    return ExecutionResult(
        exit_code=answer["exit_code"],
        signal=answer["signal"],
        timed_out=answer["timed_out"],
        duration_ms=answer["duration_ms"],
        output_bytes=answer["output_bytes"],
        output_truncated=answer["output_truncated"],
        files_changed=_changes(answer["files_changed"]),
        files_changed_total=answer["files_changed_total"],
        files_changed_truncated=answer["files_changed_truncated"],
        started_at=answer["started_at"],
        cpu_ms=answer["cpu_ms"],
        stderr_bytes=answer["stderr_bytes"],
        kernel=kernel_state(answer["kernel"]),
        result_bytes=answer["result_bytes"],
        results_truncated=answer["results_truncated"],
    )


def kernel_state(said: dict[str, Any] | None) -> KernelState | None:
    """What a host says of a cell's interpreter."""
    return None if said is None else KernelState(bool(said["fresh"]), bool(said["lost"]))
