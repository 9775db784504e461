"""A session of an SSH client: a shell, a command or a file transfer in the guest."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from collections import deque

import asyncssh

from innkeeper.api.errors import describe
from innkeeper.api.ssh.connection import Connection
from innkeeper.api.ssh.pipe import Pipe
from innkeeper.control import programs, ssh_logins
from innkeeper.control.context import Control
from innkeeper.control.programs import Program, ProgramEnd, ProgramRequest
from innkeeper.control.ssh_logins import SshLogin
from innkeeper.errors import FileMissingError, InnkeeperError

# What sshd takes too, in Debian; whatever else a client sends is none of the guest's business.
VARIABLE = re.compile(rb"LANG|LC_[A-Z]{1,32}")
VALUE = re.compile(rb"[A-Za-z0-9_.@:=-]{0,128}")
TERMINAL_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
# Those that RFC 4254 names.
SIGNALS = {
    name: int(getattr(signal, f"SIG{name}"))
    for name in ("ABRT", "ALRM", "FPE", "HUP", "ILL", "INT", "KILL", "PIPE", "QUIT", "SEGV", "TERM", "USR1", "USR2")
}
SIGNAL_NAMES = {number: name for name, number in SIGNALS.items()}
ORDERS_MAX = 64
SIZE_MAX = 1_000
DEFAULT_SIZE = (80, 24)
# As shells and sshd have them.
NOT_FOUND = 127
FAILED = 255


class Session(asyncssh.SSHServerSession[bytes]):
    """One session; a task of its own runs its program, which is hung up on when the channel closes."""

    def __init__(self, control: Control, login: SshLogin, connection: Connection) -> None:
        self._control = control
        self._login = login
        self._pipe = Pipe(connection)
        self._channel: asyncssh.SSHServerChannel[bytes] | None = None
        self._kind = ""
        self._size: tuple[int, int] | None = None
        self._terminal_type = ""
        self._command: str | None = None
        self._programs: tuple[tuple[str, ...], ...] = ()
        # Signals to be sent; None is a new size of the window, of which only the last one counts.
        self._orders: deque[int | None] = deque(maxlen=ORDERS_MAX)
        self._ordered = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    # --- what the client asks for ----------------------------------------------------------------------------------

    def connection_made(self, chan: asyncssh.SSHServerChannel[bytes]) -> None:
        """The channel is there."""
        self._channel = chan
        self._pipe.opened(chan)

    def pty_requested(self, term_type: str, term_size: tuple[int, int, int, int], term_modes: object) -> bool:
        """A terminal is wanted; the guest makes it."""
        self._size = _bounded(term_size[0], term_size[1])
        self._terminal_type = term_type if TERMINAL_TYPE.fullmatch(term_type) else ""
        return True

    def shell_requested(self) -> bool:
        """A login shell is wanted."""
        self._kind = "shell"
        self._programs = programs.READING if self._size is None else programs.INTERACTIVE
        return True

    def exec_requested(self, command: str) -> bool:
        """A command is wanted."""
        self._kind, self._command = "exec", command
        return True

    def subsystem_requested(self, subsystem: str) -> bool:
        """A file transfer is wanted; there are no other subsystems."""
        self._kind, self._programs, self._size = "sftp", programs.SFTP_SERVER, None
        return subsystem == "sftp"

    def session_started(self) -> None:
        """The client was told that it has what it wants."""
        self._task = asyncio.get_running_loop().create_task(self._serve())

    # --- what it sends -----------------------------------------------------------------------------------------------

    def data_received(self, data: bytes, datatype: int | None) -> None:
        """Input came."""
        self._pipe.push(data)

    def eof_received(self) -> bool:
        """No more input comes; the output goes on."""
        self._pipe.push_end()
        return True

    def signal_received(self, signal: str) -> None:
        """A signal is to be sent; those that have no name in the protocol are left alone."""
        if signal in SIGNALS:
            self._orders.append(SIGNALS[signal])
            self._ordered.set()

    def terminal_size_changed(self, width: int, height: int, pixwidth: int, pixheight: int) -> None:
        """The window has another size."""
        self._size = _bounded(width, height)
        if None not in self._orders:
            self._orders.append(None)
        self._ordered.set()

    def pause_writing(self) -> None:
        """The client's window is full."""
        self._pipe.pause()

    def resume_writing(self) -> None:
        """It is not any more."""
        self._pipe.resume()

    def connection_lost(self, exc: Exception | None) -> None:
        """The channel is closed."""
        if self._task is not None:
            self._task.cancel()

    # --- the program ---------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        assert self._channel is not None  # noqa: S101 - it has been opened
        # A channel that closes meanwhile cancels this; what is written to it between the two is lost, and that is all.
        with contextlib.suppress(OSError):
            try:
                end = await self._run(self._request())
            except InnkeeperError as error:
                await self._pipe.send(f"innkeeper: {describe(error)[2]}\r\n".encode(), errors=True)
                self._channel.exit(NOT_FOUND if isinstance(error, FileMissingError) else FAILED)
            else:
                name = SIGNAL_NAMES.get(end.signal or 0)
                if name is None:
                    self._channel.exit(end.exit_code)
                else:
                    self._channel.exit_with_signal(name)

    def _request(self) -> ProgramRequest:
        assert self._channel is not None  # noqa: S101 - it has been opened
        env = {
            name.decode(): value.decode()
            for name, value in self._channel.get_environment_bytes().items()
            if VARIABLE.fullmatch(name) and VALUE.fullmatch(value)
        }
        if self._size is not None and self._terminal_type:
            env["TERM"] = self._terminal_type
        # An empty command is a shell's no-op, as sshd has it.
        command = self._command if self._command is None or self._command.strip() else "true"
        return ProgramRequest(command, self._programs, env, self._size)

    async def _run(self, request: ProgramRequest) -> ProgramEnd:
        login = self._login
        ssh_logins.note_session(self._control, login, self._kind)
        async with programs.run(self._control, login.principal, login.entry, request) as program:
            beside = [asyncio.create_task(self._feed(program)), asyncio.create_task(self._order(program))]
            try:
                async for channel, data in program.output():
                    await self._pipe.send(data, errors=channel != 1)
                return await program.end()
            finally:
                for task in beside:
                    task.cancel()
                await asyncio.wait(beside)

    async def _feed(self, program: Program) -> None:
        async for piece in self._pipe.pieces():
            await program.write(piece)
        await program.end_input()

    async def _order(self, program: Program) -> None:
        while True:
            while self._orders:
                number = self._orders.popleft()
                if number is not None:
                    await program.signal(number)
                elif self._size is not None:
                    await program.resize(*self._size)
            self._ordered.clear()
            await self._ordered.wait()


def _bounded(cols: int, rows: int) -> tuple[int, int]:
    """A size that a window can have: some clients do not know theirs, and say 0."""
    return min(cols, SIZE_MAX) or DEFAULT_SIZE[0], min(rows, SIZE_MAX) or DEFAULT_SIZE[1]
