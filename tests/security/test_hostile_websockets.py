"""Hostile clients of WebSockets, byte by byte over real sockets: those of terminals, which end here, and those of published ports, which a guest answers.

The real server, application and control side; the host follows a script, whose terminals echo what is typed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.published_port import Endless, Published, anyio_backend, published, read_head
from tests.security.neighbour import GROWTH_MIB, proportional_mib

__all__ = ["anyio_backend"]
pytestmark = pytest.mark.anyio

# What the servers give a client for an answer that it does not take, and the impatient one for a head.
CLIENT_SECONDS = 1
POUR_SECONDS = 1.5
MAX_CONNECTIONS = 150
PATIENCE_SECONDS = 30
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
GOOD = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": b64encode(bytes(16)).decode(),
}


@asynccontextmanager
async def terminal_and_share(folder: Path, *, head_seconds: float) -> AsyncIterator[Published]:
    limits = {"head_timeout_seconds": head_seconds, "client_timeout_seconds": CLIENT_SECONDS}
    async with published(folder, max_connections=MAX_CONNECTIONS, **limits) as made:
        made.world.host.terminals.add(made.entry.instance.id, "t")
        yield made


@pytest.fixture(scope="module")
async def served(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Published]:
    """A terminal `t` and a public share of one room, behind a server that is soon tired of clients who take nothing.

    For heads it has more patience than a test takes: both ends are in this process, and where that waits for its processor for a second between
    connecting and sending, an honest client would have been too slow.
    """
    folder = tmp_path_factory.mktemp("websockets")
    async with terminal_and_share(folder, head_seconds=4 * PATIENCE_SECONDS) as made:
        yield made


@pytest.fixture
async def impatient(anyio_backend: str, tmp_path: Path) -> AsyncIterator[Published]:
    """Likewise, and soon tired of those who do not say what they want."""
    async with terminal_and_share(tmp_path, head_seconds=CLIENT_SECONDS) as made:
        yield made


@dataclass
class Client:
    """Whoever it is at the other end."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def head(self) -> bytes:
        """The head of the answer; empty when there was none."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            try:
                return await self.reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                return b""

    async def status(self) -> int:
        """That of the answer; 0 when there was none."""
        head = await self.head()
        return int(head[9:12]) if head else 0

    def send(self, opcode: int, payload: bytes = b"", *, first: int = 0x80, length: bytes | None = None) -> None:
        """A frame, masked with zeros; `first` are the bits beside the opcode, `length` replaces the right one."""
        if length is None:
            size = len(payload)
            length = (
                bytes([0x80 | size])
                if size < 126
                else b"\xfe" + struct.pack("!H", size)
                if size < 65_536
                else b"\xff" + struct.pack("!Q", size)
            )
        self.writer.write(bytes([first | opcode]) + length + bytes(4) + payload)

    async def frame(self) -> tuple[int, bytes] | None:
        """The next frame of the server: opcode and payload; None when it has closed the connection."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            try:
                first, size = await self.reader.readexactly(2)
                if size >= 126:
                    size = int.from_bytes(await self.reader.readexactly(2 if size == 126 else 8), "big")
                return first & 0x0F, await self.reader.readexactly(size)
            except (asyncio.IncompleteReadError, ConnectionError):
                return None

    async def closed(self) -> int:
        """The code with which the server closes, and then ends the connection; 0 without one."""
        code = 0
        while (frame := await self.frame()) is not None:
            if frame[0] == CLOSE:
                code = int.from_bytes(frame[1][:2], "big")
                # As a client answers that goes on with the protocol.
                self.send(CLOSE, frame[1][:2])
        return code

    async def gone(self) -> None:
        """Wait until the server has ended the connection, whatever it still says."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            with contextlib.suppress(ConnectionError):
                while await self.reader.read(1 << 16):
                    pass


@asynccontextmanager
async def dialled(served: Published) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


def upgrade(
    served: Published, *, method: str = "GET", version: str = "1.1", query: str = "", **fields: str | None
) -> bytes:
    """The head of a request for the terminal's WebSocket; a field that is None is left out."""
    lines = {"Host": f"127.0.0.1:{served.port}", "X-API-Key": served.token, **GOOD}
    lines |= {name.replace("_", "-"): value for name, value in fields.items()}
    path = f"/v1/rooms/{served.entry.instance.public_id}/pty/t/connect{query}"
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    return f"{method} {path} HTTP/{version}\r\n{text}\r\n".encode("latin-1")


@asynccontextmanager
async def opened(served: Published, *, query: str = "", **fields: str | None) -> AsyncIterator[Client]:
    """A terminal's WebSocket."""
    async with dialled(served) as client:
        client.writer.write(upgrade(served, query=query, **fields))
        head = await client.head()
        assert head.startswith(b"HTTP/1.1 101 "), head
        yield client


async def works(served: Published) -> None:
    """Others are served: a terminal echoes, a share answers."""
    async with opened(served) as client:
        client.send(BINARY, b"echo")
        assert await client.frame() == (BINARY, b"echo")
    served.fresh()
    assert b"hello" in await served.ask()


@asynccontextmanager
async def suffering(served: Published) -> AsyncIterator[None]:
    """Others are served while the block runs and after it, and this process, which is both ends, stays small."""
    before = most = proportional_mib()
    rounds = 0

    async def live() -> None:
        nonlocal most, rounds
        while True:
            await works(served)
            most, rounds = max(most, proportional_mib()), rounds + 1

    living = asyncio.create_task(live())
    try:
        yield
        reached = rounds
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not living.done() and rounds <= reached + 1:
                await asyncio.sleep(0.02)
    finally:
        living.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await living
    print(f"grew by {most - before:.1f} MiB, others were served {rounds} times")
    assert most - before < GROWTH_MIB


# --- handshakes --------------------------------------------------------------------------------------------------------

HANDSHAKES = {
    "no key": ({"Sec_WebSocket_Key": None}, 426),
    "a short key": ({"Sec_WebSocket_Key": b64encode(bytes(15)).decode()}, 426),
    "a long key": ({"Sec_WebSocket_Key": b64encode(bytes(17)).decode()}, 426),
    "a key that is none": ({"Sec_WebSocket_Key": "!" * 24}, 426),
    "two keys": ({"Sec_WebSocket_Key": "x\r\nSec-WebSocket-Key: y"}, 426),
    "no version": ({"Sec_WebSocket_Version": None}, 426),
    "an old version": ({"Sec_WebSocket_Version": "8"}, 426),
    "a version that is none": ({"Sec_WebSocket_Version": "13, 13"}, 426),
    "something else": ({"Upgrade": "h2c"}, 426),
    "no upgrade": ({"Upgrade": None}, 426),
    "no connection": ({"Connection": "close"}, 426),
    "another method": ({"method": "POST"}, 405),
    "another HTTP": ({"version": "1.0"}, 426),
    "a body": ({"Content_Length": "5"}, 400),
    "chunks": ({"Transfer_Encoding": "chunked"}, 400),
    "a giant field": ({"X_A": "a" * 600_000}, 431),
    "giant extensions": ({"Sec_WebSocket_Extensions": "permessage-deflate; " * 30_000}, 431),
    "a giant key": ({"Sec_WebSocket_Key": "A" * 600_000}, 431),
    "a bad field": ({"X_A": "\0"}, 400),
    "a folded field": ({"X_A": "b\r\n c"}, 400),
}  # fmt: skip


@pytest.mark.parametrize("name", HANDSHAKES)
async def test_a_handshake_that_is_none_opens_nothing(served: Published, name: str) -> None:
    fields, status = HANDSHAKES[name]
    async with dialled(served) as client:
        client.writer.write(upgrade(served, **fields))
        assert await client.status() == status
    await works(served)


@pytest.mark.parametrize(
    "extensions",
    ["permessage-deflate", "permessage-deflate; client_max_window_bits", "x-webkit-deflate-frame", ",;=\x7f"],
)
async def test_nothing_is_ever_decompressed(served: Published, extensions: str) -> None:
    """No extension is agreed to, so that a compressed frame, a bomb or not, is a broken rule."""
    async with dialled(served) as client:
        client.writer.write(upgrade(served, Sec_WebSocket_Extensions=extensions, Sec_WebSocket_Protocol="a, b"))
        head = (await client.head()).lower()
        if not head.startswith(b"http/1.1 101"):
            assert head.startswith((b"http/1.1 400", b"http/1.1 426"))
            return
        assert b"websocket-extensions" not in head and b"websocket-protocol" not in head
        client.send(BINARY, b"\xf2\x48\xcd\xc9\xc9\x07\x00", first=0xC0)
        assert await client.closed() == 1002


async def test_a_handshake_in_single_bytes_is_one(served: Published) -> None:
    async with dialled(served) as slow:
        for byte in upgrade(served):
            slow.writer.write(bytes([byte]))
            await slow.writer.drain()
            await asyncio.sleep(0)
        assert await slow.status() == 101


async def test_a_handshake_without_an_end_is_none(impatient: Published) -> None:
    async with dialled(impatient) as endless, dialled(impatient) as silent:
        endless.writer.write(upgrade(impatient)[:-2])
        silent.writer.write(b"G")
        for client in (endless, silent):
            assert await client.status() in (0, 408)


async def test_who_asks_from_elsewhere_needs_the_key_all_the_same(served: Published) -> None:
    """A page of another origin has no key, and nothing that its browser sends by itself is one."""
    cookies = f"inn_share={served.token}; api_key={served.token}; token={served.token}"
    for fields in ({"Origin": "https://evil.example"}, {"Origin": "null", "Cookie": cookies}, {"Cookie": cookies}):
        async with dialled(served) as client:
            client.writer.write(upgrade(served, X_API_Key=None, **fields))
            assert await client.status() == 101
            assert await client.closed() == 4401


async def test_a_key_in_the_query_is_nowhere_else(served: Published, capfd: pytest.CaptureFixture[str]) -> None:
    said = b""
    keys = [served.token, "rk_live_" + "7" * 32]
    for key in keys:
        query = f"?api_key={key}"
        for wrong in ({}, {"Upgrade": None}, {"method": "POST"}, {"version": "1.0"}, {"Content_Length": "5"}):
            for more in ("", "&offset=x", f"&api_key={key}"):
                async with dialled(served) as client:
                    client.writer.write(upgrade(served, query=query + more, **{"X_API_Key": None, **wrong}))
                    client.writer.write_eof()
                    async with asyncio.timeout(PATIENCE_SECONDS):
                        with contextlib.suppress(ConnectionError):
                            said += await client.reader.read()
        # Where there is no such terminal, room or endpoint.
        for path in (
            "/v1/rooms/x/pty/t/connect",
            f"/v1/rooms/{served.entry.instance.public_id}/pty/nosuch/connect",
            "/v1/nosuch",
        ):
            said += await served.raw(f"GET {path}{query} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    captured = capfd.readouterr()
    logged = captured.out + captured.err
    assert "/pty/{pid}/connect" in logged, "requests are logged at all"
    # Whoever hangs up at once is no failure, whose traceback would be told.
    assert "api_key" not in logged and "request failed" not in logged
    for key in keys:
        assert key not in logged and key.encode() not in said


# --- frames ------------------------------------------------------------------------------------------------------------

Attack = Callable[[Client], None]


def raw(data: bytes) -> Attack:
    return lambda client: client.writer.write(data)


def frame(opcode: int, payload: bytes = b"", *, first: int = 0x80, length: bytes | None = None) -> Attack:
    return lambda client: client.send(opcode, payload, first=first, length=length)


def frames(*attacks: Attack) -> Attack:
    def every(client: Client) -> None:
        for attack in attacks:
            attack(client)

    return every


def order(text: str) -> Attack:
    return frame(TEXT, text.encode("utf-8", "surrogatepass"))


def resize(cols: str, rows: str = "24") -> Attack:
    return order(f'{{"type": "resize", "cols": {cols}, "rows": {rows}}}')


SIZES = ["-1", "0", "1000000000", "1e9", "1e999", "NaN", "80.5", '"80"', "true", "null", "[]", "{}", str(10**400)]
ATTACKS: dict[str, tuple[Attack, int]] = {
    "no mask": (raw(b"\x82\x01x"), 1002),
    **{f"reserved bit {bit:#x}": (frame(BINARY, b"x", first=0x80 | bit), 1002) for bit in (0x10, 0x20, 0x40)},
    **{f"reserved opcode {opcode}": (frame(opcode, b"x"), 1002) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    "a long ping": (frame(PING, bytes(126)), 1002),
    "a ping of many bytes": (frame(PING, length=b"\xff" + struct.pack("!Q", 1 << 40)), 1009),
    "a ping in pieces": (frame(PING, b"x", first=0), 1002),
    "a close in pieces": (frame(CLOSE, b"\x03\xe8", first=0), 1002),
    "the end of nothing": (frame(0, b"x"), 1002),
    "a message within a message": (frames(frame(BINARY, b"x", first=0), frame(BINARY, b"y")), 1002),
    "a length of 2**63": (frame(BINARY, length=b"\xff" + struct.pack("!Q", 1 << 63)), 1009),
    "a length and nothing after": (raw(b"\x82\xff" + struct.pack("!Q", 1 << 62)), 1009),
    "a message one byte too long": (frame(BINARY, bytes(262_145)), 1009),
    "pieces that are too long together": (frames(*[frame(BINARY, bytes(200_000), first=0), frame(0, bytes(200_000))]), 1009),
    "pieces without end": (frames(frame(BINARY, b"x", first=0), *[frame(0, b"x", first=0)] * 1_000), 1009),
    "empty pieces without end": (frames(frame(TEXT, b"", first=0), *[frame(0, b"", first=0)] * 1_000), 1009),
    "half a close": (frame(CLOSE, b"\x03"), 1002),
    **{f"a close with {code}": (frame(CLOSE, struct.pack("!H", code)), 1002) for code in (0, 999, 1004, 1005, 1006, 1015, 2999, 5000)},
    "a close that is no text": (frame(CLOSE, b"\x03\xe8\xff"), 1007),
    "text that is none": (frame(TEXT, b'{"type": "\xff"}'), 1007),
    "half a letter": (frames(frame(TEXT, b"\xc3", first=0), frame(0, b"")), 1007),
    "a surrogate": (order('"\ud800"'), 1007),
    "no JSON": (order("resize"), 4400),
    "no object": (order('[{"type": "resize"}]'), 4400),
    "an empty text": (order(""), 4400),
    "deep": (order("[" * 200_000), 4400),
    "deep within": (order('{"type": ' + '{"a":' * 40_000), 4400),
    "a long number": (resize("1" * 100_000), 4400),
    **{f"resize to {size}": (resize(size), 4400) for size in SIZES},
    "resize to no rows": (order('{"type": "resize", "cols": 80}'), 4400),
    "rows that are none": (resize("80", "-1"), 4400),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
async def test_what_breaks_the_rules_is_told_so_and_ends(served: Published, name: str) -> None:
    attack, code = ATTACKS[name]
    resized = len(served.world.host.asked)
    async with opened(served) as client, opened(served) as other:
        attack(client)
        assert await client.closed() == code
        # Whoever looks at the same terminal goes on.
        other.send(BINARY, b"still")
        assert await other.frame() == (BINARY, b"still")
    asked = served.world.host.asked[resized:]
    assert not [one for one in asked if type(one).__name__ == "ResizeTerminal"]


async def test_orders_of_a_newer_client_change_nothing(served: Published) -> None:
    async with opened(served) as client:
        for text in (
            '{"type": "owned"}',
            '{"type": 7}',
            '{"type": ["resize"]}',
            "{}",
            '{"type": "resize", "type": "x"}',
        ):
            order(text)(client)
        client.send(BINARY, b"still")
        assert await client.frame() == (BINARY, b"still")


# --- floods ------------------------------------------------------------------------------------------------------------


async def pour(client: Client, piece: bytes, *, total: int) -> int:
    """Send until the server takes no more or has enough; how much it took."""
    sent = 0
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(POUR_SECONDS):
            while sent < total:
                client.writer.write(piece)
                await client.writer.drain()
                sent += len(piece)
    return sent


def unread(client: Client) -> None:
    """The client reads nothing any more, and asyncio does not for it."""
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]


PINGS = (bytes([0x80 | PING, 0xFD]) + bytes(4) + bytes(125)) * 500
MESSAGES = (bytes([0x80 | BINARY, 0xFE]) + struct.pack("!H", 60_000) + bytes(4) + bytes(60_000)) * 4
EMPTIES = (bytes([0x80 | BINARY, 0x80]) + bytes(4)) * 10_000
FLOODS = {"pings": PINGS, "messages": MESSAGES}


@pytest.mark.parametrize("name", FLOODS)
async def test_a_flood_by_one_who_never_reads_is_held_up_and_ended(served: Published, name: str) -> None:
    """Pongs, and the echo of what is typed, wait for the client, and with them its next frames."""
    async with suffering(served), opened(served) as client:
        unread(client)
        took = await pour(client, FLOODS[name], total=1 << 30)
    print(f"{name}: {took >> 10} KiB taken")
    assert took < 32 << 20


async def test_a_flood_of_empty_messages_holds_up_nobody(served: Published) -> None:
    async with suffering(served), opened(served) as client:
        await pour(client, EMPTIES, total=1 << 18)
        client.send(BINARY, b"still")
        assert await client.frame() == (BINARY, b"still")


async def test_many_that_are_opened_and_left(served: Published) -> None:
    async with suffering(served), contextlib.AsyncExitStack() as stack:
        for _ in range(50):
            client = await stack.enter_async_context(opened(served))
            # Half a frame, and then nothing.
            client.writer.write(b"\x82\xfe\xff")


async def test_half_open_handshakes_make_way(served: Published) -> None:
    """More than the server may have: the oldest go, and those who come are served."""
    async with suffering(served), contextlib.AsyncExitStack() as stack:
        half = upgrade(served)[:-4]
        for _ in range(2 * MAX_CONNECTIONS):
            client = await stack.enter_async_context(dialled(served))
            client.writer.write(half)
        await works(served)


# --- published ports -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def tunnel(
    served: Published, guest: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> AsyncIterator[Client]:
    """A WebSocket of a published port, whose guest does as told once it has agreed."""

    async def agree(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await read_head(reader)
        if b"upgrade: websocket" not in head.lower():
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
            return
        writer.write(b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n")
        await guest(reader, writer)

    served.guest = agree
    try:
        async with dialled(served) as client:
            client.writer.write(served.request("GET / HTTP/1.1", *(f"{name}: {value}" for name, value in GOOD.items())))
            assert await client.status() == 101
            yield client
    finally:
        served.fresh()


async def test_a_guest_that_never_stops_and_a_client_that_never_reads(served: Published) -> None:
    endless = Endless()
    before = proportional_mib()
    async with tunnel(served, endless) as client:
        unread(client)
        async with asyncio.timeout(PATIENCE_SECONDS):
            # The client takes nothing for too long, and the guest is told.
            await endless.over.wait()
    assert endless.sent < 32 << 20 and proportional_mib() - before < GROWTH_MIB
    await works(served)


async def test_a_client_that_never_stops_and_a_guest_that_never_reads(served: Published) -> None:
    over = asyncio.Event()

    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()

    before = proportional_mib()
    async with tunnel(served, guest) as client:
        took = await pour(client, os.urandom(65_536), total=1 << 30)
        over.set()
    assert took < 32 << 20 and proportional_mib() - before < GROWTH_MIB
    await works(served)


async def test_what_is_sent_before_the_guest_agrees_waits_within_bounds(served: Published) -> None:
    over = asyncio.Event()
    got = bytearray()

    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        await over.wait()
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            got.extend(await reader.read(1 << 20))
        writer.write(b"HTTP/1.1 403 F\r\nContent-Length: 0\r\n\r\n")

    served.guest = guest
    async with dialled(served) as client:
        client.writer.write(served.request("GET / HTTP/1.1", *(f"{name}: {value}" for name, value in GOOD.items())))
        took = await pour(client, bytes(65_536), total=1 << 30)
        over.set()
    # It is for the one who agreed to it.
    assert not got and took < 32 << 20
    served.fresh()
    await works(served)
