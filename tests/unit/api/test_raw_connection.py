"""Connections that an application takes over from HTTP, on real sockets."""

import asyncio
import contextlib
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from tests.unit.api.test_server import exchange, serving

from innkeeper.api.raw_connection import TAKE_OVER, TAKEN_OVER

HEAD = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"
UPGRADE = b"GET /up HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
PLAIN = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


async def answer(scope: Any, send: Any) -> None:
    body = scope["path"].encode() + (b" offered" if TAKE_OVER in scope else b"")
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def decline(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.sleep(0.05)
    await answer(scope, send)


async def accept(scope: Any, receive: Any, send: Any) -> None:
    """Sends everything back in capitals, and its end after the client's."""
    if TAKE_OVER not in scope:
        await answer(scope, send)
        return
    await asyncio.sleep(0.05)
    async with scope[TAKE_OVER](HEAD) as raw:
        while data := await raw.read():
            await raw.write(data.upper())
        await raw.write(b"end")
    assert scope[TAKEN_OVER] == 101


def test_bytes_both_ways_and_half_closes(tmp_path: Path) -> None:
    async def scenario(port: int, _: Path) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        # Some of it ahead of the answer.
        writer.write(UPGRADE + b"early ")
        assert await reader.readexactly(len(HEAD)) == HEAD
        writer.write(b"late")
        assert await reader.readexactly(10) == b"EARLY LATE"
        writer.write_eof()
        assert await reader.read() == b"end"
        writer.close()

    serving(tmp_path, scenario, app=accept)


def test_an_upgrade_that_is_declined_leaves_the_requests_behind_it(tmp_path: Path) -> None:
    async def scenario(port: int, _: Path) -> None:
        said = await exchange(port, UPGRADE + PLAIN)
        assert said.count(b"HTTP/1.1 200") == 2
        assert said.index(b"/up offered") < said.index(b"/last")

    serving(tmp_path, scenario, app=decline)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /up HTTP/1.1\r\nHost: x\r\nUpgrade: x\r\n\r\n",
        b"GET /first HTTP/1.1\r\nHost: x\r\n\r\n" + UPGRADE,
    ],
)
def test_what_is_no_upgrade_is_not_offered_as_one(tmp_path: Path, request_bytes: bytes) -> None:
    async def scenario(port: int, _: Path) -> None:
        said = await exchange(port, request_bytes + PLAIN)
        assert b"/up" in said and b"/last" in said and b"offered" not in said

    serving(tmp_path, scenario, app=accept)


@pytest.mark.parametrize("body", [b"Content-Length: 60\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"])
@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_body_behind_an_upgrade_is_not_the_next_request(tmp_path: Path, body: bytes, in_pieces: bool) -> None:
    async def scenario(port: int, _: Path) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /up HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\n" + body)
        if in_pieces:
            await writer.drain()
            await asyncio.sleep(0.05)
        writer.write(PLAIN)
        said = await reader.read()
        assert said.startswith(b"HTTP/1.1 400") and said.count(b"HTTP/1.1") == 1
        writer.close()

    serving(tmp_path, scenario, app=accept)


def test_a_client_that_is_not_read_is_stopped(tmp_path: Path) -> None:
    begin = asyncio.Event()
    got = 0

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        nonlocal got
        async with scope[TAKE_OVER](HEAD) as raw:
            await begin.wait()
            while data := await raw.read():
                assert len(data) <= 65_536
                got += len(data)

    async def scenario(port: int, _: Path) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(UPGRADE)
        await reader.readexactly(len(HEAD))
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 64 << 20:
                writer.write(bytes(65_536))
                sent += 65_536
                await asyncio.wait_for(writer.drain(), 1)
        assert sent < 32 << 20
        begin.set()
        writer.write_eof()
        assert await reader.read() == b""
        assert got == sent
        writer.close()

    serving(tmp_path, scenario, app=slow)


def test_a_client_that_takes_nothing_is_dropped(tmp_path: Path) -> None:
    ended: list[BaseException] = []

    async def flood(scope: Any, receive: Any, send: Any) -> None:
        try:
            async with scope[TAKE_OVER](HEAD) as raw:
                while True:
                    await raw.write(bytes(65_536))
        except ConnectionError as error:
            ended.append(error)

    async def scenario(port: int, _: Path) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(UPGRADE)
        await reader.readexactly(len(HEAD))
        while not ended:
            await asyncio.sleep(0.05)
        writer.close()

    serving(tmp_path, scenario, app=flood, client_seconds=0.5)


def test_a_lost_connection_ends_the_reading(tmp_path: Path) -> None:
    ended: list[BaseException] = []

    async def waiting(scope: Any, receive: Any, send: Any) -> None:
        try:
            async with scope[TAKE_OVER](HEAD) as raw:
                assert await raw.read() == b"x"
                await raw.read()
        except ConnectionError as error:
            ended.append(error)

    async def scenario(port: int, _: Path) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(UPGRADE + b"x")
        await reader.readexactly(len(HEAD))
        # A reset.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        while not ended:
            await asyncio.sleep(0.05)

    serving(tmp_path, scenario, app=waiting)
