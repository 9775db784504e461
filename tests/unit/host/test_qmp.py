"""The control session, with a QEMU that keeps to the protocol and with one that a guest has taken over."""

import asyncio
import contextlib
import json
import os
import socket
from contextlib import asynccontextmanager

import pytest

from innkeeper.host.drivers import qmp
from innkeeper.host.drivers.qmp import MAX_LINE_BYTES, UNASKED_AT_ONCE, Qmp, QmpError, QmpLostError, QmpRefusedError

pytestmark = pytest.mark.anyio
GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}}, "capabilities": ["oob"]}}
SECONDS = 20


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Monitor:
    """QEMU's end of the socket, by hand."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    def say(self, *bodies):
        for body in bodies:
            self.writer.write((body if isinstance(body, bytes) else json.dumps(body).encode()) + b"\r\n")

    async def hear(self):
        return json.loads(await self.reader.readline())

    async def answer(self, value):
        heard = await self.hear()
        self.say({"return": value, "id": heard["id"]})
        return heard

    async def greet(self):
        self.say(GREETING)
        assert (await self.answer({}))["execute"] == "qmp_capabilities"


@asynccontextmanager
async def monitor(directory, act):
    """A listening socket whose every session does `act`; what fails in it fails the test."""
    failures, sessions = [], []

    async def serve(reader, writer):
        sessions.append(asyncio.current_task())
        try:
            await act(Monitor(reader, writer))
        except (OSError, asyncio.IncompleteReadError):
            pass  # The session was cut off, as some of these must be.
        except BaseException as error:
            failures.append(error)
            raise
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    with contextlib.chdir(directory):
        server = await asyncio.start_unix_server(serve, "qmp.sock")
    try:
        async with asyncio.timeout(SECONDS):
            yield directory / "qmp.sock"
    finally:
        server.close()
        if sessions:
            await asyncio.wait(sessions, timeout=SECONDS)
    assert failures == []


async def test_commands_are_answered_by_their_numbers_in_any_order(tmp_path):
    async def act(qemu):
        await qemu.greet()
        first, second = await qemu.hear(), await qemu.hear()
        assert second["arguments"] == {"path": "/machine"}
        qemu.say({"return": "second", "id": second["id"]}, {"return": "first", "id": first["id"]})
        await qemu.reader.read()

    async with monitor(tmp_path, act) as path:
        session = await Qmp.connect(path)
        one = asyncio.ensure_future(session.execute("query-status"))
        other = asyncio.ensure_future(session.execute("qom-list", {"path": "/machine"}))
        assert await asyncio.gather(one, other) == ["first", "second"]
        await session.close()
        await session.close()
        with pytest.raises(QmpLostError):
            await session.execute("query-status")


async def test_a_long_path_is_no_obstacle(tmp_path):
    deep = tmp_path / ("x" * 120)
    deep.mkdir()

    async def act(qemu):
        await qemu.greet()
        await qemu.reader.read()

    async with monitor(deep, act) as path:
        assert len(str(path)) > 107
        session = await Qmp.connect(path)
        await session.close()


async def test_a_descriptor_goes_with_its_command(tmp_path):
    with contextlib.chdir(tmp_path), socket.socket(socket.AF_UNIX) as listener:
        listener.bind("qmp.sock")
        listener.listen(1)

        def qemu():
            end, _ = listener.accept()
            with end, end.makefile("rw") as lines:
                end.settimeout(SECONDS)
                end.send(json.dumps(GREETING).encode() + b"\r\n")
                number = json.loads(lines.readline())["id"]
                end.send(json.dumps({"return": {}, "id": number}).encode() + b"\n")
                line, descriptors, _, _ = socket.recv_fds(end, 9999, 4)
                heard = json.loads(line)
                with os.fdopen(descriptors[0], "wb") as into:
                    into.write(b"from QEMU")
                end.send(json.dumps({"return": {}, "id": heard["id"]}).encode() + b"\n")
                return heard, len(descriptors)

        serving = asyncio.get_running_loop().run_in_executor(None, qemu)
        session = await Qmp.connect(tmp_path / "qmp.sock")
        out, into = os.pipe()
        await session.hand_over("state", into)
        os.close(into)
        heard, count = await serving
        with os.fdopen(out, "rb") as file:
            # The end of the file: nobody has another copy.
            assert file.read() == b"from QEMU"
        assert (heard["execute"], heard["arguments"], count) == ("getfd", {"fdname": "state"}, 1)
        await session.close()


async def test_a_descriptor_for_a_qemu_that_does_not_read_is_lost(tmp_path):
    async def act(qemu):
        await qemu.greet()
        qemu.reader._transport.pause_reading()
        await asyncio.sleep(SECONDS)

    async with monitor(tmp_path, act) as path:
        session = await Qmp.connect(path)
        stuck = asyncio.ensure_future(session.execute("x", {"long": "x" * (4 << 20)}, timeout_seconds=SECONDS * 2))
        await asyncio.sleep(0.1)
        with pytest.raises(QmpLostError, match="does not read"):
            await session.hand_over("state", 0)
        await session.close()
        with pytest.raises(QmpLostError):
            await stuck


async def test_events_are_heard_between_answers(tmp_path):
    async def act(qemu):
        await qemu.greet()
        heard = await qemu.hear()
        qemu.say({"event": "STOP", "timestamp": {}}, {"return": {}, "id": heard["id"]})
        qemu.say({"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-shutdown"}})
        await qemu.reader.read()

    heard = []
    over = asyncio.Event()

    def on_event(event):
        heard.append((event.name, dict(event.data)))
        if event.name == "SHUTDOWN":
            over.set()

    async with monitor(tmp_path, act) as path:
        session = await Qmp.connect(path, on_event=on_event)
        await session.execute("stop")
        await over.wait()
        await session.close()
    assert heard == [("STOP", {}), ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})]


async def test_a_refusal_is_quoted_short_and_printable(tmp_path):
    async def act(qemu):
        await qemu.greet()
        heard = await qemu.hear()
        qemu.say({"error": {"class": "GenericError", "desc": "no\x1b[2J such " + "x" * 9999}, "id": heard["id"]})
        heard = await qemu.hear()
        qemu.say({"error": "nonsense", "id": heard["id"]})
        await qemu.reader.read()

    async with monitor(tmp_path, act) as path:
        session = await Qmp.connect(path)
        with pytest.raises(QmpRefusedError) as refused:
            await session.execute("device_add")
        assert refused.value.kind == "GenericError"
        assert str(refused.value).startswith("QEMU refused device_add: no?[2J such xxx")
        assert len(str(refused.value)) < 400
        with pytest.raises(QmpRefusedError):
            await session.execute("device_add")
        await session.close()


@pytest.mark.parametrize(
    "greeting",
    [
        {"hello": "world"},
        {"QMP": 3},
        b"no json",
        b"[1]",
        b"[" * 100_000,
        b"1e999",
        b"x" * (MAX_LINE_BYTES + 9),
        b"\xff",
    ],
)
async def test_a_greeting_that_is_none_is_refused(tmp_path, greeting):
    async def act(qemu):
        qemu.say(greeting)
        await qemu.reader.read()

    async with monitor(tmp_path, act) as path:
        with pytest.raises(QmpError):
            await Qmp.connect(path)


async def test_nobody_there_or_nobody_that_speaks_is_lost(tmp_path, monkeypatch):
    with pytest.raises(QmpLostError, match="cannot be reached"):
        await Qmp.connect(tmp_path / "nobody.sock")
    with pytest.raises(QmpLostError, match="cannot be reached"):
        await Qmp.connect(tmp_path / "nowhere" / "qmp.sock")
    monkeypatch.setattr(qmp, "GREETING_SECONDS", 0.05)

    async def silent(qemu):
        await qemu.reader.read()

    async with monitor(tmp_path, silent) as path:
        with pytest.raises(QmpLostError, match="did not greet"):
            await Qmp.connect(path)


@pytest.mark.parametrize("last", [b"", b"no json", b"x" * (MAX_LINE_BYTES + 9), b'{"unfinished'])
async def test_whoever_waits_hears_of_the_end_at_once(tmp_path, last):
    async def act(qemu):
        await qemu.greet()
        await qemu.hear()
        if last:
            qemu.say(last)
            with contextlib.suppress(OSError):
                await qemu.writer.drain()

    async with monitor(tmp_path, act) as path:
        session = await Qmp.connect(path)
        with pytest.raises(QmpError):
            await session.execute("query-status", timeout_seconds=SECONDS * 2)
        with pytest.raises(QmpError):
            await session.execute("query-status", timeout_seconds=SECONDS * 2)
        await session.close()


async def test_an_answer_that_comes_too_late_is_nobodys(tmp_path):
    async def act(qemu):
        await qemu.greet()
        late = await qemu.hear()
        asked = await qemu.hear()
        qemu.say({"return": "late", "id": late["id"]}, {"return": "asked", "id": asked["id"]})
        await qemu.reader.read()

    async with monitor(tmp_path, act) as path:
        session = await Qmp.connect(path)
        with pytest.raises(QmpLostError, match="did not answer query-status"):
            await session.execute("query-status", timeout_seconds=0.05)
        assert await session.execute("query-kvm") == "asked"
        await session.close()


@pytest.mark.parametrize(
    "unasked", [{"event": "RTC_CHANGE"}, {"return": {}, "id": 99}, {"return": {}}, {"id": [1], "return": 1}, {}]
)
async def test_a_flood_ends_the_session(tmp_path, unasked):
    async def act(qemu):
        await qemu.greet()
        await qemu.hear()
        while True:
            qemu.say(*[unasked] * 100)
            await qemu.writer.drain()

    heard = []
    async with monitor(tmp_path, act) as path:
        session = await Qmp.connect(path, on_event=heard.append)
        with pytest.raises(QmpError, match="more than it was asked for"):
            await session.execute("query-status", timeout_seconds=SECONDS * 2)
        await session.close()
    # Lines that had come in already are taken while the session is being cut off; the pace holds for a slow machine, too.
    assert len(heard) <= UNASKED_AT_ONCE + SECONDS * qmp.UNASKED_PER_SECOND


@pytest.mark.parametrize("odd", [{"event": 7}, {"event": "STOP", "data": []}, {"event": "x" * 999, "data": {}}])
async def test_events_that_are_none_are_passed_over(tmp_path, odd):
    async def act(qemu):
        await qemu.greet()
        heard = await qemu.hear()
        qemu.say(odd, {"return": 1, "id": heard["id"]})
        await qemu.reader.read()

    heard = []
    async with monitor(tmp_path, act) as path:
        session = await Qmp.connect(path, on_event=heard.append)
        assert await session.execute("query-status") == 1
        await session.close()
    assert [event.name for event in heard] == (["x" * 64] if odd["event"] == "x" * 999 else [])
