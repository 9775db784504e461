"""A published port, from a client's socket to a server that stands for the guest's: the real server, application, control side and bus."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.scripted_host import World

from innkeeper.api import server
from innkeeper.api.app import build_app
from innkeeper.api.connections import HttpLimits
from innkeeper.control import rooms, shares
from innkeeper.control.context import Control
from innkeeper.control.live_table import Entry
from innkeeper.core.share import Share
from innkeeper.core.token import Principal

GUEST_PORT = 8000
Guest = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def read_head(reader: asyncio.StreamReader) -> bytes:
    """A request's head with its empty line."""
    return await reader.readuntil(b"\r\n\r\n")


class Endless:
    """A guest that writes as long as somebody takes it: `sent` bytes until it is `over`."""

    def __init__(self) -> None:
        self.sent = 0
        self.over = asyncio.Event()

    async def __call__(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                writer.write(bytes(65_536))
                await writer.drain()
                self.sent += 65_536
        finally:
            self.over.set()


class Published:
    """One share and what is behind it. `heads` are the request heads that the guest got; `guest` decides what it answers."""

    def __init__(self, world: World, control: Control, entry: Entry, share: Share, port: int) -> None:
        self.world = world
        self.control = control
        self.entry = entry
        self.share = share
        self.port = port
        self.heads: list[bytes] = []
        self.guest: Guest = self.hello

    @property
    def host(self) -> str:
        return f"{self.share.name}.localhost:{self.port}"

    @property
    def token(self) -> str:
        assert self.world.first_token is not None
        return self.world.first_token

    @property
    def me(self) -> Principal:
        return self.world.me

    async def hello(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """An honest server's answer."""
        self.heads.append(await read_head(reader))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Type: text/plain\r\n\r\nhello")

    def answering(self, answer: bytes) -> None:
        """From now on the guest answers this, whatever is asked, and closes."""

        async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.heads.append(await read_head(reader))
            writer.write(answer)

        self.guest = guest

    async def serve_guest(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self.guest(reader, writer)
                await writer.drain()
        finally:
            writer.close()

    def fresh(self) -> None:
        """As if nothing had been asked yet."""
        self.heads = []
        self.guest = self.hello

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A client's connection."""
        return await asyncio.open_connection("127.0.0.1", self.port)

    def request(self, line: str = "GET / HTTP/1.1", *fields: str, host: str | None = None) -> bytes:
        """A request's head, with the share's Host."""
        return "\r\n".join([line, f"Host: {host or self.host}", *fields, "", ""]).encode("latin-1")

    async def ask(
        self, line: str = "GET / HTTP/1.1", *fields: str, body: bytes = b"", host: str | None = None
    ) -> bytes:
        """All that one request brings, until the server closes."""
        return await self.raw(self.request(line, *fields, "Connection: close", host=host) + body)

    async def raw(self, data: bytes, *, address: str = "127.0.0.1") -> bytes:
        """All that these bytes bring, until the server closes; `address` is the client's."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(address, 0))
        try:
            writer.write(data)
            async with asyncio.timeout(20):
                return await reader.read()
        finally:
            writer.close()


@asynccontextmanager
async def published(folder: Path, *, is_public: bool = True, **settings: Any) -> AsyncIterator[Published]:
    """A share of a scripted guest, served over a real socket."""
    world = World(folder)
    tcp = socket.create_server(("127.0.0.1", 0))
    tcp.setblocking(False)
    stop = asyncio.Event()
    async with world.running(**settings) as control, asyncio.TaskGroup() as tasks:
        world.control = control
        principal = world.me
        entry = await rooms.ready_entry(control, principal, world.profile_id("base"), "r")
        share = await shares.create(control, principal, entry, GUEST_PORT, is_public=is_public)
        made = Published(world, control, entry, share, tcp.getsockname()[1])
        guest = await asyncio.start_server(made.serve_guest, "127.0.0.1", 0)
        world.host.ports.servers[GUEST_PORT] = guest.sockets[0].getsockname()[1]
        limits = HttpLimits.of(control.settings)
        serving = tasks.create_task(
            server.serve(build_app(control), [tcp], stop=stop, graceful_seconds=1, limits=limits)
        )
        try:
            yield made
        finally:
            stop.set()
            await serving
            guest.close()


@pytest.fixture(scope="module")
async def public_port(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Published]:
    async with published(tmp_path_factory.mktemp("published")) as made:
        yield made


@pytest.fixture
def port(public_port: Published) -> Published:
    """A public share, of which the tests of a module have one between them."""
    public_port.fresh()
    return public_port


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"
