"""Guest ports over the bus, in real guests: bytes both ways, half closes, nobody listening, slow readers, hung-up callers."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import pytest
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, eventually

from innkeeper.bus.contract import Call, Data, End, Message
from innkeeper.core.host_verbs import to_wire
from innkeeper.core.port_verbs import DialPort, ListPorts
from innkeeper.errors import GuestError, InvalidRequestError, PortUnreachableError

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]
MIB = 1_048_576

# One port a behaviour. Each prints its port when it listens.
SERVERS = """
import os, socket, struct, threading, time
def upper(c):
    whole = b"".join(iter(lambda: c.recv(65536), b""))
    c.sendall(whole.upper())
def flood(c):
    sent = 0
    try:
        while sent < 64 << 20:
            sent += c.send(bytes(65536))
            open("/tmp/sent", "w").write(str(sent))
    except OSError:
        pass
    open("/tmp/flood-ended", "w").write("x")
def early(c):
    # Says all it has and closes its side, then reads on.
    c.sendall(b"hello"); c.shutdown(socket.SHUT_WR)
    got = b"".join(iter(lambda: c.recv(65536), b""))
    open("/tmp/early", "wb").write(got)
def reset(c):
    c.recv(1)
    c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
def silent(c):
    c.recv(1); open("/tmp/hung-up", "w").write("x")
def serve(port, what, host="127.0.0.1"):
    s = socket.create_server((host, port))
    def one(c):
        with c: what(c)
    def loop():
        while True: threading.Thread(target=one, args=(s.accept()[0],), daemon=True).start()
    threading.Thread(target=loop, daemon=True).start()
own = os.popen("hostname -I").read().split()[0]
for at, what in enumerate((upper, flood, early, reset, silent)): serve(7001 + at, what)
serve(7010, upper, "0.0.0.0"); serve(7011, upper, own)
open("/tmp/listening", "w").write("x")
time.sleep(10000)
"""
UPPER, FLOOD, EARLY, RESET, SILENT = range(7001, 7006)


@pytest.fixture(scope="module")
async def guest(host: Host) -> UUID:
    instance_id = await host.ensure()
    await host.write(instance_id, "/home/user/servers.py", SERVERS.encode())
    await host.ok(
        instance_id,
        "setsid python3 servers.py >servers.log 2>&1 & for i in $(seq 600); do [ -e /tmp/listening ] && exit; sleep 0.05; done; cat servers.log; exit 1",
    )
    return instance_id


@asynccontextmanager
async def dialled(host: Host, instance_id: UUID, port: int) -> AsyncIterator[Call]:
    request = DialPort(instance_id, port)
    async with (
        asyncio.timeout(60),
        host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call,
    ):
        yield call


async def everything(call: Call) -> bytes:
    return b"".join([event.data async for event in call.events() if isinstance(event, Data)])


async def test_bytes_go_both_ways_and_a_half_close_is_one(host: Host, guest: UUID) -> None:
    content = bytes(range(97, 123)) * 100_000
    async with dialled(host, guest, UPPER) as call:
        # Ahead of the message that says it is connected.
        feeding = asyncio.ensure_future(call.send_data(content))
        seen = []
        got = bytearray()
        await feeding
        await call.send_end()
        async for event in call.events():
            seen.append(type(event))
            if isinstance(event, Data):
                got += event.data
        assert hashlib.sha256(got).digest() == hashlib.sha256(content.upper()).digest()
        assert seen[0] is Message and seen[-1] is End
        assert await call.result() == {}


@pytest.mark.parametrize("port", [7010, 7011])
async def test_every_own_address_is_found(host: Host, guest: UUID, port: int) -> None:
    async with dialled(host, guest, port) as call:
        await call.send_data(b"abc")
        await call.send_end()
        assert await everything(call) == b"ABC"


async def test_the_guest_may_close_its_side_first(host: Host, guest: UUID) -> None:
    async with dialled(host, guest, EARLY) as call:
        events = call.events()
        got = b""
        async for event in events:
            if isinstance(event, Data):
                got += event.data
            if isinstance(event, End):
                break
        assert got == b"hello"
        await call.send_data(b"still here")
        await call.send_end()
        assert await call.result() == {}
    assert await eventually(lambda: _content(host, guest, "/tmp/early")) == b"still here"


async def test_nobody_listens(host: Host, guest: UUID) -> None:
    async with dialled(host, guest, 9) as call:
        with pytest.raises(PortUnreachableError, match="Nothing listens"):
            await call.result()
    for port in (0, 65_536, -1):
        with pytest.raises(InvalidRequestError):
            await host.request(DialPort(guest, port))


async def test_a_reset_is_an_error_not_an_end(host: Host, guest: UUID) -> None:
    async with dialled(host, guest, RESET) as call:
        await call.send_data(b"x")
        with pytest.raises(GuestError):
            await call.result()


async def test_a_caller_that_reads_nothing_stops_the_guest(host: Host, guest: UUID) -> None:
    async with dialled(host, guest, FLOOD):
        # Grows until every buffer on the way is full, and no further.
        last, same = -1, 0
        while same < 5:
            await asyncio.sleep(0.2)
            now = int(await _content(host, guest, "/tmp/sent") or 0)
            same, last = (same + 1 if now == last and now else 0), now
        assert 0 < last < 32 * MIB
    # And hanging up ends it.
    await eventually(lambda: _content(host, guest, "/tmp/flood-ended"))


async def test_a_caller_that_hangs_up_is_told_to_the_guest(host: Host, guest: UUID) -> None:
    machine = host.machine(guest)
    async with dialled(host, guest, SILENT) as call:
        async for event in call.events():
            assert event == Message({"connected": True})
            break
        assert machine.uses == 1
    await eventually(lambda: _content(host, guest, "/tmp/hung-up"))
    await eventually(lambda: machine.uses == 0)


async def test_many_at_once_stay_apart(host: Host, guest: UUID) -> None:
    async def one(number: int) -> bytes:
        async with dialled(host, guest, UPPER) as call:
            await call.send_data(f"caller {number}".encode() * 1000)
            await call.send_end()
            return await everything(call)

    answers = await asyncio.gather(*(one(number) for number in range(40)))
    assert answers == [f"CALLER {number}".encode() * 1000 for number in range(40)]


async def test_listening_ports_are_listed(host: Host, guest: UUID) -> None:
    rows = (await host.request(ListPorts(guest)))["ports"]
    by_port = {row["port"]: row for row in rows}
    assert {UPPER, FLOOD, EARLY, RESET, SILENT} <= by_port.keys()
    assert by_port[UPPER]["address"] == "127.0.0.1"
    assert by_port[7010]["address"] == "0.0.0.0"
    assert [row["port"] for row in rows] == sorted(row["port"] for row in rows)


async def _content(host: Host, instance_id: UUID, path: str) -> bytes:
    answer = await host.run(instance_id, f"cat {path} 2>/dev/null")
    return answer.output
