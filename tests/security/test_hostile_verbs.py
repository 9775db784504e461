"""A hostile program in the agent's place, asked by every verb of VMs: files, trees, cells, terminals, ports, programs.
It keeps to the link's rules and lies in them.

Whatever it says, the call ends with an error in shape or an answer that is clean; the daemon stays small, and a neighbour's commands work."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests.integration.daemon_fixture import NEEDS_RUNSC, Answer, Host, build_go, eventually, running_host
from tests.security.neighbour import GROWTH_MIB, proportional_mib

from innkeeper.bus.contract import Call, Data, Message
from innkeeper.core import host_verbs as verbs
from innkeeper.core import port_verbs, terminal_verbs, tree_verbs
from innkeeper.core.cell_results import RESULTS_BYTES_MAX, parse_results
from innkeeper.core.host_verbs import to_wire
from innkeeper.core.program_verbs import RunProgram
from innkeeper.errors import GuestError, InnkeeperError
from innkeeper.host import cells, executions
from innkeeper.host.daemon import install_agent

pytestmark = [
    pytest.mark.anyio,
    NEEDS_RUNSC,
    pytest.mark.gvisor_only(reason="test_hostile_port.py has a microVM's agent"),
]

# A call that has not ended by then hangs; how long it takes is nobody's matter here.
PATIENCE_SECONDS = 60
HUGE = 10**400
DATA, DATA2, MESSAGE, END, RESULT = 2, 3, 4, 5, 6
EXITED = json.dumps({"exited": True, "exit_code": 0, "user_processes": 0})
STARTED = json.dumps({"started": True, "pid": 1})


@dataclass
class Pair:
    """One daemon with a guest of the real agent and a guest of the hostile one."""

    host: Host
    honest: UUID
    hostile: UUID

    async def prepare(self, verb: str, *modes: str) -> None:
        """The hostile agent answers its next streams of this verb so, whatever it is asked."""
        await self.host.ensure(self.hostile)
        assert (await self.host.run(self.hostile, f"prepare:{verb}:{json.dumps(modes)}")).exit_code == 0

    @asynccontextmanager
    async def call(self, request: Any) -> AsyncIterator[Call]:
        """A call of the hostile guest, which has to come to its end in time."""
        async with (
            asyncio.timeout(PATIENCE_SECONDS),
            self.host.bus.open(self.host.daemon.host_id, request.verb, to_wire(request)) as call,
        ):
            yield call

    async def ask(self, request: Any) -> Told:
        """All that a call brings."""
        told = Told()
        async with self.call(request) as call:
            with contextlib.suppress(InnkeeperError):
                await call.send_end()
            try:
                async for event in call.events():
                    if isinstance(event, Message):
                        told.messages.append(event.body)
                    elif isinstance(event, Data):
                        told.data += event.data
                told.body = await call.result()
            except InnkeeperError as error:
                told.error = error
        return told

    @asynccontextmanager
    async def suffering(self) -> AsyncIterator[None]:
        """The neighbour's commands work while the block runs and after it, and the daemon stays small."""
        before = most = proportional_mib()
        neighbours = 0

        async def live() -> None:
            nonlocal most, neighbours
            while True:
                assert (await self.host.run(self.honest, "echo neighbour")).text == "neighbour\n"
                most, neighbours = max(most, proportional_mib()), neighbours + 1

        living = asyncio.create_task(live())
        try:
            yield
            reached = neighbours
            await eventually(lambda: living.done() or neighbours > reached + 1)
        finally:
            living.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await living
        print(f"daemon grew by {most - before:.1f} MiB, the neighbour ran {neighbours} commands")
        assert most - before < GROWTH_MIB


@dataclass
class Told:
    """What a call brought."""

    body: dict[str, Any] | None = None
    error: InnkeeperError | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)

    def check(self, lie: str) -> None:
        """It is an error that somebody meant, or an answer without anything that an answer must not have."""
        if self.error is not None:
            assert self.error.code not in ("internal_error", "unavailable"), lie
            assert len(self.error.message) < 700 and self.error.message.isprintable(), lie
            return
        assert self.body is not None, lie
        check_clean([self.body, *self.messages], lie)


def check_clean(value: Any, lie: str) -> None:
    """No number beyond 64 bits, no NUL, no name that leads elsewhere, nothing that is long."""
    if isinstance(value, dict):
        for name in ("path", "from"):
            if value.get(name) is not None:
                assert ".." not in value[name].split("/"), lie
        # What a file holds may be anything; how long it is said may not.
        assert len(str(value.get("text"))) <= 512, lie
        value = [one for name, one in value.items() if name != "text"]
    if isinstance(value, list):
        assert len(value) <= 1_000, lie
        for one in value:
            check_clean(one, lie)
    elif isinstance(value, str):
        assert "\0" not in value and len(value) < 9_000, lie
        value.encode("utf-8", "surrogateescape")
    elif isinstance(value, int | float):
        assert abs(value) < 2**63, lie


@pytest.fixture(scope="module")
async def pair(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    async with running_host(tmp_path_factory.mktemp("home"), freeze_after_seconds=60) as host:
        patch = pytest.MonkeyPatch()
        # Nobody wants to wait for what an agent never sends.
        patch.setattr(executions, "OVERTIME_SECONDS", 0.5)
        patch.setattr(cells, "FETCH_SECONDS", 1.0)
        honest = await host.ensure()
        hostile = install_agent(
            build_go(Path(__file__).parents[1] / "hostile_agent", "hostile"), host.settings.host_dir
        )
        host.daemon.fleet._builder._agent_dir = hostile
        yield Pair(host, honest, await host.ensure())
        patch.undo()


def script(*steps: tuple[int, str] | dict[str, Any]) -> str:
    """What the hostile agent sends on a stream: (kind, text), or a step with more to it (`script.go`)."""
    return "script:" + json.dumps(
        [{"kind": one[0], "text": one[1]} if isinstance(one, tuple) else one for one in steps]
    )


def rows(*fields: dict[str, Any], **more: Any) -> str:
    return "result:" + json.dumps({"entries": fields, "matches": fields, **more})


NAMES = [
    "..",
    "../x",
    "a/../b",
    "a/./b",
    "/etc/passwd",
    "a//b",
    "a/",
    "a\0b",
    "x" * 5_000,
    "\ud800",
    7,
    None,
    ["a"],
    {"a": 1},
]
NUMBERS = [-1, HUGE, 1.5, "7", True, None, [], {}]
ODD = [
    "{}",
    '{"entries": 7, "matches": {}}',
    '{"entries": [7, null], "matches": [[]]}',
    '{"path": "relative"}',
    '{"path": "/a\\u0000b"}',
]
PAGES = [
    *(rows({"path": name, "text": "t", "type": "file"}) for name in NAMES),
    *(rows({"path": "a", "text": name, "type": name, "cut": name}) for name in [*NAMES, "\x1b]0;owned\x07"]),
    *(
        rows({"path": "a", "text": "t", "type": "file", **dict.fromkeys(("size", "mode", "mtime_ns", "line", "column"), number)},
             unreadable=number, binary=number, long_lines=number, files=number, bytes=number, skipped=number)
        for number in NUMBERS
    ),
    rows({"path_b64": "!!!", "text": "t"}), rows({"path_b64": b64encode(b"a/../\xff").decode(), "text": "t"}),
    rows(*[{"path": "a", "text": "t", "type": "file"}] * 1_001), rows(next="x" * 10_000), rows(next=7), rows(next={"a": 1}),
    *(f"result:{text}" for text in ODD),
    script((RESULT, '{"entries": [], "matches": []}'), (RESULT, '{"entries": 1}'), (DATA, "late"), (MESSAGE, "{}")),
]  # fmt: skip
# These break the link, which costs a start of the guest each.
BROKEN = ["result:[]", "result:{", 'result:{"a": ' + "[" * 50_000, 'result:{"size": 1e999}']


def page_requests(instance: UUID) -> dict[str, Any]:
    path = "/tmp"
    return {
        "workdir": tree_verbs.FindWorkdir(instance),
        "glob": tree_verbs.GlobFiles(instance, path, "*"),
        "search": tree_verbs.SearchFiles(instance, path, "x"),
        "mkdir": tree_verbs.MakeDirectory(instance, path),
        "rename": tree_verbs.RenamePath(instance, path, "/b"),
        "copy": tree_verbs.CopyPath(instance, path, "/b"),
        "remove": tree_verbs.RemovePath(instance, path),
        "unpack_tree": tree_verbs.UnpackTree(instance, path),
        "pack_tree": tree_verbs.PackTree(instance, path),
        "ports": port_verbs.ListPorts(instance),
    }


VERBS = list(page_requests(uuid4()))


@pytest.mark.parametrize("verb", VERBS)
async def test_lies_in_answers_are_cleaned_or_errors(pair: Pair, verb: str) -> None:
    request = page_requests(pair.hostile)[verb]
    await pair.prepare(verb, *PAGES)
    for lie in PAGES:
        (await pair.ask(request)).check(lie)
    for lie in BROKEN if verb in ("glob", "copy") else BROKEN[:1]:
        await pair.prepare(verb, lie)
        told = await pair.ask(request)
        told.check(lie)
        assert told.error is not None, lie
    assert (await pair.host.run(pair.honest, "echo neighbour")).text == "neighbour\n"


PORTS = [
    [{"port": port, "address": "127.0.0.1"} for port in (0, -1, 65_536, HUGE, True, "80", None, 1.5)],
    [{"port": 80, "address": address} for address in ("", "x", "127.0.0.1\r\nX: y", "1.2.3.4/8", 7, None, "x" * 9_000)],
    [{"port": 80, "address": "::1", "pid": pid, "command": "\x1b]0;owned\x07" * 100} for pid in (0, -1, HUGE, "1", True)],
    [{"port": 80, "address": "::1"}] * 501,
]  # fmt: skip


async def test_lies_about_ports(pair: Pair) -> None:
    await pair.prepare("ports", *("result:" + json.dumps({"ports": lie}) for lie in PORTS))
    for lie in PORTS:
        told = await pair.ask(port_verbs.ListPorts(pair.hostile))
        told.check(str(lie)[:200])
        for row in (told.body or {}).get("ports", []):
            assert row["address"] == "::1" and row["port"] == 80 and row["pid"] is None
            assert len(row["command"]) <= 64 and row["command"].isprintable()


# --- streams ---------------------------------------------------------------------------------------------------------


def event(**fields: Any) -> str:
    return json.dumps(fields) + "\n"


WATCHES = {
    "a line without end": {"kind": DATA, "text": "x" * 1_000, "times": -1},
    "no event": {"kind": DATA, "text": "[]\n"},
    "an unknown event": {"kind": DATA, "text": event(type="owned", path="/a")},
    "a relative path": {"kind": DATA, "text": event(type="created", path="a")},
    "a NUL": {"kind": DATA, "text": event(type="created", path="/a\0b")},
    "a long path": {"kind": DATA, "text": event(type="created", path="/" + "x" * 5_000)},
    "deep": {"kind": DATA, "text": '{"type": ' + "[" * 30_000 + "\n"},
    "bytes that are no text": {"kind": DATA, "base64": b64encode(b'{"type": "created", "path": "/\xff"}\n').decode()},
    "moved from nowhere": {"kind": DATA, "text": event(type="moved", path="/a", **{"from": 7})},
}


@pytest.mark.parametrize("lie", WATCHES)
async def test_a_watch_that_tells_nonsense_ends(pair: Pair, lie: str) -> None:
    await pair.prepare("watch", script((MESSAGE, '{"directories": 1}'), WATCHES[lie]))
    told = await pair.ask(tree_verbs.WatchTree(pair.hostile, "/tmp"))
    assert isinstance(told.error, GuestError)
    assert told.error.message in ("The guest agent sent no valid event", "The guest agent sent no valid path")
    assert told.data == b""


ENDLESS = {
    "events": ("watch", tree_verbs.WatchTree, {"kind": DATA, "text": event(type="created", path="/tmp/x"), "repeat": 1_000, "times": -1}),
    "an archive": ("pack_tree", tree_verbs.PackTree, {"kind": DATA, "text": "x", "repeat": 200_000, "times": -1}),
    "signs of life": ("copy", tree_verbs.CopyPath, {"kind": MESSAGE, "text": "{}", "times": 600, "pause": 1}),
    "words before the first byte": ("dial", port_verbs.DialPort, {"kind": MESSAGE, "text": '{"connected": true}', "times": 600, "pause": 1}),
    "bytes of a port": ("dial", port_verbs.DialPort, {"kind": DATA, "text": "x", "repeat": 200_000, "times": -1}),
}  # fmt: skip


@pytest.mark.parametrize("reads", [False, True], ids=["unread", "read"])
@pytest.mark.parametrize("what", ENDLESS)
async def test_what_never_ends_costs_little_and_can_be_left(pair: Pair, what: str, *, reads: bool) -> None:
    verb, kind, step = ENDLESS[what]
    more = {tree_verbs.CopyPath: ("/tmp", "/b"), port_verbs.DialPort: (80,)}.get(kind, ("/tmp",))
    await pair.prepare(verb, script(step))
    took = messages = 0
    async with pair.suffering(), pair.call(kind(pair.hostile, *more)) as call:
        until = time.monotonic() + 1
        if reads:
            # On a machine that is busy elsewhere some words in a row are too many unread ones, and the guest is cut off.
            with contextlib.suppress(TimeoutError, InnkeeperError):
                async with asyncio.timeout(1):
                    async for one in call.events():
                        took += len(one.data) if isinstance(one, Data) else 0
                        messages += isinstance(one, Message)
        await asyncio.sleep(max(0.0, until - time.monotonic()))
    print(f"{what}: {took >> 10} KiB and {messages} messages")
    assert not reads or messages < 50, "what a guest says for nothing is not passed on"
    if verb == "watch":
        await eventually(lambda: pair.host.machine(pair.hostile).watches == 0)


async def test_a_port_that_takes_nothing_holds_up_only_who_dialled(pair: Pair) -> None:
    """The agent connects, and never gives credit for what is sent to it."""
    await pair.prepare(
        "dial", script((MESSAGE, '{"connected": true}'), {"kind": DATA, "text": "x", "repeat": 200_000, "times": -1})
    )
    async with pair.suffering(), pair.call(port_verbs.DialPort(pair.hostile, 80)) as call:
        sending = asyncio.create_task(call.send_data(bytes(16 << 20)))
        await asyncio.wait([sending], timeout=1)
        assert not sending.done()
        sending.cancel()


async def test_data_after_the_end_of_a_port_costs_the_link(pair: Pair) -> None:
    await pair.prepare("dial", script((MESSAGE, '{"connected": true}'), (END, ""), (DATA, "late")))
    told = await pair.ask(port_verbs.DialPort(pair.hostile, 80))
    assert told.error is not None and b"late" not in told.data


# --- cells -----------------------------------------------------------------------------------------------------------


def form(name: bytes, content: bytes, *, size: int | None = None, follows: int = 1) -> bytes:
    length = len(content) if size is None else size
    return len(name).to_bytes(2, "big") + length.to_bytes(4, "big") + bytes([follows]) + name + content


RESULTS = {
    "nothing": b"",
    "noise": bytes(range(256)) * 20,
    "cut short": b"\1\1" + form(b"text/plain", b"x", size=1_000_000),
    "four gigabytes": b"\1\1" + form(b"text/plain", b"", size=2**32 - 1),
    "a kind that is none": b"\7\1" + form(b"text/plain", b"x"),
    "more forms than there are": b"\1\xff" + form(b"text/plain", b"x"),
    "too many": (b"\1\1" + form(b"text/plain", b"x")) * 101,
    "a media type with a header in it": b"\1\1" + form(b"text/html\r\nX-A: b", b"x"),
    "a media type that is long": b"\1\1" + form(b"a/" + b"x" * 60_000, b"x"),
    "text that is none": b"\1\1" + form(b"text/plain", b"\xff\xfe"),
    "an image that is none": b"\1\1" + form(b"image/png", b"<script>alert(1)</script>"),
    "JSON that is none": b"\1\1" + form(b"application/json", b"[" * 100_000),
}
PASSES = ("nothing", "an image that is none", "JSON that is none")


async def cell(pair: Pair, mode: str) -> Answer:
    return await pair.host.run(pair.hostile, mode, kernel="k", merge=False, timeout_seconds=5)


def ended_cell(**says: Any) -> str:
    return script((MESSAGE, STARTED), (MESSAGE, json.dumps({**json.loads(EXITED), "cell": says})), (RESULT, "{}"))


async def shown(pair: Pair, answer: Answer) -> bytes:
    return bytes((await pair.ask(verbs.ReadResults(pair.hostile, answer.execution_id))).data)


async def test_results_that_make_no_sense(pair: Pair) -> None:
    for name, packed in RESULTS.items():
        steps = [{"kind": DATA, "base64": b64encode(packed).decode()}, (RESULT, "{}"), (DATA, "after the end")]
        await pair.prepare("results", script(*steps))
        answer = await cell(pair, ended_cell(result_bytes=1, fresh=7, lost="x", results_truncated=[1]))
        assert answer.body["kernel"] == {"fresh": False, "lost": False} and answer.body["results_truncated"] is False
        # Kept as it came, and looked at by who shows it, who has no privileges.
        kept = await shown(pair, answer)
        assert kept == packed and answer.body["result_bytes"] == len(packed)
        if name in PASSES:
            assert all(type(text) is str for one in parse_results(kept) for text in one.data.values())
        else:
            with pytest.raises(GuestError):
                parse_results(kept)


async def test_results_that_never_end_or_never_come_are_left_out(pair: Pair) -> None:
    for steps in (
        [{"kind": DATA, "text": "x", "repeat": 200_000, "times": -1}],
        [{"kind": DATA, "text": "x", "repeat": 200_000, "times": RESULTS_BYTES_MAX // 200_000 + 1}, (RESULT, "{}")],
        [(DATA, "the beginning")],
        [(RESULT, "{}"), (RESULT, "{}")],
    ):
        await pair.prepare("results", script(*steps))
        async with pair.suffering():
            answer = await cell(pair, ended_cell(result_bytes=HUGE, fresh=True, lost=True))
        whole = steps[0] == (RESULT, "{}")
        assert answer.body["results_truncated"] is not whole
        assert answer.body["result_bytes"] == 0 and await shown(pair, answer) == b""
    for size in (-1, 0, "7", True, None, 1.5, [1]):
        await pair.prepare("results", script((DATA, "x"), (RESULT, "{}")))
        answer = await cell(pair, ended_cell(result_bytes=size))
        assert answer.body["result_bytes"] == 0, size


# --- executions with streams -------------------------------------------------------------------------------------------


async def test_outputs_that_change_with_every_byte(pair: Pair) -> None:
    """Two outputs by turns: each turn is an entry beside the journal, and there is a most of them."""
    await pair.host.ensure(pair.hostile)
    turns = [(DATA, "o"), (DATA2, "e")] * 1_000
    body = script((MESSAGE, STARTED), *turns, (MESSAGE, EXITED), (MESSAGE, EXITED), (RESULT, "{}"))
    async with pair.suffering():
        answer = await pair.host.run(pair.hostile, body, merge=False, timeout_seconds=5)
    assert answer.output == b"o" * 1_000 and answer.errors == b"e" * 1_000


CLAIMS = 50


def claims(step: int) -> list[tuple[int, str]]:
    """That output was dropped, again and again, each time with a byte after it."""
    said = []
    for number in range(1, CLAIMS + 1):
        said += [(MESSAGE, json.dumps({"offset": number * step})), (DATA, "x")]
    return said


async def test_a_guest_that_drops_output_again_and_again_is_not_believed(pair: Pair) -> None:
    """Each claim leads offsets on: what they come to has an end."""
    body = script((MESSAGE, STARTED), *claims(1 << 50), (MESSAGE, EXITED), (RESULT, "{}"))
    await pair.host.ensure(pair.hostile)
    answer = await pair.host.run(pair.hostile, body, timeout_seconds=20, answer_bytes=0)
    assert answer.body["output_bytes"] <= (1 << 40) + CLAIMS


# --- terminals -------------------------------------------------------------------------------------------------------


async def start(pair: Pair, *steps: tuple[int, str] | dict[str, Any]) -> str:
    """A terminal whose program is what the agent says of it."""
    await pair.host.ensure(pair.hostile)
    request = terminal_verbs.StartTerminal(pair.hostile, ((script((MESSAGE, STARTED), *steps),),), "hostile", 80, 24)
    return str((await pair.host.request(request))["terminal"]["id"])


async def look(pair: Pair, name: str, offset: int = 0) -> Told:
    return await pair.ask(terminal_verbs.AttachTerminal(pair.hostile, name, offset))


async def end(pair: Pair, name: str) -> None:
    with contextlib.suppress(InnkeeperError):
        await pair.host.request(terminal_verbs.EndTerminal(pair.hostile, name))


async def test_a_terminal_ends_once(pair: Pair) -> None:
    again = json.dumps({**json.loads(EXITED), "exit_code": 9})
    name = await start(pair, (DATA, "before"), (MESSAGE, EXITED), (DATA, "after"), (MESSAGE, again), (RESULT, "{}"))
    for _ in range(2):
        told = await look(pair, name)
        assert told.data == b"before" and told.body == {"exit_code": 0}
    await end(pair, name)


@pytest.mark.parametrize("code", ['"0"', "true", "null", str(HUGE), "[]", "2147483648"])
async def test_lies_about_a_terminals_end(pair: Pair, code: str) -> None:
    said = f'{{"exited": true, "exit_code": {code}, "user_processes": 0}}'
    name = await start(pair, (DATA, "x"), (MESSAGE, said), (RESULT, "{}"))
    told = await look(pair, name)
    told.check(code)
    assert isinstance(told.error, InnkeeperError)
    listed = await pair.host.request(terminal_verbs.ListTerminals(pair.hostile))
    assert [row["exit_code"] for row in listed["terminals"] if row["id"] == name] == [None]
    await end(pair, name)


async def test_a_terminal_without_end_is_kept_small(pair: Pair) -> None:
    endless = {"kind": DATA, "text": "x", "repeat": 200_000, "times": 60}
    name = await start(pair, endless, (MESSAGE, EXITED), (RESULT, "{}"))
    async with pair.suffering(), pair.call(terminal_verbs.AttachTerminal(pair.hostile, name)):
        # It is not read.
        await asyncio.sleep(1)

    async def over() -> bool:
        told = await pair.host.request(terminal_verbs.ListTerminals(pair.hostile))
        return not any(row["alive"] for row in told["terminals"])

    await eventually(over)
    folder = pair.host.daemon.fleet.terminals(pair.host.machine(pair.hostile))
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 2 << 20
    await end(pair, name)


async def test_a_terminal_that_claims_to_have_dropped_output_is_not_believed(pair: Pair) -> None:
    name = await start(pair, *claims(1 << 50), (MESSAGE, EXITED), (RESULT, "{}"))
    told = await look(pair, name)
    assert told.data.endswith(b"x") and told.body == {"exit_code": 0}
    assert all(one["offset"] <= (1 << 40) + CLAIMS for one in told.messages)
    await end(pair, name)


async def test_one_that_attaches_again_may_lie_once(pair: Pair) -> None:
    """The link breaks, and the agent says that everything up to somewhere far away is gone."""
    claim = json.dumps({**json.loads(STARTED), "offset": 2**62})
    await pair.prepare("attach", script((MESSAGE, claim), *claims(1 << 50), (MESSAGE, EXITED), (RESULT, "{}")))
    name = await start(pair, (DATA, "before"), (0, ""))
    told = await look(pair, name)
    told.check("an offset far away")
    assert told.body == {"exit_code": 0} and told.data.endswith(b"x")
    listed = await pair.host.request(terminal_verbs.ListTerminals(pair.hostile))
    (row,) = [row for row in listed["terminals"] if row["id"] == name]
    assert row["offset"] < 2**41
    await end(pair, name)


# --- programs (SSH sessions) -----------------------------------------------------------------------------------------


def program(pair: Pair, *steps: tuple[int, str] | dict[str, Any], **more: Any) -> RunProgram:
    """A program that is what the agent says of it."""
    return RunProgram(pair.hostile, command=script((MESSAGE, STARTED), *steps), **more)


@pytest.mark.parametrize(
    "code", ['"0"', "true", "null", str(HUGE), "[]", "2147483648", "NaN"], ids=lambda code: code[:12]
)
async def test_lies_about_a_programs_end(pair: Pair, code: str) -> None:
    await pair.host.ensure(pair.hostile)
    said = f'{{"exited": true, "exit_code": {code}, "user_processes": 0}}'
    told = await pair.ask(program(pair, (DATA, "x"), (MESSAGE, said), (RESULT, "{}")))
    told.check(code)
    assert told.error is not None


async def test_a_program_ends_once_and_by_a_signal_that_there_is(pair: Pair) -> None:
    await pair.host.ensure(pair.hostile)
    again = json.dumps({**json.loads(EXITED), "exit_code": 9})
    told = await pair.ask(program(pair, (MESSAGE, EXITED), (MESSAGE, again), (RESULT, "{}")))
    assert told.body == {"exit_code": 0, "signal": None}
    for number in ('"KILL"', "-1", "65", "true", str(HUGE)):
        lie = f'{{"exited": true, "exit_code": 1, "user_processes": 0, "signal": {number}}}'
        told = await pair.ask(program(pair, (MESSAGE, lie), (RESULT, "{}")))
        assert told.body == {"exit_code": 1, "signal": None}, number
    told = await pair.ask(program(pair, (DATA, "x"), (RESULT, "{}")))
    assert isinstance(told.error, GuestError), "it never said how it ended"


OUTPUTS = {
    "output": {"kind": DATA, "text": "x", "repeat": 200_000, "times": -1},
    "single bytes": {"kind": DATA2, "text": "x", "times": 30_000},
    "words": {"kind": MESSAGE, "text": STARTED, "times": 600, "pause": 1},
}


@pytest.mark.parametrize(
    "reads", [pytest.param(False, id="unread"), pytest.param(True, id="read", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("what", OUTPUTS)
async def test_a_program_that_says_things_without_end_costs_little_and_can_be_left(
    pair: Pair, what: str, *, reads: bool
) -> None:
    await pair.host.ensure(pair.hostile)
    took = 0
    async with pair.suffering(), pair.call(program(pair, OUTPUTS[what])) as call:
        until = time.monotonic() + 1
        if reads:
            with contextlib.suppress(TimeoutError, InnkeeperError):
                async with asyncio.timeout(1):
                    async for one in call.events():
                        took += len(one.data) if isinstance(one, Data) else 0
        await asyncio.sleep(max(0.0, until - time.monotonic()))
    print(f"{what}: {took >> 10} KiB")


async def test_a_program_that_takes_nothing_holds_up_only_who_runs_it(pair: Pair) -> None:
    await pair.host.ensure(pair.hostile)
    silent = {"kind": MESSAGE, "text": "{}", "times": 75, "pause": 20}
    async with pair.suffering(), pair.call(program(pair, silent)) as call:
        sending = asyncio.create_task(call.send_data(bytes(16 << 20)))
        await asyncio.wait([sending], timeout=1)
        assert not sending.done()
        sending.cancel()


@pytest.mark.parametrize(
    "offset", ["0", "5", "7", str(2**62), str(HUGE), "-1", '"6"', "null", "[]"], ids=lambda text: text[:12]
)
async def test_a_program_whose_link_broke_goes_on_where_it_was_or_not_at_all(pair: Pair, offset: str) -> None:
    """Six bytes had come: an agent that goes on elsewhere has lost some, or says some twice."""
    said = f'{{"started": true, "pid": 1, "offset": {offset}}}'
    await pair.prepare("attach", script((MESSAGE, said), (DATA, "after"), (MESSAGE, EXITED), (RESULT, "{}")))
    told = await pair.ask(program(pair, (DATA, "before"), (0, "")))
    told.check(offset)
    assert told.error is not None and told.data == b"before"


async def test_a_program_whose_link_broke_goes_on(pair: Pair) -> None:
    """The control of the test above."""
    said = '{"started": true, "pid": 1, "offset": 6}'
    await pair.prepare("attach", script((MESSAGE, said), (DATA, "after"), (MESSAGE, EXITED), (RESULT, "{}")))
    told = await pair.ask(program(pair, (DATA, "before"), (0, "")))
    assert (told.data, told.body) == (b"beforeafter", {"exit_code": 0, "signal": None})
