"""Stopping work for a client that went away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import anyio
from starlette.types import Receive

from innkeeper.api.errors import ClientDisconnectedError

# Most requests are over by then, and never pay for a second task.
WATCH_AFTER_SECONDS = 0.25


@contextlib.asynccontextmanager
async def cancelled_on_disconnect(
    receive: Receive, *, after_seconds: float = WATCH_AFTER_SECONDS
) -> AsyncIterator[None]:
    """Cancels the body of the `async with` when the client disconnects. The request's body must have been read.

    Raises:
        ClientDisconnectedError: it did.

    """
    gone = False
    watcher: asyncio.Task[None] | None = None

    with anyio.CancelScope() as scope:

        async def watch() -> None:
            nonlocal gone
            while (await receive())["type"] != "http.disconnect":
                pass
            gone = True
            scope.cancel()

        def start() -> None:
            nonlocal watcher
            watcher = asyncio.get_running_loop().create_task(watch())

        timer = asyncio.get_running_loop().call_later(after_seconds, start)
        try:
            yield
        finally:
            timer.cancel()
            if watcher is not None:
                watcher.cancel()
                await asyncio.wait([watcher])
    if gone:
        raise ClientDisconnectedError
