"""The real application over the real control side, with a scripted host at the other end of the bus."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
import pytest

from innkeeper.api.app import build_app
from innkeeper.api.edge import Edge

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripted_host import World


@dataclass
class Api:
    """A client with the first token, the world behind it, and the profile `base`."""

    app: Edge
    world: World
    client: httpx2.AsyncClient
    token: str
    profile_id: UUID
    document: dict[str, Any]

    @property
    def profile(self) -> str:
        return f"/api/profile/{self.profile_id}"

    @property
    def room(self) -> str:
        return f"{self.profile}/room/r"

    def anonymous(self, client: tuple[str, int] = ("192.0.2.1", 1234)) -> httpx2.AsyncClient:
        """A client without a token."""
        transport = httpx2.ASGITransport(app=self.app, client=client)
        return httpx2.AsyncClient(transport=transport, base_url="http://inn")

    def put_file(self, room_instance: UUID, path: str, data: bytes) -> None:
        """A file in the scripted guest of an instance's public id."""
        entry = self.world.control.live.by_public_id(room_instance)
        assert entry is not None
        self.world.host.files[entry.instance.id, path] = data

    async def make_room(self, name: str = "r") -> dict[str, Any]:
        answer = await self.client.post(f"{self.profile}/room/{name}")
        assert answer.status_code == 200, answer.text
        made: dict[str, Any] = answer.json()
        return made


@pytest.fixture(scope="session")
def document() -> dict[str, Any]:
    """The OpenAPI document, once somebody has asked for it: making it takes longer than most tests, and it is the same for all."""
    return {}


@pytest.fixture
async def api(tmp_path: Path, document: dict[str, Any]) -> AsyncIterator[Api]:
    world = World(tmp_path)
    async with world.running() as control:
        world.control = control
        token = world.first_token
        assert token is not None
        app = build_app(control)
        transport = httpx2.ASGITransport(app=app, client=("192.0.2.9", 4321))
        headers = {"Authorization": f"Bearer {token}"}
        async with httpx2.AsyncClient(transport=transport, base_url="http://inn", headers=headers) as client:
            if not document:
                document.update((await client.get("/openapi.json")).json())
            yield Api(app, world, client, token, world.profile_id("base"), document)
