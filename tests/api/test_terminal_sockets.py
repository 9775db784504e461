"""WebSockets of terminals, from a client's socket to a scripted host."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.published_port import anyio_backend, published
from websockets.asyncio.client import connect

from innkeeper.api import websocket
from innkeeper.control.terminals import Attachment

__all__ = ["anyio_backend"]
pytestmark = pytest.mark.anyio


async def test_who_typed_more_than_the_program_takes_and_went_away_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then it counted as work in the instance, which never became idle, and as one who looks at the terminal."""
    monkeypatch.setattr(websocket, "PING_SECONDS", 0.1)
    begun: list[int] = []
    take = Attachment.type

    async def noted(self: Attachment, data: bytes) -> None:
        begun.append(len(data))
        await take(self, data)

    monkeypatch.setattr(Attachment, "type", noted)
    async with published(tmp_path) as made:
        terminals = made.world.host.terminals
        terminals.add(made.entry.instance.id, "t")
        terminals.take = False
        url = f"ws://127.0.0.1:{made.port}/v1/rooms/{made.entry.instance.public_id}/pty/t/connect"
        socket = await connect(
            url, additional_headers={"X-API-Key": made.token}, compression=None, ping_interval=None, proxy=None
        )
        await made.world.until(lambda: made.entry.open_streams == 1)
        # The third is more than the host may be sent ahead, so that it is never taken.
        for _ in range(3):
            await socket.send(bytes(100_000))
        await made.world.until(lambda: len(begun) == 3)
        socket.transport.abort()
        async with asyncio.timeout(20):
            while made.entry.open_streams:
                await asyncio.sleep(0.01)
