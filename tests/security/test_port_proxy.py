"""Hostile clients and hostile guests at the two ends of a published port: nobody's bytes become another request or answer, and no credential is let out."""

import asyncio
import re
import struct
from pathlib import Path

import pytest
from tests.published_port import Published, anyio_backend, port, public_port, published, read_head

from innkeeper.core.token import Dialect, render_token

__all__ = ["anyio_backend", "port", "public_port"]
pytestmark = pytest.mark.anyio
MIB = 1_048_576
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


async def all_of_it(port: Published) -> list[bytes]:
    """From now on the guest keeps every byte that each of its connections gets."""
    kept: list[bytes] = []

    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        index = len(kept)
        kept.append(b"")
        try:
            async with asyncio.timeout(0.5):
                while data := await reader.read(65_536):
                    kept[index] += data
        except TimeoutError:
            pass
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    port.guest = guest
    return kept


AMBIGUOUS = [
    "Content-Length: 6\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nContent-Length: 6",
    "Content-Length: 6\r\nContent-Length: 6",
    "Content-Length: 6\r\nContent-Length: 60",
    "Content-Length: 6, 6",
    "Content-Length: +6",
    "Content-Length: 0x6",
    "Content-Length: 6 6",
    "Content-Length: 99999999999999999999",
    "Content-Length:\r\n 6",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    "Transfer-Encoding: identity",
    "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: chunked, gzip",
    "Transfer-Encoding: xchunked",
    "Transfer-Encoding: \x0bchunked",
    "Transfer-Encoding:\r\n chunked",
    "Transfer-Encoding : chunked",
    "X: y\rTransfer-Encoding: chunked",
    "X: y\nTransfer-Encoding: chunked",
    "X: y\r\n Transfer-Encoding: chunked",
    " Content-Length: 6",
    "X: a\0b",
    "Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 36",
    "Connection: Upgrade\r\nUpgrade: websocket\r\nTransfer-Encoding: chunked",
    "Host: other.localhost",
]


@pytest.mark.parametrize("fields", AMBIGUOUS)
async def test_a_request_that_can_be_read_in_two_ways_is_refused(port: Published, fields: str) -> None:
    kept = await all_of_it(port)
    head = f"POST / HTTP/1.1\r\nHost: {port.host}\r\n{fields}\r\n\r\n".encode("latin-1")
    said = await port.raw(head + b"0\r\n\r\n" + SMUGGLED)
    assert b"/smuggled" not in b"".join(kept)
    assert re.match(rb"HTTP/1.1 4\d\d ", said) and said.count(b"HTTP/1.1 ") == 1, said
    assert kept == []


@pytest.mark.parametrize(
    "chunks",
    [
        b"0x5\r\nabcde\r\n0\r\n\r\n",
        b"5 \r\nabcde\r\n0\r\n\r\n",
        b"5\nabcde\n0\n\n",
        b"5\r\nabcdefg\r\n0\r\n\r\n",
        b"-5\r\nabcde\r\n0\r\n\r\n",
        b"FFFFFFFFFFFFFFFFFF\r\nabcde",
        b'5;a="\r\nabcde\r\n0\r\n\r\n',
        b"5\r\nabcde0\r\n\r\n",
        b";\r\n\r\n",
    ],
)
async def test_a_bad_chunk_ends_the_request(port: Published, chunks: bytes) -> None:
    kept = await all_of_it(port)
    said = await port.raw(port.request("POST / HTTP/1.1", "Transfer-Encoding: chunked") + chunks + SMUGGLED)
    assert said.count(b"HTTP/1.1 200") == 0
    assert b"/smuggled" not in b"".join(kept)
    # And what had come of it is a body without an end, never a whole one.
    assert all(not one.endswith(b"0\r\n\r\n") for one in kept)


@pytest.mark.parametrize("tail", [b"", b"0\r\n\r\n", b"X: y\r\n\r\n"])
async def test_what_follows_a_body_is_the_next_request_for_us_too(port: Published, tail: bytes) -> None:
    kept = await all_of_it(port)
    last = SMUGGLED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    await port.raw(port.request("POST / HTTP/1.1", "Content-Length: 4") + b"body" + tail + last)
    # Where no request follows, the whole connection is refused.
    assert len(kept) == (0 if tail else 1)
    assert all(one.endswith(b"\r\n\r\nbody") for one in kept)


async def test_a_trailer_is_no_field(port: Published) -> None:
    kept = await all_of_it(port)
    trailers = b"X-Forwarded-For: 6.6.6.6\r\nHost: other.localhost\r\nX-Mine: 1\r\n"
    await port.ask("POST / HTTP/1.1", "Transfer-Encoding: chunked", body=b"1\r\na\r\n0\r\n" + trailers + b"\r\n")
    assert kept[0].endswith(b"\r\n\r\n1\r\na\r\n0\r\n\r\n")
    assert b"6.6.6.6" not in kept[0] and b"x-mine" not in kept[0].lower()


@pytest.mark.parametrize(
    "line",
    [
        "CONNECT x:80 HTTP/1.1",
        "TRACE / HTTP/1.1",
        "GET x HTTP/1.1",
        "GET / HTTP/2.0",
        "GET /a b HTTP/1.1",
        "GET /\x7f HTTP/1.1",
    ],
)
async def test_a_request_line_that_means_something_else_is_refused(port: Published, line: str) -> None:
    kept = await all_of_it(port)
    said = await port.ask(line)
    assert re.match(rb"HTTP/1.1 4\d\d ", said), said
    assert kept == []


async def test_forged_fields_are_replaced_and_those_of_the_connection_stay_behind(port: Published) -> None:
    forged = port.request(
        "GET / HTTP/1.1",
        "X-Forwarded-For: 6.6.6.6", "X_Forwarded_For: 6.6.6.6", "X-Forwarded_Proto: gopher", "x-forwarded-host: evil",
        "Forwarded: for=6.6.6.6", "X-Real-IP: 6.6.6.6", "X-Forwarded-Anything: 6.6.6.6",
        "Connection: X-Secret, keep-alive", "X-Secret: 1", "Keep-Alive: 5", "Proxy-Authorization: Basic x", "Proxy-Connection: x",
        "TE: trailers", "Trailer: x", "Upgrade: h2c", "HTTP2-Settings: x", "Content_Length: 7",
    )  # fmt: skip
    # 127.0.0.1 would be the front, whose word is taken.
    await port.raw(forged.replace(b"keep-alive\r\n", b"close\r\n"), address="127.0.0.2")
    head = port.heads[0].lower()
    for gone in (
        b"6.6.6.6",
        b"gopher",
        b"evil",
        b"x-secret",
        b"keep-alive",
        b"proxy",
        b"\r\nte:",
        b"trailer",
        b"h2c",
        b"http2",
        b"content_length",
    ):
        assert gone not in head, (gone, head)
    assert head.count(b"x-forwarded-for: 127.0.0.2") == 1 and b"x-forwarded-proto: http\r\n" in head


async def test_h2c_is_never_switched_to(port: Published) -> None:
    port.answering(b"HTTP/1.1 101 S\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\nPRI")
    said = await port.ask(
        "GET / HTTP/1.1", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"
    )
    assert said.startswith(b"HTTP/1.1 502 ") and b"upgrade" not in port.heads[0].lower()


async def test_no_credential_of_ours_reaches_a_guest(tmp_path: Path) -> None:
    tokens = [render_token(dialect) for dialect in Dialect] + [render_token(Dialect.GENTILITY, test=True)]
    async with published(tmp_path, is_public=False) as port:
        kept = await all_of_it(port)
        for token in [port.token, *tokens]:
            encoded = "".join(f"%{byte:02x}" for byte in token.encode())
            await port.ask(
                f"GET /p?a=1&key={token}&k2={encoded}&{token}&b=2&inn%5flink=x HTTP/1.1",
                f"X-API-Key: {port.token}", f"Authorization: Bearer {token}" if token == port.token else "X-None: 1",
                f"X-Other: x{token}", f"Referer: http://{port.host}/?key={token}", f"Cookie: a=1; inn_share=x; b={token}; c=2",
                f"X-Referer: http://{port.host}/?inn_link=x",
            )  # fmt: skip
        assert len(kept) == len(tokens) + 1
        for head in kept:
            assert head.startswith(b"GET /p?a=1&b=2 HTTP/1.1\r\n")
            assert b"cookie: a=1; c=2\r\n" in head
            assert not any(token.encode() in head for token in [port.token, *tokens])
            assert b"inn_" not in head and b"authorization" not in head and b"api-key" not in head
        # What is the guest's own passes.
        await port.ask(
            "GET /?api_key=mine HTTP/1.1", f"X-API-Key: {port.token}", "Authorization: Bearer mine", "Cookie: sid=1"
        )
        assert b"authorization: Bearer mine\r\n" in kept[-1] and b"cookie: sid=1\r\n" in kept[-1]
        assert kept[-1].startswith(b"GET /?api_key=mine ")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/2.0 200 OK\r\n\r\nx",
        b"HTTP/0.9 200 OK\r\n\r\nx",
        b"HTTP/1.1 99 Low\r\n\r\n",
        b"HTTP/1.1 600 High\r\n\r\n",
        b"HTTP/1.1 1000 High\r\n\r\n",
        b"HTTP/1.1 101 S\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3, 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\nY: b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\rb\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX\x01: b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n: b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 300 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000,
    ],
)
async def test_a_guest_that_answers_nonsense_is_a_bad_gateway(port: Published, answer: bytes) -> None:
    port.answering(answer)
    said = await port.ask()
    assert said.startswith(b"HTTP/1.1 502 Bad Gateway\r\n"), said[:300]
    assert said.count(b"HTTP/1.1 ") == 1
    page = said.partition(b"\r\n\r\n")[2].decode()
    # A plain page without a word of the inside.
    assert page.startswith("502 The server") and not re.search(r"Error|Traceback|127\.0\.0\.1|httptools|/", page)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhelloHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello evil",
    ],
)
async def test_what_follows_an_answer_is_nobodys(port: Published, answer: bytes) -> None:
    """Neither this client gets it nor the next one on any connection."""
    port.answering(answer)
    reader, writer = await port.open()
    for _ in range(2):
        writer.write(port.request())
        head = await read_head(reader)
        if b"content-length: 5" in head:
            assert await reader.readexactly(5) == b"hello"
        else:
            assert await reader.readexactly(15) == b"5\r\nhello\r\n0\r\n\r\n"
    writer.close()
    assert b"evil" not in await port.ask()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n4;" + b"x" * 70_000,
    ],
)
async def test_an_answer_that_breaks_off_is_seen_to_be_broken_off(port: Published, answer: bytes) -> None:
    port.answering(answer)
    said = await port.ask()
    assert b"half" in said and not said.endswith(b"0\r\n\r\n") and said.count(b"HTTP/1.1 ") == 1


async def test_a_bad_chunk_ends_the_answer(port: Published) -> None:
    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        await go_on.wait()
        writer.write(b"xyz\r\nabc\r\n0\r\n\r\n")

    go_on = asyncio.Event()
    port.guest = guest
    reader, writer = await port.open()
    writer.write(port.request())
    await reader.readuntil(b"half\r\n")
    go_on.set()
    assert await reader.read() == b""
    writer.close()


async def test_a_reset_is_a_bad_gateway(port: Published) -> None:
    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.get_extra_info("socket").setsockopt(1, 13, struct.pack("ii", 1, 0))
        writer.transport.abort()

    port.guest = guest
    said = await port.ask()
    assert (said.startswith(b"HTTP/1.1 50") and b"502 " in said) or b"503 " in said


@pytest.mark.parametrize(
    "endless",
    [b"HTTP/1.1 103 E\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"y" * 60_000],
)
async def test_a_guest_without_end_is_cut_off(port: Published, endless: bytes) -> None:
    cut = asyncio.Event()

    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        try:
            while True:
                writer.write(endless)
                await writer.drain()
        finally:
            cut.set()

    port.guest = guest
    said = await port.ask()
    assert said.startswith(b"HTTP/1.1 502 ")
    async with asyncio.timeout(10):
        await cut.wait()


async def test_chunks_of_single_bytes_cost_no_more_than_their_bytes(port: Published) -> None:
    """300,000 chunks: each as a step of its own would hold everybody else up for seconds."""
    port.answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 300_000 + b"0\r\n\r\n")
    asking = asyncio.create_task(port.ask())
    longest, last = 0.0, asyncio.get_running_loop().time()
    while not asking.done():
        await asyncio.sleep(0)
        now = asyncio.get_running_loop().time()
        longest, last = max(longest, now - last), now
    said = await asking
    assert said.count(b"x") >= 300_000
    # Joined as they came: as many frames to the client would be 6 bytes each again.
    assert len(said) < 400_000
    print(f"longest pause of the event loop: {longest * 1000:.0f} ms")


async def test_a_guest_cannot_set_our_cookie_or_one_for_the_domain_above(port: Published) -> None:
    port.answering(
        b"HTTP/1.1 200 OK\r\nSet-Cookie: inn_share=x; Path=/\r\nSet-Cookie:  inn_share =y\r\n"
        b"Set-Cookie: a=1; Domain=localhost; Path=/\r\nSet-Cookie: b=2; DOMAIN = .localhost;Secure\r\n"
        b"Connection: X-Hop, close\r\nX-Hop: 1\r\nKeep-Alive: 1\r\nProxy-Authenticate: Basic\r\nTrailer: x\r\nContent-Length: 0\r\n\r\n"
    )
    said = (await port.ask()).lower()
    assert said.count(b"set-cookie") == 2 and b"inn_share" not in said and b"domain" not in said
    assert b"set-cookie: a=1; path=/\r\n" in said and b"set-cookie: b=2;secure\r\n" in said
    assert b"x-hop" not in said and b"keep-alive" not in said and b"proxy" not in said and b"trailer" not in said


async def test_names_and_signatures_are_not_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from innkeeper.control import shares

    async with published(tmp_path, is_public=False) as port:
        link = await shares.make_link(port.control, port.me, port.share.id, seconds=60)
        await port.ask(f"GET /secret-path?inn_link={link.signature} HTTP/1.1")
        await port.ask(f"GET /secret-path?inn_link={link.signature}x HTTP/1.1")
        port.answering(b"nonsense")
        await port.ask(f"GET /secret-path?inn_link={link.signature} HTTP/1.1")
        name = port.share.name
    captured = capfd.readouterr()
    said = captured.out + captured.err
    assert "(share)" in said
    for secret in (link.signature, "secret-path", name):
        assert secret not in said


async def test_signatures_are_of_one_share_one_purpose_and_one_time(tmp_path: Path) -> None:
    from innkeeper.control import shares
    from innkeeper.core.share import sign

    async with published(tmp_path, is_public=False) as port:
        other = await shares.create(port.control, port.me, port.entry, 9, is_public=False)
        good = (await shares.make_link(port.control, port.me, port.share.id, seconds=60)).signature
        expires, _, mac = good.partition(".")
        key, subject = port.control.box.link_key, f"share {port.share.id}"
        wrong = [
            (await shares.make_link(port.control, port.me, other.id, seconds=60)).signature,
            f"{int(expires) + 1}.{mac}",
            f"0{expires}.{mac}",
            f"{expires}.{mac[:-1]}",
            f"{expires}.{mac}=",
            f"{expires}.",
            "",
            sign(key, f"visit {subject}", int(expires)),
            sign(key, subject, 1),
            sign(bytes(32), subject, int(expires)),
        ]
        for signature in wrong:
            assert b" 401 " in await port.ask(f"GET /?inn_link={signature} HTTP/1.1"), signature
        assert port.heads == []
        assert b"hello" in await port.ask(f"GET /?inn_link={good} HTTP/1.1")
