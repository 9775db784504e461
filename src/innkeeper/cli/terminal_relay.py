"""The two ends of `inn terminal`: one's own terminal and the connection to the one in the guest."""

from __future__ import annotations

import asyncio
import contextlib
import json as jsonlib
import os
import shutil
import signal
import sys
import termios
import tty
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from innkeeper.cli.printing import UNREACHABLE, fail

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

    from innkeeper.cli.connection import Server

LOST = 255
READ_BYTES = 65_536
CONNECT_SECONDS = 15.0
# What a program may have switched on that a shell does not expect: mouse reports, bracketed paste, the other screen, a hidden cursor.
CALM = b"\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[?1049l\x1b[0m\x1b[?25h"


def window() -> tuple[int, int]:
    """Columns and rows of one's own terminal."""
    size = shutil.get_terminal_size((80, 24))
    return min(size.columns, 1_000) or 80, min(size.lines, 1_000) or 24


async def join(server: Server, path: str, key: bytes) -> int | None:
    """Relay until the program ends (its exit code) or the detach key is typed (None). Ends the command when the connection is lost."""
    from websockets.exceptions import ConnectionClosed, InvalidHandshake

    try:
        async with server.websocket(path, open_timeout=CONNECT_SECONDS) as socket:
            with _raw_terminal() as is_terminal:
                return await _Relay(socket, key if is_terminal else b"").run()
    except ConnectionClosed as closed:
        frame = closed.rcvd
        fail(f"the terminal's connection broke{f': {frame.reason}' if frame and frame.reason else ''}", status=LOST)
    except (InvalidHandshake, OSError, TimeoutError) as error:
        fail(f"no connection to the terminal: {error or type(error).__name__}", status=UNREACHABLE)


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
    """Keys to the guest, its output to one's own terminal."""

    def __init__(self, socket: ClientConnection, key: bytes) -> None:
        self._socket = socket
        self._key = key
        self._keys: asyncio.Queue[bytes] = asyncio.Queue(maxsize=16)
        self._resized = asyncio.Event()

    async def run(self) -> int | None:
        loop = asyncio.get_running_loop()
        # A terminal that is gone back to has the size of whoever was there before.
        self._resized.set()
        loop.add_signal_handler(signal.SIGWINCH, self._resized.set)
        async with _keyboard(self._keys):
            tasks = [asyncio.create_task(work) for work in (self._show(), self._type(), self._tell_size())]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                return next(iter(done)).result()
            finally:
                loop.remove_signal_handler(signal.SIGWINCH)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _show(self) -> int:
        out = sys.stdout.fileno()
        loop = asyncio.get_running_loop()
        async for message in self._socket:
            if isinstance(message, bytes):
                # In a thread: a terminal that takes nothing (Ctrl-S) must not keep the keys from being read.
                await loop.run_in_executor(None, _write_all, out, message)
            elif (said := jsonlib.loads(message)).get("type") == "exit":
                return int(said.get("exit_code") or 0)
        # It was closed without an error, and without an exit.
        await self._socket.recv()
        return LOST

    async def _type(self) -> None:
        while data := await self._keys.get():
            before, key, _ = data.partition(self._key) if self._key else (data, b"", b"")
            if before:
                await self._send(before)
            if key:
                return
        # The end of piped input is what Ctrl-D is on a terminal; the program's own end is still to be seen.
        await self._send(b"\x04")
        await asyncio.Event().wait()

    async def _send(self, message: str | bytes) -> None:
        from websockets.exceptions import ConnectionClosed

        # What is still on its way from there says why it was closed: `_show` reads that.
        with contextlib.suppress(ConnectionClosed):
            await self._socket.send(message)

    async def _tell_size(self) -> None:
        while True:
            await self._resized.wait()
            self._resized.clear()
            if sys.stdin.isatty() or sys.stdout.isatty():
                cols, rows = window()
                await self._send(jsonlib.dumps({"type": "resize", "cols": cols, "rows": rows}))


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
