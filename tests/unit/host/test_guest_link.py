"""The daemon's end of the guest link, dialled by a hand-made agent and by the real one."""

import asyncio
import contextlib
import gc
import os
import signal
import stat
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.unit.wire.peers import frames, raw

from innkeeper.errors import (
    ConflictError,
    FileMissingError,
    ForbiddenError,
    GuestError,
    InstanceFailedError,
    LinkLostError,
)
from innkeeper.host import guest_link
from innkeeper.host.guest_link import GuestEndpoint, GuestInputError, common_version, guest_error
from innkeeper.wire.frames import Kind, ProtocolError
from innkeeper.wire.stream import Data, Message

pytestmark = pytest.mark.anyio
AGENT = Path(__file__).parents[3] / "build" / "inn-agent"
HELLO = {"protocol": 1, "min_protocol": 1, "agent": "test", "boot_id": "0" * 16}


@asynccontextmanager
async def endpoint(directory):
    made = GuestEndpoint(directory)
    await made.listen()
    try:
        yield made
    finally:
        await made.close(remove=True)
        assert not directory.exists()


class Agent:
    """Dials the endpoint and speaks raw frames."""

    @classmethod
    async def dial(cls, directory, hello=HELLO):
        self = cls()
        inside = os.open(directory, os.O_PATH)
        try:
            path = f"/proc/self/fd/{inside}/agent.sock"
            self.reader, self.writer = await asyncio.open_unix_connection(path)
        finally:
            os.close(inside)
        if hello is not None:
            self.say(Kind.HELLO, 0, hello)
        return self

    def say(self, *frame):
        self.writer.write(raw(*frame))

    async def hear(self):
        head = await self.reader.readexactly(9)
        return frames(head + await self.reader.readexactly(int.from_bytes(head[:4], "big")))[0]

    async def cut_off(self):
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(self.reader.read(1), 20) == b""
        self.hang_up()

    def hang_up(self):
        self.writer.transport.abort()


async def test_it_answers_hello_and_carries_verbs(tmp_path):
    async with endpoint(tmp_path / "link") as end:
        assert not end.linked
        agent = await Agent.dial(end.directory)
        assert await agent.hear() == (Kind.HELLO, 0, b'{"protocol":1}')
        asking = asyncio.create_task(end.request("usage", {"a": 1}, timeout_seconds=20))
        assert await agent.hear() == (Kind.OPEN, 1, b'{"verb":"usage","a":1}')
        agent.say(Kind.RESULT, 1, {"cpu_us": 5})
        assert await asking == {"cpu_us": 5}
        assert (end.linked, end.agent_version) == (True, "test")
        asking = asyncio.create_task(end.request("stat", {}, timeout_seconds=20))
        await agent.hear()
        agent.say(Kind.ERROR, 3, {"code": "not_found", "message": "nothing\x1b there"})
        with pytest.raises(FileMissingError, match="nothing\\? there"):
            await asking
        with pytest.raises(GuestError, match="did not answer usage in time"):
            await end.request("usage", {}, timeout_seconds=0.02)
        agent.hang_up()


async def test_the_socket_is_roots_alone_and_any_path_will_do(tmp_path):
    directory = tmp_path / ("d" * 120) / "link"
    async with endpoint(directory) as end:
        assert len(str(directory / "agent.sock")) > 107
        found = (directory / "agent.sock").stat()
        assert (stat.S_ISSOCK(found.st_mode), stat.S_IMODE(found.st_mode)) == (True, 0o600)
        agent = await Agent.dial(directory)
        await end.link(timeout_seconds=20)
        agent.hang_up()


async def test_a_second_connection_is_refused_while_one_lives(tmp_path):
    async with endpoint(tmp_path / "link") as end:
        agent = await Agent.dial(end.directory)
        link = await end.link(timeout_seconds=20)
        for hello in (HELLO, None):
            await (await Agent.dial(end.directory, hello)).cut_off()
        assert await end.link(timeout_seconds=20) is link
        agent.hang_up()


async def rested(end, agent, work):
    """The agent is asked to let go, and does."""
    assert (await agent.hear())[2] == b'{"verb":"quiesce"}'
    agent.say(Kind.RESULT, 1, {})
    await agent.writer.drain()
    agent.writer.close()
    await work


async def test_a_link_rests_until_it_is_woken(tmp_path):
    async with endpoint(tmp_path / "link") as end:
        word = (end.directory / "generation").read_text()
        agent = await Agent.dial(end.directory)
        await agent.hear()
        await end.link(timeout_seconds=20)
        await rested(end, agent, asyncio.create_task(end.rest(timeout_seconds=20)))
        # Whoever wants it now waits for the next one.
        asking = asyncio.create_task(end.request("usage", {}, timeout_seconds=20))
        await asyncio.sleep(0.02)
        assert not asking.done() and (end.directory / "generation").read_text() == word
        end.wake()
        assert (end.directory / "generation").read_text() != word
        agent = await Agent.dial(end.directory)
        await agent.hear()
        assert (await agent.hear())[2] == b'{"verb":"usage"}'
        agent.say(Kind.RESULT, 1, {"cpu_us": 5})
        assert await asking == {"cpu_us": 5}
        agent.hang_up()


async def test_what_was_asked_has_its_answer_before_a_link_rests(tmp_path):
    async with endpoint(tmp_path / "link") as end:
        agent = await Agent.dial(end.directory)
        await agent.hear()
        asking = asyncio.create_task(end.request("usage", {}, timeout_seconds=20))
        assert (await agent.hear())[2] == b'{"verb":"usage"}'
        resting = asyncio.create_task(end.rest(timeout_seconds=20))
        await asyncio.sleep(0.02)
        agent.say(Kind.RESULT, 1, {"cpu_us": 5})
        assert (await agent.hear())[2] == b'{"verb":"quiesce"}'
        assert await asking == {"cpu_us": 5}
        agent.say(Kind.RESULT, 3, {})
        await agent.writer.drain()
        agent.writer.close()
        await resting


async def test_an_agent_that_does_not_let_go_keeps_its_link(tmp_path):
    async with endpoint(tmp_path / "link") as end:
        agent = await Agent.dial(end.directory)
        await agent.hear()
        link = await end.link(timeout_seconds=20)
        with pytest.raises(GuestError, match="did not let go"):
            await end.rest(timeout_seconds=0.05)
        end.wake()
        assert await end.link(timeout_seconds=20) is link
        agent.hang_up()


async def test_what_an_agent_says_of_its_last_link_is_bounded_and_printable(tmp_path):
    async with endpoint(tmp_path / "link") as end:
        agent = await Agent.dial(end.directory, {**HELLO, "last_error": "read unix\n\x1b[31m" + "x" * 5_000})
        await end.link(timeout_seconds=20)
        assert end.last_error == ("read unix??[31m" + "x" * 5_000)[:200]
        agent.hang_up()


async def test_redialling_after_a_broken_link(tmp_path):
    links = []
    async with endpoint(tmp_path / "link") as end:
        end.on_link(links.append)
        for number in range(3):
            agent = await Agent.dial(end.directory)
            link = await end.link(timeout_seconds=20)
            assert (len(links), links[-1]) == (number + 1, link)
            asking = asyncio.create_task(end.request("usage", {}, timeout_seconds=20))
            await agent.hear()
            agent.hang_up()
            with pytest.raises(LinkLostError):
                await asking
            await link.wait_closed()
            await asyncio.sleep(0)
            assert not end.linked
        with pytest.raises(LinkLostError, match="did not answer"):
            await end.link(timeout_seconds=0.01)


async def test_who_waited_for_an_agent_long_enough_gives_it_up(tmp_path, monkeypatch):
    monkeypatch.setattr(guest_link, "SILENT_SECONDS", 0.05)
    told = []
    async with endpoint(tmp_path / "link") as end:
        end.on_failure(told.append)

        async def miss(times):
            for _ in range(times):
                with pytest.raises(LinkLostError, match="did not answer"):
                    await end.link(timeout_seconds=0.02)

        # However long each of them is late, and however many wait at once, it is their own time that counts.
        await asyncio.gather(*(miss(1) for _ in range(9)))
        assert told == []
        # An agent that comes after all has the whole time again.
        agent = await Agent.dial(end.directory)
        await end.link(timeout_seconds=20)
        agent.hang_up()
        while end.linked:
            await asyncio.sleep(0.005)
        await miss(2)
        assert (told, end.failure) == ([], None)
        await miss(1)
        assert told == ["The guest agent does not answer any more"]
        with pytest.raises(LinkLostError, match="any more"):
            await end.link(timeout_seconds=20)
        end.on_failure(told.append)
        assert len(told) == 2


async def test_an_agent_that_says_nothing_is_cut_off_and_may_try_again(tmp_path, monkeypatch):
    monkeypatch.setattr(guest_link, "HELLO_SECONDS", 0.02)
    async with endpoint(tmp_path / "link") as end:
        await (await Agent.dial(end.directory, None)).cut_off()
        assert (end.linked, end.failure) == (False, None)
        agent = await Agent.dial(end.directory)
        await end.link(timeout_seconds=20)
        agent.hang_up()


@pytest.mark.parametrize(
    "hello", [{}, {"protocol": "1", "min_protocol": 1}, {"protocol": 9, "min_protocol": 8}], ids=str
)
async def test_no_common_version_fails_the_instance(tmp_path, hello):
    async with endpoint(tmp_path / "link") as end:
        waiting = asyncio.create_task(end.link(timeout_seconds=20))
        agent = await Agent.dial(end.directory, hello)
        with pytest.raises(LinkLostError, match=r"malformed hello|speaks protocol 8 to 9, this server 1 to 1"):
            await waiting
        await agent.cut_off()
        assert (end.linked, bool(end.failure)) == (False, True)


@pytest.mark.parametrize(
    "frame", [(Kind.HELLO, 0, b"{"), (Kind.HELLO, 0, b"[]"), (99, 0, b""), (Kind.OPEN, 2, {})], ids=str
)
async def test_a_breach_before_hello_cuts_off(tmp_path, frame):
    async with endpoint(tmp_path / "link") as end:
        agent = await Agent.dial(end.directory, None)
        agent.say(*frame)
        await agent.cut_off()
        assert not end.linked


async def test_a_new_daemon_takes_the_place_of_an_old_ones_socket(tmp_path):
    old = GuestEndpoint(tmp_path / "link")
    await old.listen()
    await old.close(remove=False)
    assert (tmp_path / "link" / "agent.sock").exists()
    async with endpoint(tmp_path / "link") as end:
        agent = await Agent.dial(end.directory)
        await end.link(timeout_seconds=20)
        agent.hang_up()


async def test_closing_leaves_no_task(tmp_path):
    before = asyncio.all_tasks()
    async with endpoint(tmp_path / "link") as end:
        silent = await Agent.dial(end.directory, None)
        await asyncio.sleep(0.01)
    await silent.cut_off()
    for _ in range(5):
        await asyncio.sleep(0)
    gc.collect()
    assert asyncio.all_tasks() == before


def hello(newest, oldest):
    return {"protocol": newest, "min_protocol": oldest}


@pytest.mark.parametrize(
    ("ours", "newest", "oldest", "common"),
    [((1,), 1, 1, 1), ((1, 2), 1, 1, 1), ((1, 2), 2, 1, 2), ((1, 2), 9, 2, 2), ((2, 3), 2, 1, 2), ((1, 2), 2, 2, 2)],
)
def test_the_highest_version_that_both_know(monkeypatch, ours, newest, oldest, common):
    monkeypatch.setattr(guest_link, "PROTOCOL_VERSIONS", ours)
    assert common_version(hello(newest, oldest)) == common


@pytest.mark.parametrize(
    "body",
    [
        hello(2, 2),
        hello(0, 0),
        hello(1, 2),
        hello(1.0, 1),
        hello(None, 1),
        hello("1", "1"),
        hello([1], 1),
        {"protocol": 1},
    ],
    ids=str,
)
def test_no_version_in_common(body):
    with pytest.raises(ProtocolError) as caught:
        common_version(body)
    assert ("malformed" in str(caught.value)) == (body not in (hello(2, 2), hello(0, 0)))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("not_found", FileMissingError),
        ("permission_denied", ForbiddenError),
        ("no_space", ConflictError),
        ("bad_request", GuestInputError),
        ("is_a_directory", GuestInputError),
        ("exists", ConflictError),
        ("unknown_verb", GuestError),
        ("", GuestError),
        ("__class__", GuestError),
    ],
)
def test_errors_of_the_guest(code, kind):
    error = guest_error(code, "m\n\x1b[2J" + "x" * 9_000)
    assert type(error) is kind
    assert str(error).isprintable()
    assert len(str(error)) < 600
    assert getattr(error, "guest_code", code) == code


@asynccontextmanager
async def real_agent(directory):
    """The agent itself, as an ordinary process with namespaces of its own; it is never configured."""
    if not AGENT.exists():
        pytest.skip("the agent is not built: make agent")
    user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    process = await asyncio.create_subprocess_exec(
        *("unshare", *user, "--mount", "--net", "--pid", "--fork", "--kill-child", str(AGENT)),
        env={"INNKEEPER_LINK": str(directory / "agent.sock"), "PATH": "/usr/bin:/bin"},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


@pytest.mark.parametrize("ours", [(1,), (1, 2)], ids=["same version", "newer server"])
async def test_the_real_agent_speaks_with_this_end(tmp_path, monkeypatch, ours):
    monkeypatch.setattr(guest_link, "PROTOCOL_VERSIONS", ours)
    async with endpoint(tmp_path / "link") as end, real_agent(tmp_path / "link"):
        link = await end.link(timeout_seconds=10)
        await asyncio.wait_for(link.ping(), 5)
        assert end.agent_version
        assert "executions" in await end.request("processes", {}, timeout_seconds=5)
        with pytest.raises(GuestError) as caught:
            await end.request("verb_of_a_later_version", {"field": 1}, timeout_seconds=5)
        assert caught.value.guest_code == "unknown_verb"
        if os.geteuid() != 0:
            # Starting a process sets its groups, which a namespace of an ordinary user does not allow.
            return
        params = {"id": "e1", "argv": ["/bin/sh", "-c", "printf out; printf err >&2; exit 3"], "cwd": "/", "later": [1]}
        stream = await end.open("exec", params)
        output, messages = {1: b"", 2: b""}, []
        async with asyncio.timeout(10):
            while (event := await stream.next_event()) is not None:
                if isinstance(event, Data):
                    output[event.channel] += event.data
                elif isinstance(event, Message):
                    messages.append(event.body)
        assert output == {1: b"out", 2: b"err"}
        assert messages[0]["started"] is True
        assert (messages[-1]["exited"], messages[-1]["exit_code"], messages[-1]["signal"]) == (True, 3, None)


@pytest.mark.skipif(os.geteuid() != 0, reason="the agent starts processes as root only")
async def test_bulk_data_passes_the_real_agent_both_ways(tmp_path):
    content = bytes(range(256)) * 12_000
    async with endpoint(tmp_path / "link") as end, real_agent(tmp_path / "link"):
        stream = await end.open(
            "exec", {"id": "cat", "argv": ["/bin/cat"], "cwd": "/", "stdin": True}, timeout_seconds=10
        )

        async def feed():
            await stream.send_data(content)
            await stream.send_end()

        got = bytearray()
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            group.create_task(feed())
            while (event := await stream.next_event()) is not None:
                if isinstance(event, Data):
                    got += event.data
        assert bytes(got) == content


async def test_the_real_agent_refuses_a_version_that_it_does_not_know(tmp_path, monkeypatch):
    monkeypatch.setattr(guest_link, "common_version", lambda _: 2)
    links = []
    async with endpoint(tmp_path / "link") as end, real_agent(tmp_path / "link"):
        end.on_link(links.append)
        await end.link(timeout_seconds=10)
        async with asyncio.timeout(20):
            await asyncio.shield(links[0].closed)


async def test_whoever_dials_without_end_is_taken_at_a_bounded_pace(tmp_path, monkeypatch):
    monkeypatch.setattr(guest_link, "DIALS_AT_ONCE", 5)
    async with endpoint(tmp_path / "link") as end:
        agent = await Agent.dial(end.directory)
        await end.link(timeout_seconds=20)
        began = asyncio.get_running_loop().time()
        for _ in range(14):
            await (await Agent.dial(end.directory, hello=None)).cut_off()
        # The first 4 at once, the others by their turn of a tenth of a second.
        assert asyncio.get_running_loop().time() - began > 0.8
        # The link that was there first is none the worse for it.
        asking = asyncio.create_task(end.request("usage", {}, timeout_seconds=20))
        await agent.hear()
        await agent.hear()
        agent.say(Kind.RESULT, 1, {})
        await asking
        agent.hang_up()


async def test_who_waits_for_the_agent_of_a_guest_that_ended_hears_of_it_at_once(tmp_path):
    async with endpoint(tmp_path / "link") as made:
        waiting = asyncio.ensure_future(made.link(timeout_seconds=60))
        await asyncio.sleep(0)
        made.give_up("The sandbox ended")
        async with asyncio.timeout(20):
            with pytest.raises(InstanceFailedError, match="The sandbox ended"):
                await waiting
            with pytest.raises(InstanceFailedError):
                await made.open("exec", {})
        assert not made.linked


@asynccontextmanager
async def port(directory, act):
    """QEMU's socket of a microVM's port; `act` is the agent behind it, called with each connection and the RESET that came on it."""
    directory.mkdir(parents=True)
    sessions, failures = [], []

    async def serve(reader, writer):
        sessions.append(asyncio.current_task())
        try:
            await act(reader, writer, await reader.readexactly(48))
        except (OSError, asyncio.IncompleteReadError):
            pass
        except BaseException as error:
            failures.append(error)
            raise
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    with contextlib.chdir(directory):
        server = await asyncio.start_unix_server(serve, "agent.sock")
    made = GuestEndpoint(directory)
    made.dial()
    try:
        yield made
    finally:
        await made.close(remove=True)
        server.close()
        await asyncio.wait(sessions, timeout=20)
    assert failures == []


async def test_a_port_is_dialled_and_what_lay_in_it_is_passed_over(tmp_path):
    async def act(reader, writer, reset):
        writer.write(b"half a frame of before" + reset + raw(Kind.HELLO, 0, HELLO))
        await reader.read()

    async with port(tmp_path / "link", act) as endpoint:
        await endpoint.link(timeout_seconds=20)
        assert endpoint.agent_version == "test"


async def test_a_port_is_dialled_again_when_its_link_breaks(tmp_path):
    connections = []

    async def act(reader, writer, reset):
        connections.append(reset)
        writer.write(reset + raw(Kind.HELLO, 0, {**HELLO, "agent": str(len(connections))}))
        await (reader.readexactly(1) if len(connections) == 1 else reader.read())

    async with port(tmp_path / "link", act) as endpoint:
        async with asyncio.timeout(20):
            while endpoint.agent_version != "2":
                await asyncio.sleep(0.01)
        await endpoint.link(timeout_seconds=20)
    assert len(set(connections)) == len(connections) == 2


async def test_a_guest_that_could_not_boot_is_quoted(tmp_path):
    error = {"step": "image", "message": "no disk\x1b " + "x" * 9999}

    async def act(reader, writer, reset):
        writer.write(reset + raw(Kind.HELLO, 0, {**HELLO, "boot_error": error}))
        await reader.read()

    async with port(tmp_path / "link", act) as endpoint:
        with pytest.raises(LinkLostError, match=r"could not boot: image: no disk\? xxx") as lost:
            await endpoint.link(timeout_seconds=20)
        assert len(str(lost.value)) < 500


async def test_a_port_that_floods_is_given_up(tmp_path):
    async def act(reader, writer, reset):
        while True:
            writer.write(bytes(1 << 20))
            await writer.drain()

    async with port(tmp_path / "link", act) as endpoint:
        with pytest.raises(LinkLostError, match="no new link"):
            await endpoint.link(timeout_seconds=60)
