"""Single flight: what brings an instance up or takes it down runs once, whoever waits for it and however they go away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from innkeeper.control.live_table import Entry, Key
from innkeeper.control.tasks import Tasks
from innkeeper.errors import UnavailableError


@dataclass(frozen=True, slots=True)
class Flight:
    """A change of an instance's life that is going on: `up` or `down`. The future holds its entry, or the error of it all."""

    kind: str
    future: asyncio.Future[Entry]


class Flights:
    """At most one flight per handle."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._by_key: dict[Key, Flight] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, key: Key) -> Flight | None:
        """The handle's flight, if one is going on."""
        return self._by_key.get(key)

    def start(self, key: Key, kind: str, work: Callable[[], Coroutine[Any, Any, Entry]]) -> Flight:
        """Begin; the work is a task of the server, not of the caller. The caller has looked that there is no other."""
        flight = Flight(kind, asyncio.get_running_loop().create_future())
        # Nobody may be waiting when it fails, and then the error is no news: the instance's state tells of it.
        flight.future.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._by_key[key] = flight

        async def run() -> None:
            try:
                entry = await work()
            except asyncio.CancelledError:
                flight.future.set_exception(UnavailableError("The server is stopping"))
                raise
            except Exception as error:
                flight.future.set_exception(error)
            else:
                flight.future.set_result(entry)
            finally:
                del self._by_key[key]

        try:
            self._tasks.spawn(run(), name=f"instance {kind}")
        except RuntimeError:
            del self._by_key[key]
            raise UnavailableError("The server is stopping") from None
        return flight
