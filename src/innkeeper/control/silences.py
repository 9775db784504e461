"""What comes now and then, with the silences between told: a stream to a client says something in them, so that neither end takes the other for gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, TypeVar

Item = TypeVar("Item")
SECONDS = 10.0
_END: Any = object()


async def with_silences(items: AsyncIterator[Item], *, seconds: float = SECONDS) -> AsyncGenerator[Item | None, None]:
    """The items as they come, and None whenever none came for so long. Closing it closes them."""
    waiting: asyncio.Future[Item] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(items, _END))
            done, _ = await asyncio.wait({waiting}, timeout=seconds)
            if not done:
                yield None
                continue
            item, waiting = waiting.result(), None
            if item is _END:
                return
            yield item
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.wait({waiting})
        if isinstance(items, AsyncGenerator):
            await items.aclose()
