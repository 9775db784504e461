"""An event loop whose clock jumps to the next timer when there is nothing else to do: what a test waits for comes at once and in the right order,
however slow the machine is.

For code that only waits on timers and on other tasks. A test with threads or sockets must not use it: the clock does not wait for those.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import Any

import pytest


class _Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Passes the time instead of waiting."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            ready: list[tuple[selectors.SelectorKey, int]] = super().select(None)
            return ready
        ready = super().select(0)
        if not ready:
            self.now += max(0.0, timeout)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Begins at 0 seconds."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Imported by a module of tests, it gives them the loop."""
    return ("asyncio", {"loop_factory": VirtualTimeLoop})
