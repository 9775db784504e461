"""The real server on real sockets, under the event loop it runs on in production."""

import asyncio
import contextlib
import json
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from innkeeper.api import server
from innkeeper.api.auth import OPERATOR
from innkeeper.api.connections import HttpLimits

Scenario = Callable[[int, Path], Awaitable[None]]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    while (message := await receive()).get("more_body"):
        assert message["type"] == "http.request"
    body = json.dumps({"operator": bool(scope.get(OPERATOR)), "path": scope["raw_path"].decode()}).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def serving(tmp_path: Path, scenario: Scenario, *, app: Any = echo, **limits: float) -> None:
    async def main() -> None:
        path = tmp_path / "inn.sock"
        tcp = socket.create_server(("127.0.0.1", 0))
        tcp.setblocking(False)
        port = tcp.getsockname()[1]
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(
                server.serve(
                    app,
                    [tcp, server.open_operator_socket(path)],
                    stop=stop,
                    graceful_seconds=10,
                    limits=replace(HttpLimits(), **limits),
                )
            )
            try:
                await asyncio.wait_for(scenario(port, path), 20)
            finally:
                stop.set()

    uvloop.run(main())


async def exchange(address: int | Path, data: bytes) -> bytes:
    """What the server sends until it closes. A blocking client in a thread: it must see what any client sees."""

    def blocking() -> bytes:
        if isinstance(address, int):
            client = socket.create_connection(("127.0.0.1", address), timeout=10)
        else:
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(10)
            client.connect(os.fspath(address))
        with client:
            client.sendall(data)
            answer = b""
            while chunk := client.recv(65536):
                answer += chunk
            return answer

    return await asyncio.to_thread(blocking)


REQUEST = b"GET /a%2Fb HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def test_only_the_unix_socket_is_the_operator(tmp_path: Path) -> None:
    async def scenario(port: int, path: Path) -> None:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600  # noqa: PTH116
        over_tcp = await exchange(port, REQUEST)
        over_unix = await exchange(path, REQUEST)
        assert json.loads(over_tcp.partition(b"\r\n\r\n")[2]) == {"operator": False, "path": "/a%2Fb"}
        assert json.loads(over_unix.partition(b"\r\n\r\n")[2]) == {"operator": True, "path": "/a%2Fb"}

    serving(tmp_path, scenario)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-A: " + b"a" * 200_000, b"431"),
        (b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 20_000, b"431"),
        (b"GET /" + b"a" * 200_000, b"431"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 70_000 + b"\r\n\r\n", b"431"),
        (b"not http at all\r\n\r\n", b"400"),
        ("GET /é HTTP/1.1\r\nHost: x\r\n\r\n".encode(), b"400"),
    ],
)
def test_bad_heads_are_refused_in_shape(tmp_path: Path, request_bytes: bytes, status: bytes) -> None:
    async def scenario(port: int, path: Path) -> None:
        answer = await exchange(port, request_bytes)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.split(b" ")[1] == status
        assert json.loads(body)["error"] == "invalid_request"

    serving(tmp_path, scenario)


def test_a_long_body_is_no_long_head(tmp_path: Path) -> None:
    async def scenario(port: int, path: Path) -> None:
        body = b"x" * 300_000
        request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        answer = await exchange(port, request + request + REQUEST)
        assert answer.count(b"HTTP/1.1 200") == 3

    serving(tmp_path, scenario)


def test_a_head_that_never_ends_is_cut(tmp_path: Path) -> None:
    async def scenario(port: int, path: Path) -> None:
        for data in (b"", b"GET / HTTP/1.1\r\nHost:"):
            assert await exchange(port, data) == b""

    serving(tmp_path, scenario, head_seconds=0.2)


CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (CHUNKED + b"1\r\nx\r\n0\r\n", b"X-Trailer: a\r\n" * 100),
        (CHUNKED + b"1\r\nx\r\n0\r\nX-Trailer: ", b"a" * 1_000),
        (CHUNKED + b"1;", b"a" * 1_000),
        (b"", b"\r\n" * 1_000),
    ],
    ids=["trailers", "one trailer", "extension", "empty lines"],
)
def test_what_brings_no_request_on_ends(tmp_path: Path, first: bytes, again: bytes) -> None:
    async def scenario(port: int, path: Path) -> None:
        answer = await exchange(port, first + again * 2_000)
        assert answer.split(b" ")[1] in (b"400", b"431")

    serving(tmp_path, scenario)


def test_a_pipeline_is_bounded(tmp_path: Path) -> None:
    seen = 0

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        nonlocal seen
        seen += 1
        await asyncio.sleep(0.05)
        await echo(scope, receive, send)

    one = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"

    async def scenario(port: int, path: Path) -> None:
        assert (await exchange(port, one * 20 + REQUEST)).count(b"HTTP/1.1 200") == 21
        with contextlib.suppress(ConnectionError):
            assert (await exchange(port, one * 5_000 + REQUEST)).count(b"HTTP/1.1 200") < 5

    serving(tmp_path, scenario, app=slow)
    assert seen < 40


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def test_a_body_that_nobody_wants_is_not_taken_for_ever(tmp_path: Path) -> None:
    sent = 0

    def pour(port: int) -> None:
        nonlocal sent
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (1 << 30))
            with contextlib.suppress(ConnectionError):
                while sent < 1 << 30:
                    sent += client.send(bytes(1 << 20))

    async def scenario(port: int, path: Path) -> None:
        await asyncio.to_thread(pour, port)

    serving(tmp_path, scenario, app=refuse)
    assert sent < 64 << 20


def test_a_client_that_takes_nothing_of_its_answer_is_given_up(tmp_path: Path) -> None:
    ended: list[str] = []

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        async def pour() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await send({"type": "http.response.body", "body": bytes(65_536), "more_body": True})
                await asyncio.sleep(0)

        pouring = asyncio.create_task(pour())
        while (await receive())["type"] != "http.disconnect":
            pass
        ended.append(scope["raw_path"].decode())
        pouring.cancel()

    async def scenario(port: int, path: Path) -> None:
        loop = asyncio.get_running_loop()
        silent, slow = (socket.create_connection(("127.0.0.1", port)) for _ in range(2))
        for client, name in ((silent, b"/silent"), (slow, b"/slow")):
            client.sendall(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % name)
            client.setblocking(False)
        end = loop.time() + 15
        while "/silent" not in ended and loop.time() < end:
            # 5 MB/s: the server has to wait for it all the time, and does.
            await loop.sock_recv(slow, 1 << 18)
            await asyncio.sleep(0.05)
        assert ended == ["/silent"]
        silent.close()
        slow.close()

    serving(tmp_path, scenario, app=endless, client_seconds=0.5)


def test_whoever_is_idle_longest_goes_for_a_new_one(tmp_path: Path) -> None:
    held = asyncio.Event()

    async def holding(scope: Any, receive: Any, send: Any) -> None:
        if scope["raw_path"] == b"/held":
            await held.wait()
        await echo(scope, receive, send)

    async def scenario(port: int, path: Path) -> None:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        busy = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for _, writer in busy:
            writer.write(b"GET /held HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        await asyncio.sleep(0.2)
        # The listener has 4 at most: two that are served, and the two that wait go one by one.
        for reader, _ in idle:
            assert (await exchange(port, REQUEST)).startswith(b"HTTP/1.1 200")
            if reader is idle[0][0]:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
        assert (await exchange(path, REQUEST)).startswith(b"HTTP/1.1 200")
        more = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for _, writer in more:
            writer.write(b"GET /held HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        await asyncio.sleep(0.2)
        refused = await exchange(port, REQUEST)
        assert json.loads(refused.partition(b"\r\n\r\n")[2])["error"] == "service_unavailable"
        held.set()
        for reader, writer in busy + more:
            assert (await reader.read()).startswith(b"HTTP/1.1 200")
            writer.close()
        assert (await exchange(port, REQUEST)).startswith(b"HTTP/1.1 200")
        for _, writer in idle:
            writer.close()

    serving(tmp_path, scenario, app=holding, max_connections=4)


def test_a_socket_of_a_former_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "inn.sock"
    server.open_operator_socket(path).close()
    server.open_operator_socket(path).close()
