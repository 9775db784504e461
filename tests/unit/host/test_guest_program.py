"""A guest's program over links that break, and what is said to it on its way; the agent's end follows a script."""

import asyncio
from types import SimpleNamespace
from uuid import uuid4

import pytest
from tests.unit.virtual_time import anyio_backend as anyio_backend

from innkeeper.errors import LinkLostError
from innkeeper.host.guest_program import GuestProgram
from innkeeper.host.journal import Journal
from innkeeper.host.output_pace import OutputPace
from innkeeper.host.terminal import SCROLLBACK, Size, Terminal
from innkeeper.wire.stream import Message

pytestmark = pytest.mark.anyio
EXITED = {"exited": True, "exit_code": 0, "user_processes": 0}


class Link:
    """A stream: says what it is told to, and then breaks where `lost` says so. What it is told is kept in `heard`."""

    def __init__(self, *said, lost=False):
        self.said, self.lost, self.heard, self.over = list(said), lost, [], False
        self.go_on = asyncio.Event()

    async def next_event(self):
        if self.said:
            # As if each came alone.
            for _ in range(5):
                await asyncio.sleep(0)
            return Message(self.said.pop(0))
        await self.go_on.wait()
        self.over = True
        if self.lost:
            raise LinkLostError
        return Message(EXITED)

    async def send_message(self, message):
        # It is written; whether the other end reads it before the link breaks, nobody knows.
        self.heard.append(message)


class Machine:
    """Whose agent answers with one link after another."""

    def __init__(self, *links):
        self.links, self.tasks = list(links), []
        self.output_pace = OutputPace()
        self.running = SimpleNamespace(exited=asyncio.get_running_loop().create_future())
        self.endpoint = self

    async def open(self, verb, params, timeout_seconds=5.0):
        return self.links.pop(0)

    def start_task(self, work):
        self.tasks.append(asyncio.get_running_loop().create_task(work))
        return self.tasks[-1]


def follow(terminal):
    return asyncio.ensure_future(
        terminal.program.follow(keep=terminal.heard, skip=terminal.skip_to, begun=terminal.relinked)
    )


def made(tmp_path, *links):
    machine, terminal_id = Machine(*links), uuid4()
    program = GuestProgram(machine, str(terminal_id), Journal(tmp_path, terminal_id, kept=SCROLLBACK))
    return machine, Terminal(terminal_id, "t", "sh", Size(80, 24), machine, tmp_path, program)


async def test_a_size_that_was_said_while_a_link_broke_is_said_again(tmp_path):
    first, second = Link({"started": True}, lost=True), Link({"started": True, "offset": 0})
    _, terminal = made(tmp_path, first, second)
    await terminal.program.start({})
    following = follow(terminal)
    await asyncio.sleep(1)
    terminal.resize(Size(100, 30))
    await asyncio.sleep(1)
    wanted = {"resize": {"rows": 30, "cols": 100}}
    assert first.heard[-1] == wanted
    first.go_on.set()
    await asyncio.sleep(1)
    assert second.heard == [wanted]
    second.go_on.set()
    assert await following == EXITED
    terminal.remove()


async def test_an_agent_that_says_again_and_again_that_it_runs_begins_nothing_more(tmp_path):
    link = Link(*[{"started": True}] * 100)
    machine, terminal = made(tmp_path, link)
    # As it was started with.
    terminal.told = terminal.size
    await terminal.program.start({})
    following = follow(terminal)
    await asyncio.sleep(1)
    assert not link.said and len(machine.tasks) == 1
    assert link.heard == [{"resize": {"rows": 24, "cols": 80}}]
    link.go_on.set()
    await following
    terminal.remove()
