"""WebSockets on real sockets: what a client may send, and what becomes of one that is silent."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.unit.api.test_server import serving
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

from innkeeper.api import websocket
from innkeeper.api.websocket import WebSocketClosedError, WebSocketOffer


async def echo(scope: Any, receive: Any, send: Any) -> None:
    offer = WebSocketOffer.of(scope)
    assert offer is not None
    async with offer.accept() as socket:
        async for message in socket.messages():
            await socket.send(message)


def client(port: int) -> Any:
    return connect(f"ws://127.0.0.1:{port}/", compression=None, ping_interval=None, max_size=None, proxy=None)


def test_messages_come_back(tmp_path: Path) -> None:
    async def scenario(port: int, _: Path) -> None:
        async with client(port) as socket:
            for message in (b"\0\xff", "text é", b"x" * websocket.MESSAGE_MAX_BYTES):
                await socket.send(message)
                assert await socket.recv() == message
            await socket.send(["in ", "three ", "parts"])
            assert await socket.recv() == "in three parts"
            for _ in range(2_000):
                await socket.ping()
            await (await socket.ping())

    serving(tmp_path, scenario, app=echo)


def test_a_message_that_is_too_long_ends_it(tmp_path: Path) -> None:
    async def scenario(port: int, _: Path) -> None:
        async with client(port) as socket:
            await socket.send(b"x" * (websocket.MESSAGE_MAX_BYTES + 1))
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009

    serving(tmp_path, scenario, app=echo)


def test_a_message_of_too_many_fragments_ends_it(tmp_path: Path) -> None:
    async def scenario(port: int, _: Path) -> None:
        async with client(port) as socket:
            with pytest.raises(ConnectionClosed) as closed:
                await socket.send([b"x"] * (websocket.MAX_FRAGMENTS + 2))
                await socket.recv()
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009

    serving(tmp_path, scenario, app=echo)


def test_text_that_is_none(tmp_path: Path) -> None:
    async def scenario(port: int, _: Path) -> None:
        async with client(port) as socket:
            socket.protocol.send_frame(Frame(Opcode.TEXT, b"\xff"))
            socket.send_data()
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1007

    serving(tmp_path, scenario, app=echo)


def test_a_silent_client_is_asked_and_then_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "PING_SECONDS", 0.2)

    async def scenario(port: int, _: Path) -> None:
        async with client(port) as alive:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(
                b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
            )
            # It never answers the ping, and reads to the end.
            async with asyncio.timeout(20):
                said = await reader.read()
            assert said.startswith(b"HTTP/1.1 101") and b"\x89\x00" in said
            writer.close()
            # The library answers pings by itself.
            await alive.send("still there")
            assert await alive.recv() == "still there"

    serving(tmp_path, scenario, app=echo)


@pytest.mark.parametrize("unread_bytes", [0, 4 << 20])
def test_a_client_that_has_gone_is_missed_though_nobody_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unread_bytes: int
) -> None:
    monkeypatch.setattr(websocket, "PING_SECONDS", 0.1)
    missed = asyncio.Event()

    async def busy(scope: Any, receive: Any, send: Any) -> None:
        offer = WebSocketOffer.of(scope)
        assert offer is not None
        async with offer.accept() as socket:
            with pytest.raises(WebSocketClosedError):
                await socket.watch()
            missed.set()

    async def scenario(port: int, _: Path) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        async with asyncio.timeout(20):
            # It is there as long as it does nothing but take the pings.
            assert (await reader.readuntil(b"\x89\x00\x89\x00")).startswith(b"HTTP/1.1 101")
        assert not missed.is_set()
        writer.write(bytes(unread_bytes))
        await asyncio.sleep(0)
        writer.transport.abort()
        async with asyncio.timeout(20):
            await missed.wait()

    serving(tmp_path, scenario, app=busy)
