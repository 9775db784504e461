"""What passes between a client and a guest's port: everything that HTTP allows, as streams, and nothing that is ours."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest
from tests.published_port import GUEST_PORT, Endless, Published, anyio_backend, port, public_port, published, read_head

from innkeeper.control import ports, rooms, session_vm, sessions, shares, tokens, vms
from innkeeper.core.vm import VmRequest

__all__ = ["anyio_backend", "port", "public_port"]
pytestmark = pytest.mark.anyio
MIB = 1_048_576


@pytest.fixture
async def private(tmp_path: Path) -> AsyncIterator[Published]:
    async with published(tmp_path, is_public=False) as made:
        yield made


def body_of(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


def fields_of(head: bytes) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in head.decode("latin-1").partition("\r\n\r\n")[0].split("\r\n")[1:]:
        name, _, value = line.partition(": ")
        found.setdefault(name.lower(), []).append(value)
    return found


async def test_a_page(port: Published) -> None:
    answer = await port.ask("GET /a%2Fb/../c?x=1&y=%20 HTTP/1.1", "X-Own: kept")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and body_of(answer) == b"hello"
    assert port.heads[0].startswith(b"GET /a%2Fb/../c?x=1&y=%20 HTTP/1.1\r\n")
    seen = fields_of(port.heads[0])
    assert seen["host"] == [port.host] and seen["x-own"] == ["kept"] and seen["connection"] == ["close"]
    assert seen["x-forwarded-for"] == ["127.0.0.1"] and seen["x-forwarded-proto"] == ["http"]
    assert seen["x-forwarded-host"] == [port.host]


async def test_many_requests_on_one_connection(port: Published) -> None:
    reader, writer = await port.open()
    for number in range(3):
        writer.write(port.request(f"GET /{number} HTTP/1.1"))
        assert (await read_head(reader)).startswith(b"HTTP/1.1 200") and await reader.readexactly(5) == b"hello"
    writer.close()
    assert [head.split()[1] for head in port.heads] == [b"/0", b"/1", b"/2"]


async def test_a_body_of_known_length_and_a_chunked_one(port: Published) -> None:
    got: list[bytes] = []

    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await read_head(reader)
        port.heads.append(head)
        if b"content-length: 10" in head:
            got.append(await reader.readexactly(10))
        else:
            whole = b""
            while size := int((await reader.readline()).strip(), 16):
                whole += await reader.readexactly(size)
                await reader.readexactly(2)
            got.append(whole)
        writer.write(b"HTTP/1.1 201 Made\r\nContent-Length: 0\r\n\r\n")

    port.guest = guest
    assert b" 201 " in await port.ask("POST / HTTP/1.1", "Content-Length: 10", body=b"0123456789")
    chunks = b"3\r\nabc\r\n4;name=value\r\ndefg\r\n0\r\nX-Trailer: 1\r\n\r\n"
    assert b" 201 " in await port.ask("PUT / HTTP/1.1", "Transfer-Encoding: chunked", body=chunks)
    assert got == [b"0123456789", b"abcdefg"]
    assert b"name=value" not in port.heads[1] and b"x-trailer" not in port.heads[1].lower()


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", b"abcde"),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", b"until the end"),
        (b"HTTP/1.0 200 OK\r\n\r\nold", b"old"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"hi"),
    ],
)  # fmt: skip
async def test_every_framing_of_an_answer(port: Published, answer: bytes, body: bytes) -> None:
    port.answering(answer)
    said = await port.ask()
    assert said.startswith(b"HTTP/1.1 200 OK\r\n") and b"link:" not in said.lower()
    if fields_of(said).get("transfer-encoding") == ["chunked"]:
        rest, whole = body_of(said), b""
        while size := int(rest.partition(b"\r\n")[0], 16):
            rest = rest.partition(b"\r\n")[2]
            whole, rest = whole + rest[:size], rest[size + 2 :]
        assert whole == body and rest == b"0\r\n\r\n"
    else:
        assert body_of(said) == body


@pytest.mark.parametrize(
    ("line", "answer", "expected"),
    [
        ("HEAD / HTTP/1.1", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", "content-length: 1000"),
        ("HEAD / HTTP/1.1", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "200 OK"),
        ("GET / HTTP/1.1", b"HTTP/1.1 304 Same\r\nContent-Length: 1000\r\nETag: x\r\n\r\n", "etag: x"),
        ("GET / HTTP/1.1", b"HTTP/1.1 204 None\r\n\r\n", "204 No Content"),
    ],
)
async def test_answers_without_a_body(port: Published, line: str, answer: bytes, expected: str) -> None:
    port.answering(answer)
    said = await port.ask(line)
    assert expected.encode() in said and body_of(said) == b""


async def test_large_bodies_pass_as_streams_both_ways(port: Published) -> None:
    size = 24 * MIB
    piece_size = 65_536

    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        left = size
        while left:
            data = await reader.read(65_536)
            left -= len(data)
            writer.write(data)
            await writer.drain()

    port.guest = guest
    reader, writer = await port.open()
    writer.write(port.request("POST / HTTP/1.1", f"Content-Length: {size}"))
    sent, got = hashlib.sha256(), hashlib.sha256()

    async def feed() -> None:
        for number in range(size // piece_size):
            # No two are the same: their order counts.
            piece = hashlib.sha256(b"%d" % number).digest() * (piece_size // 32)
            writer.write(piece)
            sent.update(piece)
            await writer.drain()

    feeding = asyncio.create_task(feed())
    assert b"content-length: %d" % size in await read_head(reader)
    left = size
    while left:
        data = await reader.read(MIB)
        assert data
        left -= len(data)
        got.update(data)
    await feeding
    assert got.digest() == sent.digest()
    writer.close()


async def test_a_client_that_takes_nothing_stops_the_guest_and_its_end_is_told(port: Published) -> None:
    endless = Endless()

    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await endless(reader, writer)

    port.guest = guest
    _, writer = await port.open()
    writer.transport.pause_reading()
    writer.write(port.request())
    last = -1
    while endless.sent != last or not endless.sent:
        last = endless.sent
        await asyncio.sleep(0.5)
    assert endless.sent < 48 * MIB
    assert port.entry.open_streams == 1
    writer.transport.abort()
    async with asyncio.timeout(20):
        await endless.over.wait()
        while port.entry.open_streams or port.world.host.ports.open:
            await asyncio.sleep(0.01)


async def test_events_arrive_as_they_are_sent(port: Published) -> None:
    go_on = asyncio.Event()

    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(3):
            event = b"data: %d\n\n" % number
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await writer.drain()
            await go_on.wait()
            go_on.clear()
        writer.write(b"0\r\n\r\n")

    port.guest = guest
    reader, writer = await port.open()
    writer.write(port.request())
    assert b"text/event-stream" in await read_head(reader)
    async with asyncio.timeout(20):
        for number in range(3):
            assert await reader.readuntil(b"\n\n\r\n") == b"9\r\ndata: %d\n\n\r\n" % number
            go_on.set()
        assert await reader.readuntil(b"0\r\n\r\n") == b"0\r\n\r\n"
    writer.close()


async def test_an_upgrade_carries_bytes_and_half_closes(port: Published) -> None:
    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port.heads.append(await read_head(reader))
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: abc=\r\nSet-Cookie: inn_share=forged\r\n\r\nfirst"
        )
        whole = await reader.read()
        writer.write(whole.upper())

    port.guest = guest
    reader, writer = await port.open()
    writer.write(
        port.request(
            "GET /ws HTTP/1.1", "Connection: keep-alive, Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x"
        )
        + b"early "
    )
    head = await read_head(reader)
    assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    assert fields_of(head) == {
        "sec-websocket-accept": ["abc="],
        "connection": ["Upgrade"],
        "upgrade": ["websocket"],
    }
    assert await reader.readexactly(5) == b"first"
    writer.write(b"and late")
    writer.write_eof()
    assert await reader.read() == b"EARLY AND LATE"
    seen = fields_of(port.heads[0])
    assert seen["connection"] == ["Upgrade"] and seen["upgrade"] == ["websocket"] and seen["sec-websocket-key"] == ["x"]
    writer.close()


async def test_an_upgrade_carries_much_both_ways(port: Published) -> None:
    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n")
        while data := await reader.read(100_000):
            writer.write(data)
            await writer.drain()

    port.guest = guest
    reader, writer = await port.open()
    writer.write(port.request("GET /x HTTP/1.1", "Connection: Upgrade", "Upgrade: x"))
    await read_head(reader)
    content = os.urandom(6 * MIB)

    async def feed() -> None:
        for at in range(0, len(content), 70_000):
            writer.write(content[at : at + 70_000])
            await writer.drain()
        writer.write_eof()

    feeding = asyncio.create_task(feed())
    async with asyncio.timeout(60):
        assert await reader.read() == content
    await feeding
    writer.close()


async def test_a_body_is_a_body_whatever_is_in_it(port: Published) -> None:
    request = port.request("GET /smuggled HTTP/1.1")
    body = request * (MIB // len(request))
    got = []

    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await read_head(reader)
        port.heads.append(head)
        got.append(await reader.readexactly(int((fields_of(head).get("content-length") or ["0"])[0])))
        answer = got[-1] or b"hello"
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer + b"HTTP/1.1 200 OK\r\n\r\nmore"
        )

    port.guest = guest
    # What follows the body is the next request, and what follows an answer's body is nobody's.
    answers = await port.raw(
        port.request("POST /first HTTP/1.1", f"Content-Length: {len(body)}")
        + body
        + port.request("GET /second HTTP/1.1", "Connection: close")
    )
    assert [head.split()[1] for head in port.heads] == [b"/first", b"/second"]
    assert got == [body, b""]
    first, _, rest = answers.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 200 OK\r\n") and rest[: len(body)] == body
    second = rest[len(body) :]
    assert second.startswith(b"HTTP/1.1 200 OK\r\n") and second.endswith(b"\r\n\r\nhello")


async def test_an_upgrade_that_the_guest_declines_is_an_answer(port: Published) -> None:
    port.answering(b"HTTP/1.1 426 No\r\nContent-Length: 2\r\n\r\nno")
    said = await port.ask("GET / HTTP/1.1", "Connection: Upgrade", "Upgrade: websocket")
    assert said.startswith(b"HTTP/1.1 426 ") and body_of(said) == b"no"


async def test_a_client_that_waits_for_a_word_before_its_body(port: Published) -> None:
    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port.heads.append(await read_head(reader))
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(3)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n" + body)

    port.guest = guest
    reader, writer = await port.open()
    writer.write(port.request("POST / HTTP/1.1", "Content-Length: 3", "Expect: 100-continue"))
    assert await read_head(reader) == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"abc")
    assert b" 200 " in await read_head(reader) and await reader.readexactly(3) == b"abc"
    # A server that refuses at once never sees the body, and neither does the client send it.
    port.answering(b"HTTP/1.1 413 Large\r\nContent-Length: 0\r\n\r\n")
    writer.write(port.request("POST / HTTP/1.1", "Content-Length: 3", "Expect: 100-continue"))
    head = await read_head(reader)
    assert b" 413 " in head and fields_of(head)["connection"] == ["close"]
    writer.close()


async def test_nobody_listens_and_nobody_answers(tmp_path: Path) -> None:
    async with published(tmp_path, share_answer_seconds=0.5) as port:
        real = port.world.host.ports.servers.pop(GUEST_PORT)
        said = await port.ask()
        assert (
            said.startswith(b"HTTP/1.1 502 ")
            and body_of(said) == b"502 Nothing listens on this port of the instance.\n"
        )
        port.world.host.ports.servers[GUEST_PORT] = real

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()

        port.guest = silent
        said = await port.ask()
        assert said.startswith(b"HTTP/1.1 504 ") and b"did not answer in time" in body_of(said)


async def test_silence_ends_a_tunnel_and_an_answer(tmp_path: Path) -> None:
    async with published(tmp_path, share_idle_seconds=0.5) as port:
        port.answering(b"")

        async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
            await reader.read()

        port.guest = half
        assert (await port.ask()).endswith(b"\r\n\r\nhalf")

        async def switched(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            writer.write(b"HTTP/1.1 101 S\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n")
            await reader.read()

        port.guest = switched
        said = await port.raw(port.request("GET / HTTP/1.1", "Connection: Upgrade", "Upgrade: x"))
        assert said.startswith(b"HTTP/1.1 101") and body_of(said) == b""


async def test_connections_to_one_instance_are_bounded(tmp_path: Path) -> None:
    async with published(tmp_path, port_connections=2) as port:
        waiting = asyncio.Event()

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_head(reader)
            await waiting.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        port.guest = slow
        asking = [asyncio.create_task(port.ask()) for _ in range(2)]
        await port.world.until(lambda: port.world.host.ports.open == 2)
        said = await port.ask()
        assert said.startswith(b"HTTP/1.1 429 ") and b"2 connections" in said
        waiting.set()
        assert all(b" 200 " in answer for answer in await asyncio.gather(*asking))
        port.guest = port.hello
        assert b"hello" in await port.ask()


async def test_a_private_share_opens_to_tokens_and_links(private: Published) -> None:
    assert (await private.ask()).startswith(b"HTTP/1.1 401 ")
    stranger = await tokens.create(private.control, await private.world.stranger(), "t")
    assert b" 401 " in await private.ask("GET / HTTP/1.1", f"X-API-Key: {stranger.text}")
    assert b"hello" in await private.ask("GET / HTTP/1.1", f"Authorization: Bearer {private.token}")
    assert b"hello" in await private.ask("GET / HTTP/1.1", f"X-API-Key: {private.token}")
    assert b" 401 " in await private.ask("GET / HTTP/1.1", "Authorization: Bearer nonsense")
    link = await shares.make_link(private.control, private.me, private.share.id, seconds=60)
    assert b"hello" in await private.ask(f"GET /?a=1&inn_link={link.signature}&b=2 HTTP/1.1")
    assert private.heads[-1].startswith(b"GET /?a=1&b=2 HTTP/1.1\r\n")
    assert private.token.encode() not in b"".join(private.heads)
    # A browser is sent on to the address without it, with a cookie.
    said = await private.ask(f"GET //x?inn_link={link.signature}&b=2 HTTP/1.1", "Accept: text/html,*/*")
    seen = fields_of(said)
    assert said.startswith(b"HTTP/1.1 303 ") and seen["location"] == [f"http://{private.host}//x?b=2"]
    assert "HttpOnly" in seen["set-cookie"][0] and "SameSite=lax" in seen["set-cookie"][0]
    cookie = seen["set-cookie"][0].partition(";")[0]
    assert b"hello" in await private.ask("GET / HTTP/1.1", f"Cookie: own=1; {cookie}; other=2")
    assert fields_of(private.heads[-1])["cookie"] == ["own=1; other=2"]
    assert b" 401 " in await private.ask("GET / HTTP/1.1", f"Cookie: {cookie}", "Origin: http://elsewhere.localhost")
    assert b" 401 " in await private.ask("GET / HTTP/1.1", f"Cookie: inn_share={link.signature}")
    # And it is void with the share.
    await shares.revoke(private.control, private.me, private.share.id)
    assert b" 404 " in await private.ask("GET / HTTP/1.1", f"Cookie: {cookie}")
    assert b" 404 " in await private.ask(f"GET /?inn_link={link.signature} HTTP/1.1")


async def test_a_share_dies_with_its_instance(private: Published) -> None:
    token = f"X-API-Key: {private.token}"
    assert b"hello" in await private.ask("GET / HTTP/1.1", token)
    await rooms.destroy(private.control, private.me, private.world.profile_id("base"), "r")
    assert (await private.ask("GET / HTTP/1.1", token)).startswith(b"HTTP/1.1 404 ")
    assert await shares.list_shares(private.control, private.me) == []


async def test_the_host_decides_and_nothing_else(port: Published) -> None:
    for host in (f"nobody.localhost:{port.port}", ".localhost", "a.b.localhost", f"x{port.share.name}.localhost"):
        assert (await port.ask(host=host)).startswith(b"HTTP/1.1 404 ")
    for host in ("localhost", "127.0.0.1", f"{port.share.name}.localhost.example.com", port.share.name):
        said = await port.ask("GET /healthz HTTP/1.1", host=host)
        assert b'"status"' in said and b"hello" not in said
    assert b"hello" in await port.ask("GET /healthz HTTP/1.1", host=f"{port.share.name.upper()}.LOCALHOST.:99")


async def vm_port(port: Published) -> tuple[str, str]:
    """(session id, VM id) of a new VM behind the API of `port`; its guest port is the same server."""
    view = await session_vm.create(port.control, port.me, VmRequest())
    return str(view.vm.session_id), view.vm.vm_id


async def test_the_path_form_lets_nothing_of_ours_in_and_nothing_out_that_stays(port: Published) -> None:
    session, _ = await vm_port(port)
    token = f"X-API-Key: {port.token}"
    path = f"/v1/app/{session}/{GUEST_PORT}"
    port.answering(
        b"HTTP/1.1 302 Found\r\nSet-Cookie: a=1\r\nLocation: /login?x\r\nContent-Security-Policy: default-src *\r\n"
        b"Clear-Site-Data: *\r\nStrict-Transport-Security: max-age=1\r\nService-Worker-Allowed: /\r\nWWW-Authenticate: Basic\r\n"
        b"Referrer-Policy: unsafe-url\r\nX-Own: 1\r\nContent-Length: 2\r\n\r\nok"
    )
    said = await port.ask(
        f"GET {path}/a%2Fb?x=1 HTTP/1.1",
        token,
        "Cookie: session=admin",
        "Referer: http://x/",
        "Origin: http://x",
        host="localhost",
    )
    seen = fields_of(said)
    assert body_of(said) == b"ok" and seen["location"] == [f"{path}/login?x"] and seen["x-own"] == ["1"]
    assert seen["content-security-policy"] == [
        "sandbox allow-scripts allow-forms allow-popups allow-modals allow-downloads"
    ]
    assert seen["referrer-policy"] == ["no-referrer"]
    assert not seen.keys() & {
        "set-cookie",
        "clear-site-data",
        "strict-transport-security",
        "service-worker-allowed",
        "www-authenticate",
    }
    head = port.heads[0]
    assert head.startswith(b"GET /a%2Fb?x=1 HTTP/1.1\r\n")
    for gone in (b"cookie", b"referer", b"origin", b"api-key", port.token.encode()):
        assert gone not in head.lower()
    port.guest = port.hello
    said = await port.ask(f"GET {path}/ HTTP/1.1", f"Authorization: Bearer {port.token}", host="localhost")
    assert body_of(said) == b"hello" and b"authorization" not in port.heads[-1].lower()
    slash = await port.ask(f"GET {path} HTTP/1.1", token, host="localhost")
    assert b" 307 " in slash and fields_of(slash)["location"] == [f"{GUEST_PORT}/"]


async def test_the_path_form_wants_a_token_of_the_organization(port: Published) -> None:
    session, _ = await vm_port(port)
    path = f"/v1/app/{session}/{GUEST_PORT}/"
    stranger = await tokens.create(port.control, await port.world.stranger(), "t")
    assert b" 401 " in await port.ask(f"GET {path} HTTP/1.1", host="localhost")
    assert b" 404 " in await port.ask(f"GET {path} HTTP/1.1", f"X-API-Key: {stranger.text}", host="localhost")
    token = f"X-API-Key: {port.token}"
    for wrong in (
        f"/v1/app/{session}/0/",
        f"/v1/app/{session}/70000/",
        "/v1/app/x/80/",
        f"/v1/app/{port.share.id}/80/",
    ):
        assert b" 404 " in await port.ask(f"GET {wrong} HTTP/1.1", token, host="localhost")
    assert b" 405 " in await port.ask(f"PROPFIND {path} HTTP/1.1", token, host="localhost")
    refused = await port.ask(f"GET {path.replace(str(GUEST_PORT), '9')} HTTP/1.1", token, host="localhost")
    assert b" 502 " in refused and b'{"detail":"Nothing listens' in refused
    assert port.heads == []


async def test_a_vms_own_host_name_is_private(port: Published) -> None:
    session, vm_id = await vm_port(port)
    host = f"{vm_id.removeprefix('vm_')}-{GUEST_PORT}.localhost:{port.port}"
    assert b" 401 " in await port.ask(host=host)
    assert b"hello" in await port.ask("GET / HTTP/1.1", f"X-API-Key: {port.token}", host=host)
    entry = await sessions.existing_entry(port.control, port.me, UUID(session))
    assert entry is not None
    signature = shares.sign_target(port.control, shares.own_target(entry, GUEST_PORT), seconds=60)
    assert b"hello" in await port.ask(f"GET /?inn_link={signature} HTTP/1.1", host=host)
    other = host.replace(str(GUEST_PORT), "9", 1)
    assert b" 401 " in await port.ask(f"GET /?inn_link={signature} HTTP/1.1", host=other)
    for wrong in (
        host.replace(f"-{GUEST_PORT}", "-0"),
        host.replace(f"-{GUEST_PORT}", "-70000"),
        "a" * 26 + "-80.localhost",
    ):
        assert b" 404 " in await port.ask("GET / HTTP/1.1", f"X-API-Key: {port.token}", host=wrong)
    await vms.delete(port.control, port.me, vm_id)
    assert b" 404 " in await port.ask("GET / HTTP/1.1", f"X-API-Key: {port.token}", host=host)


async def test_an_agent_that_never_connects_keeps_nobody(port: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "CONNECT_SECONDS", 0.2)
    before, scripted = port.entry.open_streams, port.world.host.ports
    monkeypatch.setattr(scripted, "silent", True)
    async with asyncio.timeout(20):
        assert (await port.ask("GET / HTTP/1.1")).startswith(b"HTTP/1.1 504 ")
        while scripted.open or port.entry.open_streams != before:
            await asyncio.sleep(0.01)
