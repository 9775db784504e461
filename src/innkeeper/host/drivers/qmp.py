"""QEMU's control socket (QMP). The peer is semi-trusted: a guest may have taken its QEMU over, so what comes from it is bounded and validated.

No library: `qemu.qmp` takes lines and events without an end, and of the protocol only commands, answers and events are needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from innkeeper.errors import InnkeeperError
from innkeeper.host.linux import unix_socket
from innkeeper.wire.frames import ProtocolError, parse_object

# Its host may be busy beyond measure.
GREETING_SECONDS = 30.0
COMMAND_SECONDS = 30.0
# The answers that are asked for here have some hundred bytes.
MAX_LINE_BYTES = 262_144
# Lines that nobody asked for. QEMU itself sends a handful in a machine's life, and paces those that a guest can cause.
UNASKED_AT_ONCE = 256
UNASKED_PER_SECOND = 64
QUOTED_CHARACTERS = 300


class QmpError(InnkeeperError):
    """The virtual machine's control socket does not work."""

    code: ClassVar[str] = "machine_control_failed"


class QmpLostError(QmpError):
    """QEMU closed its control socket, or does not answer on it."""


class QmpRefusedError(QmpError):
    """QEMU refused a command; `kind` is its class of error."""

    def __init__(self, command: str, kind: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {_printable(description)}")
        self.kind = _printable(kind)


@dataclass(frozen=True, slots=True)
class Event:
    """What QEMU said unasked: `SHUTDOWN`, with its data."""

    name: str
    data: Mapping[str, Any]


def ignore(_: Event) -> None:
    """Hear of an event, and do nothing."""


class Qmp:
    """A session on a control socket. Get one by `connect`; QEMU serves one at a time."""

    def __init__(
        self,
        connection: socket.socket,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        on_event: Callable[[Event], None],
    ) -> None:
        self._connection = connection
        self._reader = reader
        self._writer = writer
        self._on_event = on_event
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._last_id = 0
        self._allowance, self._allowed_at = float(UNASKED_AT_ONCE), asyncio.get_running_loop().time()
        self._lost: QmpError | None = None
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, path: Path, *, on_event: Callable[[Event], None] = ignore) -> Self:
        """A session that takes commands; `on_event` hears of every event from then on.

        Raises QmpLostError when nobody listens or QEMU does not greet in time, QmpError for a greeting that is none.
        """
        try:
            connection = unix_socket.connect(path)
            reader, writer = await asyncio.open_unix_connection(sock=connection, limit=MAX_LINE_BYTES)
        except OSError as error:
            raise QmpLostError(f"QEMU's control socket cannot be reached: {error.strerror}") from error
        session = cls(connection, reader, writer, on_event)
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                if not isinstance((await session._line()).get("QMP"), dict):
                    raise QmpError("QEMU's control socket gave no greeting")
                session._reading = asyncio.get_running_loop().create_task(session._read())
                await session.execute("qmp_capabilities")
        except BaseException as error:
            await asyncio.shield(session.close())
            if isinstance(error, TimeoutError):
                raise QmpLostError("QEMU did not greet in time") from None
            raise
        return session

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        descriptor: int | None = None,
        timeout_seconds: float = COMMAND_SECONDS,
    ) -> Any:
        """What QEMU returns for a command; whoever uses it checks its shape. A copy of `descriptor` goes with it, for commands that take one.

        Raises QmpRefusedError for an error, QmpLostError without an answer in time.
        """
        if self._lost is not None:
            raise self._lost
        self._last_id += 1
        number, answer = self._last_id, asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        body: dict[str, Any] = {"execute": command, "id": number}
        if arguments:
            body["arguments"] = arguments
        try:
            self._send(json.dumps(body).encode() + b"\n", descriptor)
            async with asyncio.timeout(timeout_seconds):
                reply = await answer
        except TimeoutError:
            raise QmpLostError(f"QEMU did not answer {command} in time") from None
        finally:
            self._waiting.pop(number, None)
        if "error" in reply:
            error = reply["error"] if isinstance(reply["error"], dict) else {}
            raise QmpRefusedError(command, str(error.get("class", "")), str(error.get("desc", "")))
        return reply["return"]

    async def hand_over(self, name: str, descriptor: int) -> None:
        """Give QEMU a copy of a descriptor, which commands may then call `name`. Raises QmpError."""
        await self.execute("getfd", {"fdname": name}, descriptor=descriptor)

    def _send(self, line: bytes, descriptor: int | None) -> None:
        if descriptor is None:
            self._writer.write(line)
            return
        # Past asyncio, whose transports carry no descriptors: what it still holds back would come after it.
        if self._writer.transport.get_write_buffer_size():
            raise QmpLostError("QEMU does not read its control socket")
        try:
            sent = socket.send_fds(self._connection, [line], [descriptor])
        except OSError as error:
            raise QmpLostError(f"QEMU's control socket took no descriptor: {error.strerror}") from error
        if sent != len(line):
            raise QmpLostError("QEMU does not read its control socket")

    async def close(self) -> None:
        """End the session; QEMU goes on. Safe to repeat."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        self._fail(QmpLostError("The control session was closed"))
        self._writer.transport.abort()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _read(self) -> None:
        try:
            while True:
                self._take(await self._line())
        except QmpError as error:
            self._fail(error)
            self._writer.transport.abort()

    async def _line(self) -> dict[str, Any]:
        try:
            return parse_object(await self._reader.readuntil(b"\n"))
        except asyncio.LimitOverrunError:
            raise QmpError("QEMU's control socket sent a line that is too long") from None
        except ProtocolError as error:
            raise QmpError(f"QEMU's control socket sent no JSON object: {error}") from None
        except (asyncio.IncompleteReadError, OSError):
            raise QmpLostError from None

    def _take(self, line: dict[str, Any]) -> None:
        number = line.get("id")
        answer = self._waiting.pop(number, None) if type(number) is int else None
        if answer is not None and ("return" in line or "error" in line):
            if not answer.done():
                answer.set_result(line)
            return
        self._pace()
        name, data = line.get("event"), line.get("data", {})
        if isinstance(name, str) and isinstance(data, dict):
            self._on_event(Event(name[:64], data))

    def _pace(self) -> None:
        """Count a line that nobody asked for: parsing them without end would keep the daemon from everything else."""
        now = asyncio.get_running_loop().time()
        gained = (now - self._allowed_at) * UNASKED_PER_SECOND
        self._allowance, self._allowed_at = min(UNASKED_AT_ONCE, self._allowance + gained) - 1, now
        if self._allowance < 0:
            raise QmpError("QEMU's control socket sent more than it was asked for")

    def _fail(self, error: QmpError) -> None:
        if self._lost is None:
            self._lost = error
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(self._lost)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text[:QUOTED_CHARACTERS])
