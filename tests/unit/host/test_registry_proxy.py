"""The way out of an import's jail: which addresses are dialled, whatever names stand for now or a moment later."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from innkeeper.core.registry import parse_policy
from innkeeper.host.registry_proxy import HEAD_BYTES_MAX, Proxy, host_addresses

pytestmark = pytest.mark.anyio

# Public, so allowed by itself, and nobody's here.
PUBLIC = "203.0.114.7"


class Net:
    """Answers of the resolver, one after the other, and what was dialled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, port: int) -> None:
        self.answers: list[list[str]] = []
        self.asked: list[str] = []
        self.dialled: list[tuple[str, int]] = []
        loop = asyncio.get_running_loop()
        real = asyncio.open_connection

        async def getaddrinfo(host: str, wanted: int | None, **_: object) -> list[tuple[object, ...]]:
            self.asked.append(host)
            if not self.answers:
                raise socket.gaierror
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (text, wanted)) for text in self.answers.pop(0)]

        async def open_connection(host: str, wanted: int, **more: object) -> object:
            self.dialled.append((host, wanted))
            return await real("127.0.0.1", port, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr("innkeeper.host.registry_proxy.asyncio.open_connection", open_connection)


@asynccontextmanager
async def proxied(
    monkeypatch: pytest.MonkeyPatch, request: bytes, *answers: list[str], allow: str = "", max_bytes: int = 1 << 20
) -> AsyncIterator[tuple[bytes, Net, list[bytes]]]:
    """What a jail gets for a request, and what the machine behind the proxy saw."""
    seen: list[bytes] = []

    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(4_096))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhello")
        writer.close()

    behind = await asyncio.start_server(upstream, "127.0.0.1", 0)
    proxy = Proxy(parse_policy(allow), max_bytes, host_addresses)
    front = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=HEAD_BYTES_MAX)
    reader, writer = await asyncio.open_connection("127.0.0.1", front.sockets[0].getsockname()[1])
    net = Net(monkeypatch, behind.sockets[0].getsockname()[1])
    net.answers = list(answers)
    writer.write(request)
    async with asyncio.timeout(10):
        said = await reader.read(4_096)
        if said.startswith(b"HTTP/1.1 200 Connection"):
            writer.write(b"client hello")
            said += await reader.read(4_096)
    yield said, net, seen
    monkeypatch.undo()
    writer.close()
    front.close()
    behind.close()


def connect(authority: str) -> bytes:
    return f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode()


async def test_the_address_that_was_checked_is_the_one_that_is_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is public when it is looked up and private a moment later: it is looked up once."""
    request = connect("rebound.example:443")
    async with proxied(monkeypatch, request, [PUBLIC], ["127.0.0.1"]) as (said, net, seen):
        assert said.endswith(b"hello")
        assert (net.asked, net.dialled, seen) == (["rebound.example"], [(PUBLIC, 443)], [b"client hello"])


@pytest.mark.parametrize(
    ("authority", "addresses"),
    [
        ("private.example:443", ["10.0.0.1"]),
        ("metadata.example:80", ["169.254.169.254"]),
        ("loop.example:443", ["127.0.0.1", "::1"]),
        ("mapped.example:443", ["::ffff:192.168.1.1"]),
        ("nat.example:443", ["64:ff9b::a00:1"]),
        ("shared.example:443", ["100.64.0.1"]),
        ("many.example:443", ["224.0.0.1", "0.0.0.0", "255.255.255.255"]),
        ("unknown.example:443", []),
    ],
)
async def test_what_is_not_public_is_not_dialled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], authority: str, addresses: list[str]
) -> None:
    async with proxied(monkeypatch, connect(authority), addresses) as (said, net, _):
        assert said.startswith(b"HTTP/1.1 403")
        assert net.dialled == []
    assert authority.partition(":")[0] in json.loads(capsys.readouterr().out)["refused"]


async def test_of_several_addresses_only_public_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    async with proxied(monkeypatch, connect("mixed.example:443"), ["10.0.0.1", PUBLIC, "127.0.0.1"]) as (_, net, _):
        assert net.dialled == [(PUBLIC, 443)]


async def test_the_host_s_own_public_address_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("innkeeper.host.registry_proxy.is_own", lambda address: address == PUBLIC)
    async with proxied(monkeypatch, connect("self.example:443"), [PUBLIC]) as (said, net, _):
        assert (said[:12], net.dialled) == (b"HTTP/1.1 403", [])


@pytest.mark.parametrize("allow", ["lan.example", "lan.example:5000", "10.0.0.0/8", "LAN.example, 192.0.2.0/24"])
async def test_the_operator_s_exceptions(monkeypatch: pytest.MonkeyPatch, allow: str) -> None:
    request = connect("lan.example:5000")
    async with proxied(monkeypatch, request, ["10.0.0.1"], allow=allow) as (said, net, _):
        assert said.endswith(b"hello")
        assert net.dialled == [("10.0.0.1", 5_000)]
    async with proxied(monkeypatch, connect("other.example:443"), ["172.16.0.1"], allow=allow) as (said, net, _):
        assert (said[:12], net.dialled) == (b"HTTP/1.1 403", [])


async def test_without_tls_only_hosts_that_the_operator_names(monkeypatch: pytest.MonkeyPatch) -> None:
    request = (
        b"GET http://lan.example:5000/v2/?a=b HTTP/1.1\r\nHost: lan.example:5000\r\nProxy-Connection: x\r\nA: b\r\n\r\n"
    )
    async with proxied(monkeypatch, request, [PUBLIC]) as (said, net, _):
        assert (said[:12], net.dialled) == (b"HTTP/1.1 403", [])
    async with proxied(monkeypatch, request, ["10.0.0.1"], allow="lan.example:5000") as (said, _, seen):
        assert said.endswith(b"hello")
        assert seen == [b"GET /v2/?a=b HTTP/1.1\r\nHost: lan.example:5000\r\nA: b\r\nConnection: close\r\n\r\n"]


@pytest.mark.parametrize(
    "request_",
    [b"CONNECT x HTTP/1.1\r\n\r\n", b"CONNECT a b:1 HTTP/1.1\r\n\r\n", b"CONNECT x:0 HTTP/1.1\r\n\r\n", b"\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
     b"GET file:///etc/passwd HTTP/1.1\r\n\r\n", b"CONNECT [::1%25lo]:1 HTTP/1.1\r\n\r\n", bytes(HEAD_BYTES_MAX + 1) + b"\r\n\r\n"],
)  # fmt: skip
async def test_what_is_no_request(monkeypatch: pytest.MonkeyPatch, request_: bytes) -> None:
    async with proxied(monkeypatch, request_) as (said, net, _):
        assert said[:12] in (b"HTTP/1.1 403", b"")
        assert net.dialled == []
