"""A hostile peer: whatever it sends, there is a ProtocolError or nothing, and memory stays within the limits."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.wire.peers import SMALL, fed, raw, settle

from innkeeper.wire.frames import Kind, ProtocolError
from innkeeper.wire.stream import JOIN_BYTES, Data

KINDS = st.sampled_from([*Kind, Kind.DATA, Kind.DATA, Kind.MESSAGE, 0, 13, 255])
IDS = st.integers(0, 9) | st.sampled_from([0, 1, 1, 3, 2**32 - 1])
PAYLOADS = st.sampled_from(
    [
        b"",
        b"x",
        bytes(4),
        bytes(8),
        b"{}",
        b'{"verb":"read"}',
        b'{"verb":"hang"}',
        b"[",
        b"\xff\xff\xff\xff",
        bytes(250),
    ]
) | st.binary(max_size=40)
FRAMES = st.lists(st.builds(raw, KINDS, IDS, PAYLOADS), max_size=25).map(b"".join)
VALID = b"".join(
    [
        raw(Kind.HELLO, 0, {"protocol": 1}),
        raw(Kind.MESSAGE, 1, {"started": True}),
        raw(Kind.DATA, 1, bytes(300)),
        raw(Kind.OPEN, 2, {"verb": "read"}),
        raw(Kind.DATA, 2, bytes(200)),
        raw(Kind.DATA2, 3, b"err"),
        raw(Kind.CREDIT, 3, bytes(4)),
        raw(Kind.END, 2),
        raw(Kind.PING, 0, bytes(8)),
        raw(Kind.OPEN, 4, {"verb": "hang"}),
        raw(Kind.CANCEL, 4),
        raw(Kind.RESULT, 3, {}),
        raw(Kind.END, 1),
        raw(Kind.ERROR, 1, {"code": "x", "message": "y"}),
    ]
)


@st.composite
def mutated(draw):
    data = bytearray(VALID)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data) - 1))
        what = draw(st.sampled_from("srdi"))
        if what == "s":
            data[at] = draw(st.integers(0, 255))
        elif what == "r":
            data[at:at] = data[at : at + draw(st.integers(1, 60))] * draw(st.integers(1, 9))
        elif what == "d":
            del data[at : at + draw(st.integers(1, 30))]
            data += b"\0"
        else:
            data[at:at] = draw(st.binary(max_size=20))
    return bytes(data)


def held(stream):
    """Bytes and objects that a stream keeps for its reader."""
    return sum(len(event.data) for event in stream._events if isinstance(event, Data)), len(stream._events)


async def survive(data, piece):
    async def hang(stream):
        await asyncio.Event().wait()

    async def read(stream):
        async for _ in stream.events():
            pass
        return {}

    faults = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    link, wire = fed(handlers={"hang": hang, "read": read}, opens_odd=True)
    streams = [link.open("x"), link.open("y")]
    try:
        for at in range(0, len(data), piece):
            link.feed(data[at : at + piece])
            assert len(link._buffer) <= SMALL.max_payload + 9
            for stream in (*streams, *link._streams.values()):
                size, count = held(stream)
                assert size <= SMALL.window
                assert count <= 2 + stream._max_pieces
                assert stream._unread_message_bytes <= 2 * SMALL.max_payload
            assert len(link._served) <= SMALL.max_streams
            if at % 5 == 0:
                await asyncio.sleep(0)
    except ProtocolError as error:
        link.close(error)
    assert len(wire.written) < 20_000
    link.close()
    await asyncio.wait_for(link.wait_closed(), 20)
    await settle(3)
    assert all(stream.over for stream in streams)
    assert (link._streams, link._served, faults) == ({}, {}, [])


@settings(max_examples=100)
@given(st.binary(max_size=300), st.integers(1, 64))
def test_random_bytes(data, piece):
    asyncio.run(survive(data, piece))


@settings(max_examples=100)
@given(FRAMES, st.integers(1, 64))
def test_random_frames(data, piece):
    asyncio.run(survive(data, piece))


@settings(max_examples=100)
@given(mutated(), st.integers(1, 64))
def test_valid_frames_with_faults(data, piece):
    asyncio.run(survive(data, piece))


@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_the_valid_frames_are_valid(piece):
    asyncio.run(survive(VALID, piece))


def test_a_megabyte_in_single_bytes_costs_little():
    async def flood():
        from innkeeper.wire.frames import Limits

        link, _ = fed(limits=Limits())
        stream = link.open("x")
        one = raw(Kind.DATA, 1, b"x") * 1_000
        for _ in range(100):
            link.feed(one)
        size, count = held(stream)
        assert (size, count) == (100_000, -(-100_000 // JOIN_BYTES))
        link.close()

    asyncio.run(flood())
