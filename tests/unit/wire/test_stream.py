"""Two ends of a link: flow, order, back-pressure and cancellation."""

import asyncio

import pytest
from tests.unit.wire.peers import SMALL, broken, joined, settle

from innkeeper.errors import LinkLostError
from innkeeper.wire.stream import Data, End

pytestmark = pytest.mark.anyio


async def echo(stream):
    count = 0
    async for event in stream.events():
        if isinstance(event, Data):
            count += len(event.data)
            await stream.send_data(event.data, channel=stream.params.get("channel", 1))
    await stream.send_end()
    return {"bytes": count}


async def pour(stream):
    await stream.send_data(bytes(stream.params["bytes"]))
    return {}


async def never_read(stream):
    await asyncio.Event().wait()


HANDLERS = {"echo": echo, "pour": pour, "never_read": never_read}


@pytest.fixture
async def ends():
    opener, server = joined(HANDLERS)
    yield opener, server
    opener.close()
    await settle()
    await asyncio.wait_for(server.wait_closed(), 20)
    assert (server._streams, server._served) == ({}, {})


async def send(stream, content, piece=333):
    for at in range(0, len(content), piece):
        await stream.send_data(memoryview(content)[at : at + piece])
    await stream.send_end()


async def collect(stream):
    content = {1: bytearray(), 2: bytearray()}
    ended = False
    while (event := await stream.next_event()) is not None:
        if isinstance(event, Data):
            content[event.channel] += event.data
        ended = ended or isinstance(event, End)
    return bytes(content[1]), bytes(content[2]), ended, await stream.result()


async def test_interleaved_streams_keep_their_bytes_apart(ends):
    streams = [ends[0].open("echo", {"channel": 1 + number % 2}) for number in range(4)]
    contents = [bytes((number * 7 + at) % 256 for at in range(5_000 + number)) for number in range(4)]
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        for stream, content in zip(streams, contents, strict=True):
            group.create_task(send(stream, content))
        readers = [group.create_task(collect(stream)) for stream in streams]
    for number, reader in enumerate(readers):
        both = [b"", b""]
        both[number % 2] = contents[number]
        assert reader.result() == (*both, True, {"bytes": 5_000 + number})


async def test_a_reader_that_does_not_read_holds_the_other_end_back_and_nobody_else(ends):
    slow, quick = ends[0].open("pour", {"bytes": 3_000}), ends[0].open("pour", {"bytes": 3_000})
    content, _, _, _ = await asyncio.wait_for(collect(quick), 5)
    assert len(content) == 3_000
    await settle(200)
    assert not slow.over
    assert sum(len(event.data) for event in slow._events) == SMALL.window
    content, _, _, result = await asyncio.wait_for(collect(slow), 5)
    assert (len(content), result) == (3_000, {})


async def test_a_server_that_does_not_read_holds_the_opener_back(ends):
    stream = ends[0].open("never_read")
    sending = asyncio.create_task(stream.send_data(bytes(SMALL.window + 1)))
    await settle(200)
    assert not sending.done()
    stream.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    await settle()
    assert ends[1]._served == {}


async def test_the_socket_holds_senders_back_and_one_that_is_cancelled_harms_no_other():
    opener, server = joined(HANDLERS, high=100)
    server._transport.read(False)
    streams = [opener.open("never_read") for _ in range(3)]
    senders = [asyncio.create_task(stream.send_data(bytes(200))) for stream in streams]
    await settle()
    assert opener._transport.paused
    senders[1].cancel()
    await settle()
    assert [sender.done() for sender in senders] == [False, True, False]
    late = asyncio.create_task(streams[1].send_message({}))
    await settle()
    assert not late.done()
    server._transport.read(True)
    await asyncio.wait_for(asyncio.gather(senders[0], senders[2], late), 20)
    opener.close()
    await settle()
    await server.wait_closed()


async def test_sending_on_a_stream_that_ended_is_a_lost_call(ends):
    stream = ends[0].open("pour", {"bytes": 0})
    await stream.result()
    for work in (stream.send_data(b"x"), stream.send_message({})):
        with pytest.raises(LinkLostError):
            await work
    stream.cancel()
    assert broken(ends[0]) is None


async def test_an_end_that_crosses_the_result_is_nothing(ends):
    stream = ends[0].open("pour", {"bytes": 10})
    await stream.send_end()
    await stream.send_end()
    assert (await collect(stream))[0] == bytes(10)
    await settle()
    assert (broken(ends[0]), broken(ends[1])) == (None, None)


async def test_a_lost_connection_ends_both_sides():
    opener, server = joined(HANDLERS)
    stream = opener.open("never_read")
    await settle()
    assert len(server._served) == 1
    opener._transport.abort()
    with pytest.raises(LinkLostError):
        await asyncio.wait_for(stream.result(), 20)
    await asyncio.wait_for(server.wait_closed(), 20)
    assert server._served == {}
