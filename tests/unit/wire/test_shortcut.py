"""Bytes that are passed on without waking their reader: order, credit and back-pressure stay what they are. Over real sockets."""

import asyncio
import contextlib
import os
import socket

import pytest

from innkeeper.wire.frames import Limits
from innkeeper.wire.link import Link
from innkeeper.wire.stream import Data, End

pytestmark = pytest.mark.anyio
SIZE = 6_000_000
LIMITS = Limits(window=300_000, grant_step=50_000)


@contextlib.asynccontextmanager
async def connected(handlers):
    """Two ends of a link, `(opener, server)`, joined by a socket with a small buffer."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ends = Link(limits=LIMITS, opens_odd=True), Link(limits=LIMITS, opens_odd=False, handlers=handlers)
    for end, link in zip(pair, ends, strict=True):
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        await asyncio.get_running_loop().create_unix_connection(lambda link=link: link, sock=end)
    try:
        yield ends
    finally:
        for link in ends:
            link.close()
            await asyncio.wait_for(link.wait_closed(), 20)


async def pour(stream, content):
    for at in range(0, len(content), 70_001):
        await stream.send_data(memoryview(content)[at : at + 70_001])
    await stream.send_end()
    return {}


async def drink(stream, *, pause_at=()):
    """All that comes, with pauses after so many bytes."""
    pauses, content = list(pause_at), bytearray()
    while (event := await stream.next_event()) is not None:
        if isinstance(event, Data):
            content += event.data
            if pauses and len(content) >= pauses[0]:
                pauses.pop(0)
                await asyncio.sleep(0.05)
    return bytes(content)


async def test_a_relay_passes_all_of_it_in_order():
    content = os.urandom(SIZE)
    ways = {"shortcut": 0, "reader": 0}

    async def relay(stream):
        async with connected({"pour": lambda far: pour(far, content)}) as (near, _):
            source = near.open("pour")

            def take(data):
                taken = stream.send_now(data)
                ways["shortcut"] += taken
                return taken

            source.shortcut(take)
            while (event := await source.next_event()) is not None:
                if isinstance(event, Data):
                    ways["reader"] += len(event.data)
                    await stream.send_data(event.data)
                elif isinstance(event, End):
                    await stream.send_end()
        return {}

    async with connected({"relay": relay}) as (opener, _):
        got = await asyncio.wait_for(drink(opener.open("relay"), pause_at=range(500_000, SIZE, 500_000)), 60)
    assert got == content
    # The pauses made it wait, what came between them did not.
    assert ways["shortcut"] > SIZE // 10 and ways["reader"] > 0 and sum(ways.values()) == SIZE


async def test_what_is_not_taken_is_the_readers_and_the_credit_counts_both():
    content = os.urandom(SIZE)
    taken = bytearray()
    pieces = []

    def half(data):
        size = len(data) // 2
        taken.extend(data[:size])
        pieces.append(bytes(data[:size]))
        return size

    async with connected({"pour": lambda far: pour(far, content)}) as (opener, _):
        stream = opener.open("pour")
        stream.shortcut(half)
        async with asyncio.timeout(60):
            while (event := await stream.next_event()) is not None:
                if isinstance(event, Data):
                    pieces.append(event.data)
    # Far more than the window of 300,000 bytes.
    assert b"".join(pieces) == content and len(taken) > LIMITS.window


async def test_nothing_is_offered_past_what_waits():
    offered = []
    content = os.urandom(200_000)

    async with connected({"pour": lambda far: pour(far, content)}) as (opener, _):
        stream = opener.open("pour")
        stream.shortcut(lambda data: offered.append(len(data)) or 0)
        # Nobody reads yet.
        async with asyncio.timeout(60):
            while len(stream._events) < 3:
                await asyncio.sleep(0.01)
        assert offered == []
        assert await asyncio.wait_for(drink(stream), 60) == content
