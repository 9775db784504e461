"""The server's own tasks: all of them belong to one group, so none outlives the server and no failure goes unseen."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import structlog

from innkeeper.errors import InnkeeperError, UnavailableError

RESTART_SECONDS = 1.0

T = TypeVar("T")

log = structlog.get_logger(__name__)


class Tasks:
    """A task group with a start and an end."""

    def __init__(self) -> None:
        self._group: asyncio.TaskGroup | None = None
        # How often each kind of work raised something. Names are few: they are the code's.
        self.failures: Counter[str] = Counter()
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Open the group."""
        started = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._hold(started), name="control")
        await started

    async def close(self) -> None:
        """Cancel what runs and wait until it has ended. Idempotent."""
        supervisor, self._supervisor, self._group = self._supervisor, None, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.wait({supervisor})

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        """Run the work beside; an exception is logged.

        Raises:
            RuntimeError: the group is not open.

        """
        if self._group is None:
            work.close()
            raise RuntimeError("the server is not running")
        self._group.create_task(self._logged(work, name), name=name)

    async def finish(self, work: Coroutine[Any, Any, T], *, name: str) -> T:
        """The result of work that goes on to its end when the one who waits for it goes away. Raises what it raises, UnavailableError."""
        return await asyncio.shield(self.begin(work, name=name))

    def begin(self, work: Coroutine[Any, Any, T], *, name: str) -> asyncio.Future[T]:
        """What will come of work that is carried out beside; nobody need wait for it. Raises UnavailableError."""
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        # Nobody may wait for it any more.
        outcome.add_done_callback(lambda future: future.cancelled() or future.exception())

        async def carry_out() -> None:
            try:
                outcome.set_result(await work)
            except InnkeeperError as error:
                outcome.set_exception(error)
            except BaseException:
                outcome.set_exception(UnavailableError("The server could not do this now"))
                raise

        try:
            self.spawn(carry_out(), name=name)
        except RuntimeError:
            work.close()
            raise UnavailableError("The server is stopping") from None
        return outcome

    def forever(self, step: Callable[[], Awaitable[None]], *, name: str) -> None:
        """Run `step` again and again; it does its own waiting. After an exception it starts anew a second later."""

        async def loop() -> None:
            while True:
                try:
                    await step()
                except Exception:
                    self.failures[name] += 1
                    log.exception("background task failed", task=name)
                    await asyncio.sleep(RESTART_SECONDS)

        self.spawn(loop(), name=name)

    async def _logged(self, work: Coroutine[Any, Any, None], name: str) -> None:
        try:
            await work
        except Exception:
            self.failures[name] += 1
            log.exception("background task failed", task=name)

    async def _hold(self, started: asyncio.Future[None]) -> None:
        async with asyncio.TaskGroup() as group:
            self._group = group
            started.set_result(None)
            await asyncio.get_running_loop().create_future()


async def wait_for_hint(event: asyncio.Event, *, at_most_seconds: float) -> None:
    """Wait until someone sets the event, or for that long; the event is clear afterwards."""
    try:
        async with asyncio.timeout(at_most_seconds):
            await event.wait()
    except TimeoutError:
        pass
    event.clear()
