"""What goes on in a token's name when it is revoked: streams, terminals and connections end, each in its own way; others go on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx2
import pytest
from starlette.types import Message
from tests.published_port import Published, anyio_backend, published, read_head
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from innkeeper.api.sse import EventStream
from innkeeper.control import tokens
from innkeeper.control.tokens import NewToken
from innkeeper.core.host_verbs import Execute
from innkeeper.core.token import Scope

__all__ = ["anyio_backend"]
pytestmark = pytest.mark.anyio
PATIENCE_SECONDS = 30.0


@pytest.fixture(scope="module")
async def made(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Published]:
    async with published(tmp_path_factory.mktemp("revocations"), is_public=False) as made:
        yield made


async def fresh(made: Published) -> NewToken:
    return await tokens.create(made.control, made.me, "short-lived", scopes=frozenset({Scope.ROOMS}))


async def revoke(made: Published, token: NewToken) -> None:
    await tokens.revoke(made.control, made.me, token.token.id)


async def look(made: Published, token: str) -> ClientConnection:
    url = f"ws://127.0.0.1:{made.port}/v1/rooms/{made.entry.instance.public_id}/pty/t/connect"
    return await connect(url, additional_headers={"X-API-Key": token}, compression=None, proxy=None)


async def test_a_terminal_is_closed_with_the_code_of_a_bad_key_and_others_stay(made: Published) -> None:
    token = await fresh(made)
    made.world.host.terminals.add(made.entry.instance.id, "t")
    mine, theirs = await look(made, token.text), await look(made, made.token)
    await made.world.until(lambda: made.entry.open_streams == 2)
    await revoke(made, token)
    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                await mine.recv()
    assert (closed.value.rcvd and closed.value.rcvd.code, closed.value.rcvd and closed.value.rcvd.reason) == (
        4401,
        "The token was revoked",
    )
    await made.world.until(lambda: made.entry.open_streams == 1)
    await (await theirs.ping())
    await theirs.close()


async def vm_of(made: Published, token: str) -> str:
    async with client(made, token) as inn:
        return str((await inn.post("/v1/vms", json={})).json()["vm_id"])


def client(made: Published, token: str) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        base_url=f"http://127.0.0.1:{made.port}",
        headers={"X-API-Key": token},
        timeout=httpx2.Timeout(PATIENCE_SECONDS),
        trust_env=False,
    )


async def test_a_stream_of_events_ends_with_the_error_that_whoever_comes_again_gets(made: Published) -> None:
    token = await fresh(made)
    vm = await vm_of(made, made.token)
    async with (
        client(made, token.text) as inn,
        client(made, made.token) as other,
        inn.stream("GET", f"/v1/vms/{vm}/events/stream") as mine,
        other.stream("GET", f"/v1/vms/{vm}/events/stream") as theirs,
    ):
        lines, others = mine.aiter_lines(), theirs.aiter_lines()
        for one in (lines, others):
            while await anext(one) != "event: ready":
                pass
        await revoke(made, token)
        rest = [line async for line in lines]
        assert rest[-3:-1] == [
            "event: error",
            "data: " + json.dumps({"detail": "The token was revoked", "code": "unauthorized"}, separators=(",", ":")),
        ], rest
        assert (await inn.get(f"/v1/vms/{vm}/events/stream")).status_code == 401
        # What happens later is told to the other one.
        await other.post(f"/v1/vms/{vm}/hold", json={"seconds": 60, "reason": "still here"})
        while await anext(others) != "event: held":
            pass


async def test_a_connection_through_a_private_share_is_cut(made: Published) -> None:
    token = await fresh(made)
    closed = asyncio.Event()

    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await read_head(reader)
        if b"Upgrade" in head:
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nbegun")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\nbegun")
        await reader.read()
        closed.set()

    made.guest = guest
    for fields in ((), ("Connection: Upgrade", "Upgrade: echo")):
        token = await fresh(made)
        closed.clear()
        reader, writer = await made.open()
        writer.write(made.request("GET / HTTP/1.1", f"Authorization: Bearer {token.text}", *fields))
        async with asyncio.timeout(PATIENCE_SECONDS):
            await reader.readuntil(b"begun")
            await revoke(made, token)
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                # An end without the last chunk, or a reset.
                await reader.readexactly(1_000_000)
            await closed.wait()
        writer.close()


async def test_a_request_whose_answer_has_not_begun_is_carried_out(made: Published) -> None:
    token = await fresh(made)
    vm = await vm_of(made, token.text)
    made.world.host.hold_execute.clear()
    async with client(made, token.text) as inn:
        asking = asyncio.create_task(inn.post(f"/v1/vms/{vm}/exec", json={"command": "true"}))
        await made.world.until(lambda: made.world.host.count(Execute) == 1)
        await revoke(made, token)
        made.world.host.hold_execute.set()
        assert (await asking).status_code == 200
        assert (await inn.get(f"/v1/vms/{vm}")).status_code == 401


async def test_a_stream_to_a_client_that_does_not_read_leaves_nothing_open() -> None:
    closed = False
    blocked = asyncio.Event()

    async def frames() -> AsyncIterator[bytes]:
        nonlocal closed
        try:
            while True:
                yield b": ping\n\n"
        finally:
            closed = True

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            blocked.set()
            await asyncio.get_running_loop().create_future()

    async def receive() -> Message:
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    answer = EventStream(frames())
    task = asyncio.create_task(answer({"type": "http"}, receive, send))
    await blocked.wait()
    task.cancel()
    await asyncio.wait({task})
    assert closed
