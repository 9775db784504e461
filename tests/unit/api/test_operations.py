"""The endpoints of no dialect, where what one asks for must not be what all others wait for."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from innkeeper.api.operations import Operations

pytestmark = pytest.mark.anyio


async def test_the_first_one_to_ask_for_the_document_keeps_nobody_waiting() -> None:
    gate, made = threading.Event(), []

    def document() -> dict[str, Any]:
        made.append(threading.current_thread())
        assert gate.wait(20)
        return {"openapi": "3.1.0"}

    control: Any = SimpleNamespace(hosts=[])
    app: Any = Operations(control, SimpleNamespace(), document)  # type: ignore[arg-type]
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://inn") as client:
        asked = [asyncio.create_task(client.get("/openapi.json")) for _ in range(3)]
        async with asyncio.timeout(20):
            while not made:
                await asyncio.sleep(0.01)
            assert (await client.get("/healthz")).status_code == 200
            # Who goes away takes nothing with it.
            asked.pop().cancel()
            gate.set()
            answers = await asyncio.gather(*asked)
    assert [answer.json() for answer in answers] == [{"openapi": "3.1.0"}] * 2
    assert len(made) == 1
