"""Waiting for, and signalling, processes that are not our children, safe against pid reuse."""

import asyncio
import contextlib
import os
import select
import signal
from types import TracebackType
from typing import Self


class PidFd:
    """A descriptor for one process; it keeps naming that process after its pid is gone or reused.

    Raises ProcessLookupError when there is no such process. Close it, or use it as a context manager.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)  # the kernel sets close-on-exec itself

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the process; safe to repeat."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def exited(self) -> bool:
        """Whether the process has ended, collected by its parent or not."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(0))

    def send_signal(self, number: int) -> bool:
        """Signal the process; False when it has been collected already."""
        try:
            signal.pidfd_send_signal(self._fd, number)
        except ProcessLookupError:
            return False
        return True

    async def wait(self) -> None:
        """Return when the process has ended. Put `asyncio.timeout` around it for a deadline; one waiter at a time."""
        if self.exited:
            return
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            loop.remove_reader(self._fd)
            if not ended.done():
                ended.set_result(None)

        loop.add_reader(self._fd, settle)
        try:
            await ended
        finally:
            loop.remove_reader(self._fd)


async def wait_gone(pid: int) -> None:
    """Return when process `pid` has ended; at once when there is none."""
    with contextlib.suppress(ProcessLookupError), PidFd(pid) as process:
        await process.wait()
