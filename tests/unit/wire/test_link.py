"""What a link does with what it is sent: by hand, frame by frame."""

import asyncio
import gc
from dataclasses import replace

import pytest
from tests.unit.virtual_time import anyio_backend as anyio_backend
from tests.unit.wire.peers import SMALL, broken, fed, raw, settle

from innkeeper.errors import ConflictError, InnkeeperError, LinkLostError, PayloadTooLargeError
from innkeeper.wire.frames import Kind, ProtocolError
from innkeeper.wire.stream import Data, End, Message

pytestmark = pytest.mark.anyio


async def hang(stream):
    await asyncio.Event().wait()


async def read_all(stream):
    return {"bytes": sum([len(event.data) async for event in stream.events() if isinstance(event, Data)])}


SERVED = {"handlers": {"hang": hang, "read": read_all}, "opens_odd": True}
OPEN = raw(Kind.OPEN, 2, {"verb": "hang"})
CREDIT_MAX = b"\xff\xff\xff\xff"
# Each is fed to a link that has opened stream 1; the last frame is the wrong one.
BREACHES = {
    "kind 0": ([raw(0, 1)], "an unknown kind of frame"),
    "kind 13": ([raw(13, 1)], "an unknown kind of frame"),
    "too long": ([b"\0\0\2\1\0\0\0\1\4"], "a frame is too long"),
    "too long data": ([b"\0\0\2\1\0\0\0\1\2"], "a frame is too long"),
    "too long on a stream that is not known": ([b"\xff\xff\xff\xff\0\0\0\7\2"], "a frame is too long"),
    "not JSON": ([raw(Kind.MESSAGE, 1, b"{")], "a payload is not JSON"),
    "not an object": ([raw(Kind.RESULT, 1, b"[]")], "a payload is not a JSON object"),
    "an error that is no object": ([raw(Kind.ERROR, 1, b"1")], "a payload is not a JSON object"),
    "deep": ([raw(Kind.MESSAGE, 1, b'{"a":' * 100)], "a payload is not JSON"),
    "beyond the credit": ([raw(Kind.DATA, 1, bytes(500))] * 2 + [raw(Kind.DATA, 1, b"x")], "data beyond the credit"),
    "beyond the credit on both channels": (
        [raw(Kind.DATA, 1, bytes(500)), raw(Kind.DATA2, 1, bytes(501))],
        "data beyond the credit",
    ),
    "data after the end": ([raw(Kind.END, 1), raw(Kind.DATA, 1, b"x")], "data after the end"),
    "4 messages": ([raw(Kind.MESSAGE, 1, {})] * 4, "too many unread messages"),
    "large messages": ([raw(Kind.MESSAGE, 1, {"a": "x" * 300})] * 2, "too many unread messages"),
    "many small pieces": ([raw(Kind.DATA, 1, b"x"), raw(Kind.DATA2, 1, b"y")] * 34, "too many unread pieces of data"),
    "credit overflow": ([raw(Kind.CREDIT, 1, CREDIT_MAX)], "credit overflow"),
    "short credit": ([raw(Kind.CREDIT, 1, b"123")], "a malformed credit"),
    "end with bytes": ([raw(Kind.END, 1, b"x")], "a malformed end"),
    "short ping": ([raw(Kind.PING, 0, b"1234567")], "a malformed ping"),
    "long pong": ([raw(Kind.PONG, 0, b"123456789")], "a malformed pong"),
    "ping on a stream": ([raw(Kind.PING, 1, bytes(8))], "a frame of the link on a stream"),
    "hello on a stream": ([raw(Kind.HELLO, 1, {})], "a frame of the link on a stream"),
    "data on the link": ([raw(Kind.DATA, 0, b"x")], "a frame of a stream on the link"),
    "open on the link": ([raw(Kind.OPEN, 0, {})], "a frame of a stream on the link"),
    "result on the link": ([raw(Kind.RESULT, 0, {})], "a frame of a stream on the link"),
    "a second hello": ([raw(Kind.HELLO, 0, {}), raw(Kind.HELLO, 0, {})], "a second hello"),
    "hello that is none": ([raw(Kind.HELLO, 0, b"{")], "a payload is not JSON"),
    "cancel of our stream": ([raw(Kind.CANCEL, 1)], "the peer cancelled a stream that it did not open"),
    "open of the wrong parity": ([raw(Kind.OPEN, 3, {"verb": "hang"})], "an unexpected open"),
    "open of a used id": ([OPEN, OPEN], "an unexpected open"),
    "open of a smaller id": ([raw(Kind.OPEN, 4, {"verb": "hang"}), OPEN], "an unexpected open"),
    "open of a cancelled id": ([OPEN, raw(Kind.CANCEL, 2), OPEN], "an unexpected open"),
    "open that is no object": ([raw(Kind.OPEN, 2, b"[]")], "a payload is not a JSON object"),
    "result for a stream of theirs": ([OPEN, raw(Kind.RESULT, 2, {})], "a result for a stream that the peer opened"),
    "error for a stream of theirs": ([OPEN, raw(Kind.ERROR, 2, {})], "a result for a stream that the peer opened"),
    "second channel of the opener": ([OPEN, raw(Kind.DATA2, 2, b"x")], "a second channel from the opener"),
}


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "byte by byte"])
@pytest.mark.parametrize("name", BREACHES)
async def test_a_breach_closes_the_link_and_nothing_less_does(name, at_once):
    sent, reason = BREACHES[name]
    link, wire = fed(**SERVED)
    stream = link.open("x")
    for part in sent[:-1]:
        link.data_received(part)
    assert broken(link) is None
    for part in [sent[-1]] if at_once else [sent[-1][at : at + 1] for at in range(len(sent[-1]))]:
        link.data_received(part)
    assert (broken(link), wire.aborted) == (reason, True)
    with pytest.raises(LinkLostError):
        await stream.result()
    await link.wait_closed()


async def test_an_open_on_a_link_without_handlers_is_a_breach():
    link, _ = fed()
    link.data_received(OPEN)
    assert broken(link) == "an unexpected open"


async def test_what_crossed_an_end_is_ignored():
    link, _ = fed(**SERVED)
    stream = link.open("x")
    link.data_received(raw(Kind.RESULT, 1, {"n": 1}))
    late = [Kind.DATA, Kind.DATA2, Kind.END, Kind.RESULT, Kind.ERROR, Kind.MESSAGE, Kind.CANCEL]
    for kind in late:
        link.data_received(raw(kind, 1, b"" if kind in (Kind.END, Kind.CANCEL) else b"{}"))
        link.data_received(raw(kind, 77, b"" if kind in (Kind.END, Kind.CANCEL) else b"{}"))
    link.data_received(raw(Kind.CREDIT, 1, bytes(4)))
    assert await stream.result() == {"n": 1}
    assert broken(link) is None
    link.close()


async def test_a_repeated_end_is_heard_once_and_costs_nothing():
    link, _ = fed()
    stream = link.open("x")
    link.data_received(raw(Kind.END, 1) * 10_000)
    assert len(stream._events) == 1
    link.close()


async def test_small_pieces_become_one_and_keep_their_order():
    link, _ = fed()
    stream = link.open("x")
    content = bytes(range(250)) * 4
    for at in range(1_000):
        link.data_received(raw(Kind.DATA, 1, content[at : at + 1]))
    assert len(stream._events) == 1
    link.data_received(raw(Kind.RESULT, 1, {}))
    got = []
    while (event := await stream.next_event()) is not None:
        got.append(event)
    assert got == [Data(content)]
    link.close()


async def test_credit_comes_back_in_steps_for_what_was_read_only():
    link, wire = fed()
    stream = link.open("x")
    wire.take()
    link.data_received(raw(Kind.DATA, 1, bytes(249)) + raw(Kind.MESSAGE, 1, {}) + raw(Kind.DATA2, 1, b"x"))
    await stream.next_event()
    await stream.next_event()
    assert wire.take() == []
    await stream.next_event()
    assert wire.take() == [(Kind.CREDIT, 1, (250).to_bytes(4, "big"))]
    link.data_received(raw(Kind.DATA, 1, bytes(500)) * 2)
    assert broken(link) is None
    link.data_received(raw(Kind.DATA, 1, b"x"))
    assert broken(link) == "data beyond the credit"


async def test_reading_makes_room_for_messages():
    link, _ = fed()
    stream = link.open("x")
    for number in range(20):
        link.data_received(raw(Kind.MESSAGE, 1, {"n": number, "x": "y" * 400}))
        assert (await stream.next_event()).body["n"] == number
    assert broken(link) is None
    link.close()


async def test_pings():
    link, wire = fed()
    link.data_received(raw(Kind.PONG, 0, bytes(8)))
    link.data_received(raw(Kind.PING, 0, b"12345678"))
    assert wire.take() == [(Kind.PONG, 0, b"12345678")]
    first, second = asyncio.create_task(link.ping()), asyncio.create_task(link.ping())
    await settle()
    first.cancel()
    await settle()
    link.data_received(raw(Kind.PONG, 0, bytes(8)))
    await settle()
    assert not second.done()
    link.data_received(raw(Kind.PONG, 0, bytes(8)))
    await second
    third = asyncio.create_task(link.ping())
    await settle()
    link.close()
    for lost in (third, asyncio.create_task(link.ping())):
        with pytest.raises(LinkLostError):
            await asyncio.wait_for(lost, 20)


async def test_hello_and_its_loss():
    link, wire = fed()
    link.send_hello({"protocol": 1})
    assert wire.take() == [(Kind.HELLO, 0, b'{"protocol":1}')]
    link.data_received(raw(Kind.HELLO, 0, {"protocol": 1}))
    assert await link.hello == {"protocol": 1}
    link.close()
    other, _ = fed()
    other.connection_lost(None)
    assert other.hello.cancelled()


async def test_a_peer_that_never_reads_is_cut_off():
    link, wire = fed(stuck=True)
    for _ in range(300):
        link.data_received(raw(Kind.PING, 0, bytes(8)))
    assert broken(link) == "the peer does not read"
    assert wire.aborted
    assert len(wire.written) <= SMALL.max_send_buffer + 17


async def test_errors_are_typed_and_bounded():
    link, _ = fed(make_error=lambda code, message: InnkeeperError(f"{code}|{message}"))
    for body, text in (
        ({"code": "c" * 99, "message": "m"}, "c" * 64 + "|m"),
        ({"code": ["x"], "message": {"y": 1}}, "|"),
        ({}, "|"),
        ({"code": "c", "message": "m" * 400}, "c|" + "m" * 400),
    ):
        stream = link.open("x")
        link.data_received(raw(Kind.ERROR, stream.id, body))
        with pytest.raises(InnkeeperError) as caught:
            await stream.result()
        assert str(caught.value) == text
    link.close()
    assert isinstance(fed()[0]._make_error("conflict", "m"), ConflictError)


async def test_opening_what_does_not_fit_or_on_a_closed_link():
    link, wire = fed()
    with pytest.raises(PayloadTooLargeError):
        link.open("x", {"a": "b" * 600})
    stream = link.open("x")
    with pytest.raises(PayloadTooLargeError):
        await stream.send_message({"a": "b" * 600})
    assert (stream.id, len(wire.take())) == (1, 1)
    link.close()
    with pytest.raises(LinkLostError):
        link.open("x")
    assert wire.take() == []


async def test_a_result_is_the_last_event():
    link, _ = fed()
    stream = link.open("x")
    everything = raw(Kind.MESSAGE, 1, {"m": 1}) + raw(Kind.DATA, 1, b"abc") + raw(Kind.DATA2, 1, b"err")
    everything += raw(Kind.END, 1) + raw(Kind.RESULT, 1, {"r": 1})
    for at in range(len(everything)):
        link.data_received(everything[at : at + 1])
    got = [event async for event in stream.events()]
    assert got == [Message({"m": 1}), Data(b"abc", 1), Data(b"err", 2), End()]
    assert await stream.result() == {"r": 1}
    assert stream.over
    link.close()


async def test_every_split_gives_the_same_events():
    everything = raw(Kind.HELLO, 0, {}) + raw(Kind.DATA, 1, b"abc") + raw(Kind.PING, 0, bytes(8))
    everything += raw(Kind.DATA, 3, b"x") + raw(Kind.MESSAGE, 1, {"m": 2}) + raw(Kind.DATA, 1, b"def")
    everything += raw(Kind.RESULT, 3, {}) + raw(Kind.RESULT, 1, {"r": 1})
    for at in range(len(everything) + 1):
        link, wire = fed()
        one, three = link.open("x"), link.open("y")
        wire.take()
        link.data_received(everything[:at])
        link.data_received(everything[at:])
        assert wire.take() == [(Kind.PONG, 0, bytes(8))]
        events = [event async for event in one.events()]
        content = b"".join(event.data for event in events if isinstance(event, Data))
        assert (content, Message({"m": 2}) in events) == (b"abcdef", True), at
        assert [event async for event in three.events()] == [Data(b"x")]
        link.close()


async def test_too_many_streams_are_refused_by_an_error_only():
    link, wire = fed(**SERVED)
    for number in range(2, 12, 2):
        link.data_received(raw(Kind.OPEN, number, {"verb": "hang"}))
    ((kind, stream_id, payload),) = wire.take()
    assert (kind, stream_id) == (Kind.ERROR, 10)
    assert b"too_many_streams" in payload
    link.data_received(raw(Kind.CANCEL, 4))
    await settle()
    link.data_received(raw(Kind.OPEN, 12, {"verb": "read"}) + raw(Kind.DATA, 12, b"abc") + raw(Kind.END, 12))
    await settle()
    assert wire.take() == [(Kind.RESULT, 12, b'{"bytes":3}')]
    link.close()
    await link.wait_closed()


@pytest.mark.parametrize("verb", ["nothing", 5, None, ["hang"], {"hang": 1}])
async def test_unknown_verbs(verb):
    link, wire = fed(**SERVED)
    link.data_received(raw(Kind.OPEN, 2, {"verb": verb}))
    await settle()
    assert wire.take() == [(Kind.ERROR, 2, b'{"code":"unknown_verb","message":"Unknown verb"}')]
    link.close()


async def test_what_a_handler_does_wrong_is_an_error_of_its_call():
    async def raises(stream):
        raise RuntimeError("internals")

    async def refuses(stream):
        raise ConflictError("m" * 3_000)

    async def answers_nonsense(stream):
        return {"x": object()}

    async def answers_too_much(stream):
        return {"x": "y" * 600}

    async def broke_off(stream):
        raise asyncio.CancelledError

    handlers = {f.__name__: f for f in (raises, refuses, answers_nonsense, answers_too_much, broke_off)}
    link, wire = fed(handlers=handlers)
    codes = {}
    for number, name in enumerate(handlers, 1):
        link.data_received(raw(Kind.OPEN, 2 * number, {"verb": name}))
        await settle()
        ((kind, _, payload),) = wire.take()
        assert kind is Kind.ERROR
        assert b"internals" not in payload
        assert len(payload) < 2_100
        codes[name] = payload.split(b'"')[3].decode()
    assert codes == {
        "raises": "internal_error",
        "refuses": "conflict",
        "answers_nonsense": "internal_error",
        "answers_too_much": "payload_too_large",
        "broke_off": "link_lost",
    }
    assert (broken(link), link._streams, link._served) == (None, {}, {})
    link.close()


@pytest.mark.parametrize("then", ["ends", "raises", "returns"])
async def test_nothing_is_sent_after_a_cancel(then):
    stopped = []

    async def handler(stream):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            stopped.append(stream.id)
            if then == "raises":
                raise RuntimeError("while stopping") from None
            if then == "returns":
                return {}
            raise

    link, wire = fed(handlers={"x": handler})
    link.data_received(raw(Kind.OPEN, 2, {"verb": "x"}))
    await settle()
    link.data_received(raw(Kind.CANCEL, 2))
    # One that is cancelled before it began.
    link.data_received(raw(Kind.OPEN, 4, {"verb": "x"}) + raw(Kind.CANCEL, 4))
    await settle()
    assert (stopped, wire.take(), broken(link)) == ([2], [], None)
    assert (link._streams, link._served) == ({}, {})
    link.close()


async def test_cancelling_our_own_stream():
    link, wire = fed()
    stream = link.open("x")
    reader = asyncio.create_task(stream.next_event())
    await settle()
    wire.take()
    stream.cancel()
    stream.cancel()
    assert wire.take() == [(Kind.CANCEL, 1, b"")]
    with pytest.raises(asyncio.CancelledError):
        await reader
    await stream.send_end()
    assert wire.take() == []
    link.close()


async def test_a_request_that_takes_too_long_is_cancelled():
    link, wire = fed()
    with pytest.raises(TimeoutError):
        await link.request("x", timeout_seconds=0.01)
    assert [kind for kind, _, _ in wire.take()] == [Kind.OPEN, Kind.CANCEL]
    assert link._streams == {}
    link.close()


async def test_closing_wakes_everybody_and_leaves_nothing():
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    faults = []
    before = asyncio.all_tasks()
    link, _ = fed(**SERVED)
    link.data_received(OPEN)
    reading, sending, throttled = link.open("a"), link.open("b"), link.open("c")
    link.pause_writing()
    await settle()
    waiting = [
        asyncio.create_task(work)
        for work in (
            reading.result(),
            sending.send_data(bytes(1_001)),
            throttled.send_message({}),
            link.ping(),
            link.request("d", timeout_seconds=60),
        )
    ]
    link_closed = asyncio.create_task(link.wait_closed())
    await settle()
    assert [task.done() for task in waiting] == [False] * 5
    link.close(ProtocolError("enough"))
    link.close(None)
    link.connection_lost(None)
    done = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 20)
    await link_closed
    assert [type(one) for one in done] == [LinkLostError, LinkLostError, type(None), LinkLostError, LinkLostError]
    assert broken(link) == "enough"
    assert (link._streams, link._served) == ({}, {})
    assert asyncio.all_tasks() == before
    del waiting, done, link_closed, reading, sending, throttled, link
    gc.collect()
    await settle()
    assert faults == []


SLOW = replace(SMALL, frames_per_second=1_000, frames_at_once=50)


async def test_a_flood_of_frames_is_taken_at_its_pace_and_in_order():
    link, wire = fed(limits=SLOW)
    numbers = [number.to_bytes(8, "big") for number in range(200)]
    link.data_received(b"".join(raw(Kind.PING, 0, number) for number in numbers))
    answered = wire.take()
    # 50 at once, and what was allowed while those were read.
    assert (50 <= len(answered) < 150, wire.reading) == (True, False)
    # What the transport had read before it heard of the pause.
    link.data_received(raw(Kind.PING, 0, b"lastlast"))
    async with asyncio.timeout(20):
        while len(answered) < 201:
            await asyncio.sleep(0.01)
            answered += wire.take()
    assert [payload for _, _, payload in answered] == [*numbers, b"lastlast"]
    assert wire.reading
    link.close()


async def test_a_large_frame_costs_what_it_takes():
    link, wire = fed(limits=SLOW)
    link.data_received(raw(Kind.RESULT, 99) * 40)
    assert wire.reading
    other, wire = fed(limits=replace(SLOW, max_payload=2_097_152))
    stream = other.open("verb")
    other.data_received(raw(Kind.MESSAGE, stream.id, b'{"x": [' + b"[]," * 500_000 + b"0]}"))
    assert not wire.reading
    for each in (link, other):
        each.close()


async def test_pieces_of_a_few_bytes_that_cannot_be_joined_cost_more():
    link, wire = fed(limits=SLOW)
    stream = link.open("verb")
    link.data_received(raw(Kind.DATA, stream.id, b"x") * 40)
    assert wire.reading
    link.data_received((raw(Kind.DATA2, stream.id, b"x") + raw(Kind.DATA, stream.id, b"x")) * 5)
    assert not wire.reading
    link.close()


async def test_a_flood_that_is_held_ends_with_the_link():
    link, wire = fed(limits=SLOW)
    link.data_received(raw(Kind.PING, 0, bytes(8)) * 200)
    link.close()
    wire.take()
    await asyncio.sleep(0.2)
    assert wire.take() == []
    assert not wire.reading
