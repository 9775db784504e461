"""Clients that are slow, silent, endless, many, or no clients at all, against a real server: its memory is bounded and others are served meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from server_fixture import Room, Server, server
from tests.integration.daemon_fixture import NEEDS_RUNSC
from tests.security.neighbour import ATTEMPTS, GROWTH_MIB, Side, median_seconds, proportional_mib

pytestmark = [pytest.mark.anyio, pytest.mark.alone, NEEDS_RUNSC]

CLIENT_SECONDS = 4
MANY_CONNECTIONS = 10_000
MAX_CONNECTIONS = 1_500
# An idle connection costs its transport, its parser and this file's own objects in the API process; nothing in the daemon.
CONNECTION_KIB = 24
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture(scope="module")
def innkeeper() -> Iterator[Server]:
    settings = {
        "INNKEEPER_CLIENT_TIMEOUT_SECONDS": str(CLIENT_SECONDS),
        "INNKEEPER_HEAD_TIMEOUT_SECONDS": str(CLIENT_SECONDS),
        "INNKEEPER_MAX_CONNECTIONS": str(MAX_CONNECTIONS),
    }
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with server("base", **settings) as running:
        yield running
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def room(innkeeper: Server) -> Room:
    """The neighbour: a room that works while others misbehave."""
    api = innkeeper.api()
    made = api.room(api.make_profile(memory_mb=512, vcpu_count=1))
    made.create()
    return made


@pytest.fixture(scope="module")
def victim(innkeeper: Server) -> Room:
    """The room that the hostile clients use, with a file of 64 MiB."""
    api = innkeeper.api()
    made = api.room(api.make_profile(memory_mb=512, vcpu_count=1))
    made.output("head -c 67108864 /dev/zero > /home/user/big")
    return made


class Ordeal:
    """What both processes grew by at most, and the neighbour's commands, quiet and under attack."""

    def __init__(self, innkeeper: Server, room: Room, name: str) -> None:
        assert innkeeper.process is not None
        self.pids = {"daemon": innkeeper.process.pid, "api": innkeeper.api_pid()}
        self.before = {name: proportional_mib(pid) for name, pid in self.pids.items()}
        self.most = dict(self.before)
        self.side = Side(name)
        self.room = room

    async def neighbour(self, *, seconds: float) -> float:
        return await median_seconds(lambda: asyncio.to_thread(self.room.run, "true"), seconds=seconds)

    async def watch(self) -> None:
        while True:
            for name, pid in self.pids.items():
                self.most[name] = max(self.most[name], proportional_mib(pid))
            await asyncio.sleep(0.1)

    def grown(self, name: str) -> float:
        return self.most[name] - self.before[name]

    def __str__(self) -> str:
        return f"{self.side}; daemon grew by {self.grown('daemon'):.1f} MiB, API process by {self.grown('api'):.1f} MiB"


@asynccontextmanager
async def ordeal(
    innkeeper: Server, room: Room, name: str, *, growth: float = GROWTH_MIB, seconds: float = 1.0
) -> AsyncIterator[Ordeal]:
    """Around an attack that goes on in tasks of the block: the neighbour works at its end, and memory was bounded throughout."""
    found = Ordeal(innkeeper, room, name)
    watching = asyncio.create_task(found.watch())
    try:
        found.side.quiet.append(await found.neighbour(seconds=seconds / 2))
        yield found
        for attempt in range(ATTEMPTS):
            if attempt:
                found.side.quiet.append(found.side.quiet[0])
            found.side.attacked.append(await found.neighbour(seconds=seconds))
            if found.side.fine():
                break
    finally:
        watching.cancel()
        print(found)
    assert found.side.fine(), str(found)
    assert found.grown("api") < growth, str(found)
    assert found.grown("daemon") < GROWTH_MIB, str(found)


class Dialler:
    """Opens connections to a server and leaves none behind."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._made: list[Streams] = []

    async def __call__(self, data: bytes = b"") -> Streams:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._made.append((reader, writer))
        writer.write(data)
        return reader, writer

    async def close(self) -> None:
        await hang_up(*self._made)


@pytest.fixture
async def connect(innkeeper: Server) -> AsyncIterator[Dialler]:
    dialler = Dialler(innkeeper.port)
    yield dialler
    await dialler.close()


async def hang_up(*connections: Streams) -> None:
    for _, writer in connections:
        writer.transport.abort()
    await asyncio.sleep(0)


def head(innkeeper: Server, method: str, path: str, **headers: str) -> bytes:
    lines = {"Host": "x", "Authorization": f"Bearer {innkeeper.token}", **headers}
    text = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{text}\r\n".encode()


async def answer(connection: Streams) -> tuple[int, bytes]:
    """Status and body of what came until the server closed; status 0 for nothing."""
    said = b""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(60):
            said = await connection[0].read()
    await hang_up(connection)
    top, _, body = said.partition(b"\r\n\r\n")
    return (int(top.split(b" ")[1]) if top else 0), body


async def pour(connection: Streams, piece: bytes, *, total: int) -> int:
    """Send until the server has enough; how much it took."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < total:
            connection[1].write(piece)
            await connection[1].drain()
            sent += len(piece)
    return sent


# --- many ------------------------------------------------------------------------------------------------------------


async def idle_connections(innkeeper: Server, connect: Dialler, room: Room, count: int) -> None:
    bound = MAX_CONNECTIONS * CONNECTION_KIB / 1024 + 10
    async with ordeal(innkeeper, room, f"{count} idle connections", growth=bound):
        for _ in range(count // 250):
            await asyncio.gather(*(connect() for _ in range(250)))
        # New clients are served all the same: connections that are idle longest go for them.
        assert innkeeper.client().get("/api/profiles").status_code == 200


async def test_idle_connections(innkeeper: Server, connect: Dialler, room: Room) -> None:
    await idle_connections(innkeeper, connect, room, 2_000)


@pytest.mark.long
async def test_ten_thousand_idle_connections(innkeeper: Server, connect: Dialler, room: Room) -> None:
    await idle_connections(innkeeper, connect, room, MANY_CONNECTIONS)


async def readers_of_a_stream(innkeeper: Server, connect: Dialler, room: Room, victim: Room, count: int) -> None:
    body = json.dumps({"command": "yes", "timeout": 12}).encode()
    request = head(
        innkeeper,
        "POST",
        f"{victim.path}/command",
        Accept="text/event-stream",
        Content_Type="application/json",
        Content_Length=str(len(body)),
    )
    async with ordeal(innkeeper, room, f"{count} streams that nobody reads", growth=GROWTH_MIB + count * 0.75):
        readers = [await connect(request + body) for _ in range(count)]
        for reader, _ in readers:
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            # asyncio would read on for us.
            reader._transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(1)


async def test_streams_that_nobody_reads(innkeeper: Server, connect: Dialler, room: Room, victim: Room) -> None:
    await readers_of_a_stream(innkeeper, connect, room, victim, 8)


async def test_downloads_that_nobody_reads_end(innkeeper: Server, connect: Dialler, room: Room, victim: Room) -> None:
    request = head(innkeeper, "GET", f"{victim.path}/file/home/user/big?raw=1")
    async with ordeal(innkeeper, room, "20 downloads that nobody reads"):
        readers = [await connect(request) for _ in range(20)]
        for reader, _ in readers[:10]:
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        for reader, _ in readers:
            reader._transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(0.5)
    # They are given up, so that their turns go to others: a transfer of the same room succeeds.
    got = await asyncio.to_thread(victim.file, "/home/user/big", raw=1)
    assert got.status_code == 200 and len(got.content) == 64 << 20


async def test_uploads_side_by_side(innkeeper: Server, room: Room, victim: Room) -> None:
    content = os.urandom(4 << 20)
    async with ordeal(innkeeper, room, "32 uploads of 4 MiB"):
        putting = asyncio.gather(
            *(asyncio.to_thread(victim.put, f"/home/user/up{number}", content) for number in range(32))
        )
    assert {made.status_code for made in await putting} <= {200, 201}
    assert victim.output("cat /home/user/up* | wc -c; rm /home/user/up*") == str(32 * len(content))


# --- slow ------------------------------------------------------------------------------------------------------------


async def test_slow_heads_and_slow_bodies_end(innkeeper: Server, connect: Dialler, room: Room, victim: Room) -> None:
    post = head(
        innkeeper, "POST", f"{victim.path}/command", Content_Type="application/json", Content_Length="1000"
    )  # fmt: skip
    put = head(innkeeper, "PUT", f"{victim.path}/file/tmp/never", Content_Length="1000000")
    async with ordeal(innkeeper, room, "300 slow heads, 100 slow bodies, 100 silent uploads"):
        heads = [await connect(b"GET /api/profiles HTTP/1.1\r\nX-A: ") for _ in range(300)]
        bodies = [await connect(post + b"{") for _ in range(100)]
        uploads = [await connect(put + b"x") for _ in range(100)]

        async def trickle() -> None:
            while True:
                await asyncio.sleep(0.5)
                for _, writer in (*heads, *bodies):
                    if not writer.transport.is_closing():
                        writer.write(b" ")

        trickling = asyncio.create_task(trickle())
    ended = await asyncio.gather(*(answer(one) for one in (*heads, *bodies, *uploads)))
    trickling.cancel()
    assert {status for status, _ in ended[:300]} == {0}
    assert {status for status, _ in ended[300:400]} == {400}
    # Those that had their turn were told what was wrong; the others waited for one in vain, or were told the same.
    assert {status for status, _ in ended[400:]} <= {400, 503}
    assert json.loads(ended[300][1])["error"] == "invalid_request"
    assert victim.run("ls /tmp/never")["result"]["exit_code"] != 0


# --- endless ---------------------------------------------------------------------------------------------------------


async def test_endless_requests_end(innkeeper: Server, connect: Dialler, room: Room, victim: Room) -> None:
    command = f"{victim.path}/command"
    chunked = {"Content_Type": "application/json", "Transfer_Encoding": "chunked"}
    endless = {
        "header": (b"GET / HTTP/1.1\r\nX-A: ", b"a" * 65_536, 431),
        "headers": (b"GET / HTTP/1.1\r\n", b"X-A: b\r\n" * 8_192, 431),
        "body": (
            head(innkeeper, "POST", command, Content_Type="application/json", Content_Length=str(1 << 30)),
            b"x" * 65_536,
            413,
        ),
        "chunks": (head(innkeeper, "POST", command, **chunked), b"10000\r\n" + b" " * 65_536 + b"\r\n", 413),
        "trailers": (head(innkeeper, "POST", command, **chunked) + b"1\r\n{\r\n0\r\n", b"X-A: b\r\n" * 8_192, 431),
        "unwanted": (b"POST /api/profiles HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n", bytes(65_536), 401),
        "pipeline": (b"", b"GET /api/profiles HTTP/1.1\r\nHost: x\r\n\r\n" * 2_000, None),
    }  # fmt: skip

    async def send_all() -> None:
        for name, (first, again, status) in endless.items():
            one = await connect(first)
            took = await pour(one, again, total=1 << 30)
            said, _ = await answer(one)
            # A reset may overtake the answer where the client goes on sending.
            assert status is None or said in (status, 0), name
            assert took < 64 << 20, (name, took)

    async with ordeal(innkeeper, room, "a gigabyte each of headers, bodies, chunks, trailers, pipelined requests"):
        sending = asyncio.create_task(send_all())
    await sending


async def test_an_endless_upload_ends_at_the_guests_disk(innkeeper: Server, connect: Dialler, room: Room) -> None:
    api = innkeeper.api()
    small = api.room(api.make_profile(disk_mb=1024))
    small.create()
    chunked = head(innkeeper, "PUT", f"{small.path}/file/home/user/endless", Transfer_Encoding="chunked")
    one = await connect(chunked)
    async with ordeal(innkeeper, room, "an upload without end"):
        pouring = asyncio.create_task(pour(one, b"100000\r\n" + bytes(1 << 20) + b"\r\n", total=3 << 30))
    took = await pouring
    said, body = await answer(one)
    print(f"refused with {said} after {took >> 20} MiB")
    assert said in (409, 413, 0), (said, body)
    assert took < 2 << 30
    assert small.output("ls -A /home/user | grep -c endless || true") == "0"
    small.delete()


# --- no clients at all -----------------------------------------------------------------------------------------------


async def test_what_is_not_http_is_refused(innkeeper: Server, connect: Dialler, room: Room) -> None:
    async with ordeal(innkeeper, room, "300 connections of noise"):
        noise = [await connect(os.urandom(200) + b"\r\n\r\n") for _ in range(300)]
        hearing = asyncio.gather(*(answer(one) for one in noise))
    assert {said for said, _ in await hearing} <= {0, 400, 431}
    assert "internal_error" not in innkeeper.log()


async def test_a_compressed_bomb_is_only_bytes(innkeeper: Server, victim: Room) -> None:
    bomb = gzip.compress(b'{"command": "' + b" " * (64 << 20) + b'"}')
    said = victim.client.post(
        f"{victim.path}/command",
        content=bomb,
        headers={"Content-Type": "application/json", "Content-Encoding": "gzip"},
    )
    assert said.status_code == 400
    assert said.json()["error"] == "invalid_request"
