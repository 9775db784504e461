"""The two ends of `inn terminal`: one's own terminal and the connection to the one in the guest."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json as jsonlib
import os
import shutil
import signal
import sys
import termios
import tty
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from innkeeper.cli.printing import UNREACHABLE, fail, visible

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection
    from websockets.http11 import Response

    from innkeeper.cli.connection import Server

LOST = 255
READ_BYTES = 65_536
CONNECT_SECONDS = 15.0
# How long a connection that broke is tried again: a server that is started again is there in a few seconds.
AGAIN_SECONDS = 60.0
AGAIN_PAUSES = (0.2, 0.5, 1.0, 2.0)
# What trying again does not mend: a message that makes no sense, a token that is not valid any more, a terminal that is gone.
FINAL_CODES = frozenset({1007, 1008, 1009, 4400, 4401, 4403, 4404})
FINAL_STATUSES = frozenset({400, 401, 403, 404, 426})
CTRL_C = b"\x03"
# What a program may have switched on that a shell does not expect: mouse reports, bracketed paste, the other screen, a hidden cursor.
CALM = b"\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[?1049l\x1b[0m\x1b[?25h"


def window() -> tuple[int, int]:
    """Columns and rows of one's own terminal."""
    size = shutil.get_terminal_size((80, 24))
    return min(size.columns, 1_000) or 80, min(size.lines, 1_000) or 24


class GaveUpError(Exception):
    """The connection is lost, or there was none; the text says why."""


async def join(server: Server, path: str, key: bytes, *, come_back: str) -> int | None:
    """Relay until the program ends (its exit code) or the detach key is typed (None).

    A connection that breaks is tried again where the output stands, as long as a person sits there; `come_back` is told to those for whom that is in vain,
    and the command ends.
    """
    try:
        socket = await _connect(server, path, 0)
    except (GaveUpError, ConnectionError) as error:
        fail(f"no connection to the terminal: {error}", status=UNREACHABLE)
    try:
        with _raw_terminal() as is_terminal:
            relay = _Relay(key if is_terminal else b"")
            async with _keyboard(relay.keys):
                while True:
                    try:
                        async with socket:
                            return await relay.run(socket)
                    except ConnectionError as error:
                        if not is_terminal:
                            # How much of what was piped has arrived nobody knows.
                            raise GaveUpError(str(error)) from error
                        _tell(f"the terminal's connection broke: {error}; trying again, Ctrl-C gives up")
                    found = await relay.again(lambda: _connect(server, path, relay.offset))
                    if found is None:
                        return None
                    socket = found
    except GaveUpError as error:
        fail(
            f"the terminal's connection broke: {error}; where its program still runs, come back with: {come_back}",
            status=LOST,
        )


async def _connect(server: Server, path: str, offset: int) -> ClientConnection:
    """A connection that shows the output from an offset on. Raises GaveUpError, or ConnectionError where it may work later."""
    from websockets.exceptions import InvalidHandshake, InvalidStatus

    try:
        return await server.websocket(f"{path}?offset={offset}", open_timeout=CONNECT_SECONDS)
    except InvalidStatus as error:
        said = _said_by(error.response)
        if error.response.status_code in FINAL_STATUSES:
            raise GaveUpError(said) from None
        raise ConnectionError(said) from error
    except (InvalidHandshake, OSError, TimeoutError, EOFError) as error:
        raise ConnectionError(str(error) or type(error).__name__) from error


def _said_by(response: Response) -> str:
    try:
        return visible(str(jsonlib.loads(response.body or b"")["detail"]))
    except (ValueError, LookupError, TypeError):
        return f"the server answers {response.status_code}"


def _tell(text: str) -> None:
    """A line for the person at a raw terminal."""
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"\r\ninn: {text}\r\n".encode())


@contextlib.contextmanager
def _raw_terminal() -> Iterator[bool]:
    """Standard input passes every key on as it is, where it is a terminal; afterwards it is what it was, whatever happened."""
    if not sys.stdin.isatty():
        yield False
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def give_up(number: int, _: Any) -> None:
        # Through `finally`, which the default action would skip.
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, give_up) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        # Without throwing away what was typed ahead.
        tty.setraw(descriptor, termios.TCSADRAIN)
        yield True
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
        if sys.stdout.isatty():
            with contextlib.suppress(OSError):
                os.write(sys.stdout.fileno(), CALM + b"\r\n")
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Relay:
    """Keys to the guest, its output to one's own terminal, over one connection after another. `offset` is how far the output has been shown."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self.keys: asyncio.Queue[bytes] = asyncio.Queue(maxsize=16)
        self.offset = 0
        self._resized = asyncio.Event()

    async def run(self, socket: ClientConnection) -> int | None:
        """Until the program's end (its exit code) or the detach key (None). Raises ConnectionError, or GaveUpError where that is final."""
        loop = asyncio.get_running_loop()
        # A terminal that is gone back to has the size of whoever was there before.
        self._resized.set()
        loop.add_signal_handler(signal.SIGWINCH, self._resized.set)
        showing = asyncio.create_task(self._show(socket))
        others = [asyncio.create_task(self._type(socket)), asyncio.create_task(self._tell_size(socket))]
        try:
            # The other two only end by the detach key: what came before a connection broke is shown first, so that nothing of it comes again.
            done, _ = await asyncio.wait([showing, *others], return_when=asyncio.FIRST_COMPLETED)
            return showing.result() if showing in done else None
        finally:
            loop.remove_signal_handler(signal.SIGWINCH)
            for task in (showing, *others):
                task.cancel()
            await asyncio.gather(showing, *others, return_exceptions=True)

    async def again(self, connect: Callable[[], Awaitable[ClientConnection]]) -> ClientConnection | None:
        """Try for a while to get a connection; None when the detach key is typed. What else is typed is dropped. Raises GaveUpError, also for Ctrl-C."""
        trying = asyncio.create_task(self._try(connect))
        leaving = asyncio.create_task(self._leave())
        try:
            done, _ = await asyncio.wait([trying, leaving], return_when=asyncio.FIRST_COMPLETED)
            return trying.result() if trying in done else leaving.result()
        finally:
            for task in (trying, leaving):
                task.cancel()
            await asyncio.gather(trying, leaving, return_exceptions=True)

    async def _try(self, connect: Callable[[], Awaitable[ClientConnection]]) -> ClientConnection:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + AGAIN_SECONDS
        for pause in itertools.chain(AGAIN_PAUSES, itertools.repeat(AGAIN_PAUSES[-1])):
            await asyncio.sleep(pause)
            try:
                return await connect()
            except ConnectionError as error:
                if loop.time() > deadline:
                    raise GaveUpError(str(error)) from error
        raise AssertionError("there is always another pause")

    async def _leave(self) -> None:
        while data := await self.keys.get():
            if CTRL_C in data:
                raise GaveUpError("nobody wanted to wait")
            if self._key and self._key in data:
                return
        raise GaveUpError("the keyboard is gone")

    async def _show(self, socket: ClientConnection) -> int:
        from websockets.exceptions import ConnectionClosed

        out = sys.stdout.fileno()
        loop = asyncio.get_running_loop()
        try:
            while True:
                message = await socket.recv()
                if isinstance(message, bytes):
                    # In a thread: a terminal that takes nothing (Ctrl-S) must not keep the keys from being read.
                    await loop.run_in_executor(None, _write_all, out, message)
                    self.offset += len(message)
                elif (said := jsonlib.loads(message)).get("type") == "exit":
                    return int(said.get("exit_code") or 0)
                elif said.get("type") == "offset":
                    # Later than it should be where more was said meanwhile than is kept.
                    self.offset = int(said["offset"])
        except ConnectionClosed as closed:
            frame = closed.rcvd
            reason = visible(frame.reason) if frame and frame.reason else "it was cut"
            if frame and frame.code in FINAL_CODES:
                raise GaveUpError(reason) from None
            raise ConnectionError(reason) from None

    async def _type(self, socket: ClientConnection) -> None:
        while data := await self.keys.get():
            before, key, _ = data.partition(self._key) if self._key else (data, b"", b"")
            if before:
                await _send(socket, before)
            if key:
                return
        # The end of piped input is what Ctrl-D is on a terminal; the program's own end is still to be seen.
        await _send(socket, b"\x04")
        await asyncio.Event().wait()

    async def _tell_size(self, socket: ClientConnection) -> None:
        while True:
            await self._resized.wait()
            self._resized.clear()
            if sys.stdin.isatty() or sys.stdout.isatty():
                cols, rows = window()
                await _send(socket, jsonlib.dumps({"type": "resize", "cols": cols, "rows": rows}))


async def _send(socket: ClientConnection, message: str | bytes) -> None:
    from websockets.exceptions import ConnectionClosed

    # What is still on its way from there says why it was closed: `_show` reads that.
    with contextlib.suppress(ConnectionClosed):
        await socket.send(message)


@asynccontextmanager
async def _keyboard(keys: asyncio.Queue[bytes]) -> AsyncIterator[None]:
    """Standard input in pieces, empty at its end. A thread reads it: not every kind of input can be waited for otherwise."""
    import threading

    loop = asyncio.get_running_loop()

    def read() -> None:
        with contextlib.suppress(RuntimeError, OSError):
            while True:
                data = os.read(0, READ_BYTES)
                asyncio.run_coroutine_threadsafe(keys.put(data), loop).result()
                if not data:
                    return

    # It sits in `read` until a key is typed, so nothing may wait for it.
    threading.Thread(target=read, daemon=True).start()
    yield


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
