"""The real server on real sockets, under the event loop it runs on in production."""

import asyncio
import json
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from innkeeper.api import server
from innkeeper.api.auth import OPERATOR

Scenario = Callable[[int, Path], Awaitable[None]]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    while (message := await receive()).get("more_body"):
        assert message["type"] == "http.request"
    body = json.dumps({"operator": bool(scope.get(OPERATOR)), "path": scope["raw_path"].decode()}).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def serving(tmp_path: Path, scenario: Scenario) -> None:
    async def main() -> None:
        path = tmp_path / "inn.sock"
        tcp = socket.create_server(("127.0.0.1", 0))
        tcp.setblocking(False)
        port = tcp.getsockname()[1]
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(
                server.serve(echo, [tcp, server.open_operator_socket(path)], stop=stop, graceful_seconds=10)
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


def test_a_head_that_never_ends_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_DEADLINE_SECONDS", 0.2)

    async def scenario(port: int, path: Path) -> None:
        for data in (b"", b"GET / HTTP/1.1\r\nHost:"):
            assert await exchange(port, data) == b""

    serving(tmp_path, scenario)


def test_a_socket_of_a_former_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "inn.sock"
    server.open_operator_socket(path).close()
    server.open_operator_socket(path).close()
