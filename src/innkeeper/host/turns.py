"""Turns: how many commands may be getting started at once.

Under overload gVisor guests share two cores very unevenly (20 guests: 1 to 24 commands a second each, equal shares), because a start is a burst of
wake-ups. First come, first served at this door keeps the slowest room close to the fastest.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class Turn:
    """A place that is held until `end` or until its time is over, whichever comes first."""

    def __init__(self, give_back: Callable[[], None], hold_seconds: float) -> None:
        self._give_back: Callable[[], None] | None = give_back
        self._timer = asyncio.get_running_loop().call_later(hold_seconds, self.end)

    def end(self) -> None:
        """Give the place to the next one; safe to repeat."""
        if self._give_back is not None:
            self._timer.cancel()
            give_back, self._give_back = self._give_back, None
            give_back()


class Turns:
    """A first-in, first-out gate with `limit` places. A place is held for at most `hold_seconds`: a long command blocks nobody."""

    def __init__(self, limit: int, *, hold_seconds: float = 0.25) -> None:
        self._free = limit
        self._hold_seconds = hold_seconds
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """How many wait for a place."""
        return len(self._waiting)

    async def take(self) -> Turn:
        """Wait for a place."""
        if self._free > 0 and not self._waiting:
            self._free -= 1
        else:
            place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            try:
                await place
            except asyncio.CancelledError:
                if not place.cancelled():
                    self._give_back()
                elif place in self._waiting:
                    # Gone already where a place was given back between the cancelling and this line.
                    self._waiting.remove(place)
                raise
        return Turn(self._give_back, self._hold_seconds)

    def _give_back(self) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._free += 1
