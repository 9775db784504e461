"""A file that another program writes through a pipe: it never holds the file itself, and no more is taken from it than was allowed."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import select
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from io import FileIO
from pathlib import Path

# The most that every user may have.
PIECE_BYTES = 1 << 20
F_SETPIPE_SZ = 1031
# How soon it is noticed that nobody wants the rest.
NOTICE_MS = 50
END_SECONDS = 30.0


class PipeFile:
    """A new file, and a pipe whose contents go there. `taken` grows as they come.

    Args:
        path: the file, which must not be there.
        limit_bytes: at most; a writer of more than that finds its pipe closed.

    """

    def __init__(self, path: Path, *, limit_bytes: int) -> None:
        self.taken = 0
        self._path = path
        self._limit = limit_bytes
        self._wanted = threading.Event()
        self._unwanted = threading.Event()

    def begin(self) -> None:
        """Take what comes. Until then a writer waits as soon as the pipe is full."""
        self._wanted.set()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[FileIO]:
        """The end to write to, which the caller hands on and closes. After the block the file holds what was written until nobody had that end any more.

        Raises OSError: why it could not be written, EFBIG for too much, ETIMEDOUT where a writer keeps its end. A block that fails for want of a reader fails
        by the reader's reason. The file then holds anything.
        """
        out, into = os.pipe2(os.O_CLOEXEC)
        # A thread of its own: this takes seconds, and those of the event loop are few.
        with FileIO(into, "w") as end, ThreadPoolExecutor(1) as thread:
            copied = asyncio.get_running_loop().run_in_executor(thread, self._copy, out)
            try:
                yield end
                end.close()
                self.begin()
                async with asyncio.timeout(END_SECONDS):
                    await asyncio.shield(copied)
            except TimeoutError:
                raise OSError(errno.ETIMEDOUT, "A writer keeps its end of the pipe") from None
            except Exception as error:
                # Why nobody read any more is why the writer failed.
                if copied.done() and (reason := copied.exception()) is not None and reason is not error:
                    raise reason from error
                raise
            finally:
                self._unwanted.set()
                self._wanted.set()
                await asyncio.shield(asyncio.wait([copied]))
                # Whoever it was of interest to has heard of it.
                copied.exception()

    def _copy(self, out: int) -> None:
        with FileIO(out) as source, self._path.open("xb", buffering=0) as target:
            fcntl.fcntl(source, F_SETPIPE_SZ, PIECE_BYTES)
            self._wanted.wait()
            ready = select.poll()
            ready.register(source, select.POLLIN)
            while not self._unwanted.is_set():
                if not ready.poll(NOTICE_MS):
                    continue
                piece = os.splice(source.fileno(), target.fileno(), PIECE_BYTES)
                if piece == 0:
                    return
                self.taken += piece
                if self.taken > self._limit:
                    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
