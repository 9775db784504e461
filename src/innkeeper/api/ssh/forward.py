"""A connection that an SSH client forwards (`ssh -L`): to a port of the guest's own loopback, through its agent, by no socket of ours."""

from __future__ import annotations

import asyncio
import contextlib

import asyncssh

from innkeeper.api.errors import describe
from innkeeper.api.ssh.connection import Connection
from innkeeper.api.ssh.pipe import Pipe
from innkeeper.control import ports, ssh_logins
from innkeeper.control.context import Control
from innkeeper.control.ports import PortConnection
from innkeeper.control.ssh_logins import SshLogin
from innkeeper.errors import InnkeeperError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
PORTS = range(1, 65_536)


class Forward(asyncssh.SSHTCPSession[bytes]):
    """One forwarded connection; a task of its own carries it."""

    def __init__(self, control: Control, login: SshLogin, connection: Connection, port: int) -> None:
        self._control = control
        self._login = login
        self._port = port
        self._pipe = Pipe(connection)
        self._channel: asyncssh.SSHTCPChannel[bytes] | None = None
        self._connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._opened = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> Forward:
        """This, when the guest's server has taken the connection. Raises ChannelOpenError when it has not."""
        self._task = asyncio.get_running_loop().create_task(self._carry())
        try:
            await self._connected
        except InnkeeperError as error:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, describe(error)[2]) from None
        except BaseException:
            self._task.cancel()
            raise
        return self

    def connection_made(self, chan: asyncssh.SSHTCPChannel[bytes]) -> None:
        """The channel is there."""
        self._channel = chan
        self._pipe.opened(chan)
        self._opened.set()

    def data_received(self, data: bytes, datatype: int | None) -> None:
        """Bytes came."""
        self._pipe.push(data)

    def eof_received(self) -> bool:
        """A half close; the other direction goes on."""
        self._pipe.push_end()
        return True

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

    async def _carry(self) -> None:
        login = self._login
        try:
            async with ports.connect(self._control, login.principal, login.entry, self._port) as connection:
                ssh_logins.note_forward(self._control, login, self._port)
                self._connected.set_result(None)
                await self._opened.wait()
                await self._both_ways(connection)
        except InnkeeperError as error:
            if not self._connected.done():
                self._connected.set_exception(error)
        finally:
            self._connected.cancel()
            if self._channel is not None:
                self._channel.close()

    async def _both_ways(self, connection: PortConnection) -> None:
        inward = asyncio.create_task(self._inward(connection))
        try:
            # A channel that closes meanwhile cancels this.
            with contextlib.suppress(OSError):
                while data := await connection.receive():
                    await self._pipe.send(data)
                if self._channel is not None:
                    self._channel.write_eof()
                await inward
        finally:
            inward.cancel()
            await asyncio.wait([inward])

    async def _inward(self, connection: PortConnection) -> None:
        # What goes wrong here ends the call, and whoever reads its other direction says so.
        with contextlib.suppress(InnkeeperError):
            async for piece in self._pipe.pieces():
                await connection.send(piece)
            await connection.send_end()
