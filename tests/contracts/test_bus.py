"""The bus contract, run on every implementation."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest

from innkeeper.bus.contract import Data, Message, ServerCall
from innkeeper.bus.in_process import in_process_bus
from innkeeper.bus.link_bus import LinkBus
from innkeeper.bus.socketpair import make_socketpair, serve_socketpair, socketpair_bus
from innkeeper.errors import ConflictError, InnkeeperError, UnavailableError

pytestmark = pytest.mark.anyio
HOST = uuid4()


class Peer:
    """Verbs that show each feature."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.sent = 0

    def handlers(self):
        return {
            "echo": self.echo,
            "refuse": self.refuse,
            "crash": self.crash,
            "upload": self.upload,
            "download": self.download,
            "talk": self.talk,
            "hang": self.hang,
        }

    async def echo(self, call: ServerCall):
        return {"params": call.params}

    async def refuse(self, call: ServerCall):
        raise ConflictError("it is in use")

    async def crash(self, call: ServerCall):
        raise RuntimeError("secret internals")

    async def upload(self, call: ServerCall):
        total = 0
        async for event in call.events():
            if isinstance(event, Data):
                total += len(event.data)
        return {"bytes": total}

    async def download(self, call: ServerCall):
        for _ in range(call.params["chunks"]):
            await call.send_data(bytes(65536))
            self.sent += 65536
        return {}

    async def talk(self, call: ServerCall):
        async for event in call.events():
            if isinstance(event, Message):
                await call.send_message({"answer": event.body["n"] * 2})
        return {}

    async def hang(self, call: ServerCall):
        try:
            await asyncio.sleep(60)
        finally:
            self.cancelled.set()
        return {}


@asynccontextmanager
async def _socketpair(peer: Peer) -> AsyncIterator[LinkBus]:
    control_end, host_end = make_socketpair()
    async with serve_socketpair(host_end, HOST, peer.handlers()), socketpair_bus(control_end) as bus:
        yield bus


@pytest.fixture(params=["in_process", "socketpair"])
async def bus_and_peer(request):
    peer = Peer()
    make = in_process_bus(HOST, peer.handlers()) if request.param == "in_process" else _socketpair(peer)
    async with make as bus:
        yield bus, peer


async def test_a_request_is_answered(bus_and_peer):
    bus, _ = bus_and_peer
    assert bus.hosts() == [HOST]
    answer = await bus.request(HOST, "echo", {"a": [1, "ü", None]}, timeout_seconds=5)
    assert answer == {"params": {"verb": "echo", "a": [1, "ü", None]}}


async def test_errors_keep_their_type_and_internals_stay_inside(bus_and_peer):
    bus, _ = bus_and_peer
    with pytest.raises(ConflictError, match="it is in use"):
        await bus.request(HOST, "refuse", {}, timeout_seconds=5)
    with pytest.raises(InnkeeperError) as caught:
        await bus.request(HOST, "crash", {}, timeout_seconds=5)
    assert "secret" not in str(caught.value)
    with pytest.raises(InnkeeperError, match="Unknown verb"):
        await bus.request(HOST, "no-such", {}, timeout_seconds=5)


async def test_an_unknown_host_is_unavailable(bus_and_peer):
    bus, _ = bus_and_peer
    with pytest.raises(UnavailableError):
        await bus.request(uuid4(), "echo", {}, timeout_seconds=5)


async def test_upload_streams_with_end(bus_and_peer):
    bus, _ = bus_and_peer
    async with bus.open(HOST, "upload", {}) as call:
        for _ in range(100):
            await call.send_data(bytes(100_000))
        await call.send_end()
        assert await call.result() == {"bytes": 10_000_000}


async def test_a_slow_reader_holds_the_sender_back(bus_and_peer):
    bus, peer = bus_and_peer
    async with bus.open(HOST, "download", {"chunks": 200}) as call:
        await asyncio.sleep(0.2)
        assert 0 < peer.sent <= 1_048_576 + 65_536, "the window is one MiB"
        total = 0
        async for event in call.events():
            assert isinstance(event, Data)
            total += len(event.data)
        assert total == 200 * 65_536
        assert await call.result() == {}


async def test_messages_go_both_ways(bus_and_peer):
    bus, _ = bus_and_peer
    async with bus.open(HOST, "talk", {}) as call:
        await call.send_message({"n": 1})
        await call.send_message({"n": 2})
        await call.send_end()
        answers = [event.body["answer"] async for event in call.events() if isinstance(event, Message)]
    assert answers == [2, 4]


async def test_leaving_a_call_cancels_its_handler(bus_and_peer):
    bus, peer = bus_and_peer
    async with bus.open(HOST, "hang", {}):
        await asyncio.sleep(0.01)
    async with asyncio.timeout(20):
        await peer.cancelled.wait()


async def test_a_timeout_is_unavailable_and_cancels(bus_and_peer):
    bus, peer = bus_and_peer
    with pytest.raises(UnavailableError):
        await bus.request(HOST, "hang", {}, timeout_seconds=0.05)
    async with asyncio.timeout(20):
        await peer.cancelled.wait()


async def test_calls_run_at_the_same_time(bus_and_peer):
    bus, _ = bus_and_peer
    async with bus.open(HOST, "hang", {}):
        answers = await asyncio.gather(*(bus.request(HOST, "echo", {"n": n}, timeout_seconds=5) for n in range(50)))
    assert [answer["params"]["n"] for answer in answers] == list(range(50))


async def test_a_lost_host_fails_open_calls():
    peer = Peer()
    control_end, host_end = make_socketpair()
    async with serve_socketpair(host_end, HOST, peer.handlers()) as host, socketpair_bus(control_end) as bus:
        with pytest.raises(UnavailableError):
            async with bus.open(HOST, "hang", {}) as call:
                asyncio.get_running_loop().call_later(0.05, host.close)
                async with asyncio.timeout(20):
                    await call.result()
        assert bus.hosts() == []
