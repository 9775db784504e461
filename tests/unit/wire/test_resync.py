"""How a link begins on a port: what the host sends, what it throws away, and when it gives up."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from innkeeper.wire.frames import ProtocolError, check_header
from innkeeper.wire.resync import MAGIC, MAX_DISCARDED_BYTES, begin_link, new_reset

pytestmark = pytest.mark.anyio

PATIENCE_SECONDS = 60.0
HELLO = b"\0\0\0\2\0\0\0\0\x0c{}"


class Port:
    """The agent's end."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end

    async def reset(self) -> bytes:
        got = b""
        while len(got) < 48:
            piece = await asyncio.get_running_loop().sock_recv(self.end, 48 - len(got))
            assert piece
            got += piece
        assert got.startswith(MAGIC)
        return got

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.end, data)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, Port]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, Port(theirs)


@pytest.fixture
async def beginning(pair: tuple[socket.socket, Port]) -> AsyncIterator[tuple[asyncio.Task[bytes], Port]]:
    task = asyncio.create_task(begin_link(pair[0], timeout_seconds=PATIENCE_SECONDS))
    yield task, pair[1]
    task.cancel()
    await asyncio.wait([task])


async def test_what_comes_behind_the_answer_is_the_link(beginning: tuple[asyncio.Task[bytes], Port]) -> None:
    task, port = beginning
    reset = await port.reset()
    await port.send(b"half a frame of before" + MAGIC + os.urandom(16) + reset[:30])
    await port.send(reset + HELLO)
    assert await task == HELLO


async def test_an_answer_may_come_in_pieces(beginning: tuple[asyncio.Task[bytes], Port]) -> None:
    task, port = beginning
    reset = await port.reset()
    for byte in b"left over" + reset:
        await port.send(bytes([byte]))
        await asyncio.sleep(0)
    assert await task == b""


async def test_only_the_answer_to_the_last_reset_counts(pair: tuple[socket.socket, Port]) -> None:
    task = asyncio.create_task(begin_link(pair[0], timeout_seconds=PATIENCE_SECONDS, patience_seconds=0.05))
    first, second = await pair[1].reset(), await pair[1].reset()
    assert first != second
    await pair[1].send(first + HELLO)
    while not task.done():
        # There may be more of them by now, on a machine that is busy.
        await pair[1].send(second + HELLO + b"!")
        answered = asyncio.create_task(pair[1].reset())
        await asyncio.wait([task, answered], return_when=asyncio.FIRST_COMPLETED)
        if answered.done():
            second = answered.result()
        answered.cancel()
        await asyncio.wait([answered])
    assert await task == HELLO + b"!"


async def test_a_peer_that_only_floods_is_given_up(beginning: tuple[asyncio.Task[bytes], Port]) -> None:
    task, port = beginning
    flood = asyncio.create_task(port.send(bytes(2 * MAX_DISCARDED_BYTES)))
    with pytest.raises(ProtocolError):
        await task
    flood.cancel()
    await asyncio.wait([flood])


async def test_a_port_that_is_closed(beginning: tuple[asyncio.Task[bytes], Port]) -> None:
    task, port = beginning
    await port.reset()
    port.end.close()
    with pytest.raises(ConnectionResetError):
        await task


async def test_a_peer_that_never_answers(pair: tuple[socket.socket, Port]) -> None:
    with pytest.raises(TimeoutError):
        await begin_link(pair[0], timeout_seconds=0.05)


def test_no_byte_of_a_reset_begins_a_frame() -> None:
    reset = new_reset()
    assert len(reset) == 48
    assert new_reset() != reset
    for at in range(len(reset)):
        rest = (reset[at:] + bytes(9))[:9]
        with pytest.raises(ProtocolError):
            check_header(int.from_bytes(rest[:4]), int.from_bytes(rest[4:8]), rest[8], max_payload=262_144)
