"""Terminals of the host daemon on real guests: what is typed, seen, kept, resized and ended."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests import leaks
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, eventually, running_host

from innkeeper.bus.contract import Call, Data, Message
from innkeeper.core import terminal_verbs as verbs
from innkeeper.core.host_verbs import Execute, ListMachines, SignalExecution, to_wire
from innkeeper.errors import (
    ConflictError,
    InstanceFailedError,
    InvalidRequestError,
    RateLimitedError,
    TerminalNotFoundError,
)
from innkeeper.host import terminals
from innkeeper.host.terminal import SCROLLBACK, WINDOW

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]

# Without readline, so that the terminal itself echoes.
SHELL = (("bash", "--norc", "--noediting", "-i"),)
SECONDS = 20
INPUT = bytes(32 + n % 95 for n in range(3_000_001))


class Viewer:
    """Someone at a terminal: what they saw so far, and where it begins."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.seen = bytearray()
        self.offsets: list[int] = []
        self.exit_code: int | None = None
        self._changed = asyncio.Event()
        self.reading: asyncio.Task[None]

    async def read(self) -> None:
        async for event in self.call.events():
            if isinstance(event, Data):
                self.seen += event.data
            elif isinstance(event, Message):
                self.offsets.append(event.body["offset"])
            self._changed.set()
        self.exit_code = (await self.call.result())["exit_code"]

    async def type(self, text: str) -> None:
        await self.call.send_data(text.encode())

    async def until(self, text: str, *, after: int = 0) -> int:
        """Wait for a text; where it ends."""
        async with asyncio.timeout(SECONDS):
            while (at := self.seen.find(text.encode(), after)) < 0:
                after = max(after, len(self.seen) - len(text))
                self._changed.clear()
                await self._changed.wait()
        return at + len(text)

    async def press(self, key: str, text: str, *, after: int = 0) -> int:
        """Type a key until it shows: a program that is only just starting has not got the terminal yet."""
        async with asyncio.timeout(SECONDS):
            while True:
                await self.type(key)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        return await self.until(text, after=after)

    async def end(self) -> None:
        """Wait for the end of it. Raises why there is none."""
        async with asyncio.timeout(SECONDS):
            await asyncio.shield(self.reading)


async def start(
    host: Host, instance: UUID, *, programs: Any = SHELL, cols: int = 80, rows: int = 24, **more: Any
) -> str:
    answer = await host.request(verbs.StartTerminal(instance, programs, "test", cols, rows, **more))
    return str(answer["terminal"]["id"])


async def rows(host: Host, instance: UUID) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in (await host.request(verbs.ListTerminals(instance)))["terminals"]}


@asynccontextmanager
async def looking(
    host: Host, instance: UUID, name: str, *, offset: int = 0, read: bool = True
) -> AsyncIterator[Viewer]:
    request = verbs.AttachTerminal(instance, name, offset)
    async with host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call:
        viewer = Viewer(call)
        viewer.reading = asyncio.create_task(viewer.read() if read else asyncio.sleep(3600))
        try:
            yield viewer
        except TimeoutError:
            print(f"the last that was seen: {bytes(viewer.seen[-2000:])!r}")
            raise
        finally:
            viewer.reading.cancel()
            await asyncio.wait([viewer.reading])
            if not viewer.reading.cancelled():
                viewer.reading.exception()


async def test_a_shell_with_its_size_jobs_and_control_c(host: Host, instance: UUID) -> None:
    name = await start(host, instance, cols=91, rows=17)
    async with looking(host, instance, name) as viewer:
        await viewer.type("stty size; echo $TERM; tty\n")
        await viewer.until("17 91\r\nxterm-256color\r\n/dev/pts/")
        await viewer.call.send_message({"resize": {"cols": 120, "rows": 40}})
        await viewer.call.send_message({"resize": {"cols": 0, "rows": -1}})
        await viewer.type("trap 'echo resized to $(stty size)' WINCH; cat\n")
        # `cat` says it again: it runs. gVisor leaves the character of a signal in the input too, so a line's end goes with it.
        at = await viewer.press("mark\n", "mark\r\nmark\r\n")
        await host.request(verbs.ResizeTerminal(instance, name, cols=100, rows=30))
        at = await viewer.press("\x03\n", "resized to 30 100", after=at)
        await viewer.type("\ntrap - WINCH; sleep 1000\n")
        # Not before it runs: a shell that is only just starting it can be stopped with it.
        await eventually(lambda: _counts(host, instance, 1))
        await viewer.type("\x1a")
        at = await viewer.until("sleep 1000\r\n", after=await viewer.until("Stopped", after=at))
        await viewer.type("\nfg\n")
        at = await viewer.until("sleep 1000\r\n", after=at)
        # Without a line's end: gVisor looks at nothing that is typed behind a line which nobody reads, and a signal that came too early has no next.
        at = await viewer.press("\x03", "bash-5.2$ ", after=at)
        await viewer.type("\necho interr''upted\n")
        await viewer.until("interrupted\r\n", after=at)
        await viewer.type("\nexit 7\n")
        await viewer.end()
        assert viewer.exit_code == 7
    row = (await rows(host, instance))[name]
    assert (row["alive"], row["exit_code"], row["cols"], row["rows"], row["viewers"]) == (False, 7, 100, 30, 0)
    with pytest.raises(ConflictError):
        await host.request(verbs.ResizeTerminal(instance, name, cols=10, rows=10))
    # Whoever comes too late still sees it, and how it ended.
    async with looking(host, instance, name) as late:
        await late.until("exit 7")
        await late.end()
        assert late.exit_code == 7


async def _sized(host: Host, instance: UUID, name: str, size: tuple[int, int]) -> bool:
    row = (await rows(host, instance))[name]
    return (row["cols"], row["rows"]) == size


async def test_names_limits_and_programs(host: Host, instance: UUID, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await start(host, instance, name="mine") == "mine"
    with pytest.raises(ConflictError):
        await start(host, instance, name="mine")
    for wrong in ("", "a/b", "../x", "x" * 65):
        with pytest.raises(InvalidRequestError):
            await start(host, instance, name=wrong)
    for size in ({"cols": 0}, {"rows": 1_001}):
        with pytest.raises(InvalidRequestError):
            await start(host, instance, **size)
    with pytest.raises(InvalidRequestError, match="nosuch"):
        await start(host, instance, programs=(("/bin/nosuch", "-i"),))
    # The first one that is there; nothing is left of one that was not.
    await start(host, instance, name="other", programs=(("/bin/nosuch",), ("cat",)))
    assert set(await rows(host, instance)) == {"mine", "other"}
    monkeypatch.setattr(terminals, "MAX_VIEWERS", 1)
    async with looking(host, instance, "mine") as viewer:
        await viewer.until("$")
        with pytest.raises(RateLimitedError):
            async with looking(host, instance, "mine") as second:
                await second.end()
    with pytest.raises(TerminalNotFoundError):
        async with looking(host, instance, "nosuch") as nobody:
            await nobody.end()
    folder = host.daemon.fleet.terminals(host.machine(instance))
    for name in ("mine", "other"):
        await host.request(verbs.EndTerminal(instance, name))
    assert (await rows(host, instance), list(folder.iterdir())) == ({}, [])
    assert (await host.ok(instance, "ps -eo tty= | grep -c pts || true")).text == "0\n"
    await start(host, instance, name="mine")
    await host.request(verbs.EndTerminal(instance, "mine"))


async def test_what_ignores_the_hangup_is_killed_with_its_jobs(host: Host, instance: UUID) -> None:
    name = await start(host, instance)
    async with looking(host, instance, name) as viewer:
        await viewer.type("trap '' HUP; sleep 1001 & sleep 1002\n")
        await viewer.until("sleep 1002\r\n")
        # The shell has to have come that far.
        await eventually(lambda: _counts(host, instance, 2))
        answer = await host.request(verbs.EndTerminal(instance, name))
        assert answer["terminal"]["exit_code"] == 137
        await eventually(lambda: viewer.exit_code == 137)
    await eventually(lambda: _counts(host, instance, 0))


async def _counts(host: Host, instance: UUID, wanted: int) -> bool:
    return (await host.ok(instance, "pgrep -xc sleep || true")).text == f"{wanted}\n"


async def test_several_look_and_type(host: Host, instance: UUID) -> None:
    name = await start(host, instance)
    async with looking(host, instance, name) as one, looking(host, instance, name) as two:
        await one.type("echo from-$((40+1))\n")
        await asyncio.gather(one.until("from-41\r\n"), two.until("from-41\r\n"))
        await two.type("echo from-$((40+2))\n")
        at, _ = await asyncio.gather(one.until("from-42\r\n"), two.until("from-42\r\n"))
        assert (await rows(host, instance))[name]["viewers"] == 2
    await eventually(lambda: _alone(host, instance, name))
    # Who comes again sees what there was; from where they were, when they say so.
    async with looking(host, instance, name) as again, looking(host, instance, name, offset=at) as later:
        await again.until("from-42\r\n")
        await later.type("echo third\n")
        await later.until("third\r\nbash")
        assert (again.offsets, later.offsets) == ([0], [at])
        assert b"from-42" not in later.seen


async def _alone(host: Host, instance: UUID, name: str) -> bool:
    return (await rows(host, instance))[name]["viewers"] == 0


async def test_a_flood_is_bounded_and_slows_nobody(host: Host, instance: UUID) -> None:
    total = 4_000_000
    name = await start(host, instance, programs=(("sh", "-c", f"yes | head -c {total}; echo done; cat"),))
    async with looking(host, instance, name, read=False), looking(host, instance, name) as reader:
        # One who takes nothing costs the one who reads no byte: with every newline it is half as much again.
        await reader.until("done\r\n")
        assert reader.offsets == [0]
        assert len(reader.seen) == total * 3 // 2 + len("done\r\n")
    folder = host.daemon.fleet.terminals(host.machine(instance))
    # And it ends although the only one who looks takes nothing.
    async with looking(host, instance, name, read=False) as stuck:
        await stuck.type("one\n")
    alone = await start(host, instance, programs=(("sh", "-c", f"yes | head -c {total}; echo done; cat"),))
    async with looking(host, instance, alone, read=False):
        # All of it: what comes while somebody looks is theirs beside what is kept.
        await eventually(lambda: _said(host, instance, alone, total * 3 // 2 + len("done\r\n")))
    async with looking(host, instance, alone) as late:
        await late.until("done\r\n")
        assert late.offsets[0] > total
        assert len(late.seen) <= SCROLLBACK.tail_bytes
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2 * SCROLLBACK.tail_bytes + 65_536
    for one in (name, alone):
        await host.request(verbs.EndTerminal(instance, one))


async def _said(host: Host, instance: UUID, name: str, size: int) -> bool:
    return bool((await rows(host, instance))[name]["offset"] >= size)


async def test_a_program_waits_for_the_one_who_reads(host: Host, instance: UUID) -> None:
    name = await start(host, instance, programs=(("sh", "-c", "read x; seq 1 400000; cat"),))
    async with looking(host, instance, name) as viewer:
        await viewer.type("go\n")
        at = await viewer.until("\n400000\r\n")
        # Not a byte of it was skipped.
        assert viewer.offsets == [0] and at > 2 * WINDOW
        assert viewer.seen[:at].count(b"\n") == 400_001
    await host.request(verbs.EndTerminal(instance, name))


async def test_much_input_at_once(host: Host, instance: UUID) -> None:
    name = await start(
        host, instance, programs=(("sh", "-c", "stty raw -echo; echo ready; head -c 3000000 | sha256sum; cat"),)
    )
    async with looking(host, instance, name) as viewer:
        await viewer.until("ready")
        sent = asyncio.create_task(viewer.call.send_data(INPUT))
        # A window that is dragged meanwhile: hundreds of sizes.
        for cols in range(500):
            await viewer.call.send_message({"resize": {"cols": 1 + cols, "rows": 24}})
        digest = hashlib.sha256(INPUT[:3_000_000]).hexdigest()
        await viewer.until(digest)
        await sent
        await eventually(lambda: _sized(host, instance, name, (500, 24)))
    await host.request(verbs.EndTerminal(instance, name))


async def test_a_guest_with_a_terminal_is_not_frozen(host: Host, instance: UUID) -> None:
    name = await start(host, instance)
    await asyncio.sleep(1)
    row = await host.listed(instance)
    assert row is not None and not row["frozen"]
    await host.request(verbs.EndTerminal(instance, name))

    async def frozen() -> bool:
        return bool((await host.listed(instance) or {})["frozen"])

    await eventually(frozen)
    assert await rows(host, instance) == {}


async def test_it_outlives_the_daemon(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("home")
    async with running_host(home, keep_running=True) as first:
        instance, other = await first.ensure(), await first.ensure()
        name = await start(first, instance, name="lasting", cols=90)
        await start(first, instance, name="ended", programs=(("sh", "-c", "echo bye; exit 3"),))
        await start(first, other, name="lost")
        async with looking(first, instance, name) as viewer:
            await viewer.type("x=kept; sleep 1; echo while-$((1+1))\n")
            await viewer.until("sleep 1")
            await first.request(verbs.ResizeTerminal(instance, name, cols=77, rows=33))
            await eventually(lambda: _ended(first, instance, "ended"))
        await first.destroy(other, keep_disk=True)
    async with running_host(home) as second:
        found = await rows(second, instance)
        assert (found["lasting"]["alive"], found["lasting"]["cols"], found["ended"]["exit_code"]) == (True, 77, 3)
        async with looking(second, instance, name) as viewer:
            await viewer.until("while-2\r\n")
            await viewer.type("echo $x\n")
            # Typed before the prompt was there it stands behind the prompt, else on a line of its own.
            await viewer.until("kept\r\n")
        async with looking(second, instance, "ended") as viewer:
            await viewer.until("bye\r\n")
        # The guest was started again: the terminal is known, and that it is gone.
        await second.ensure(other)
        lost = (await rows(second, other))["lost"]
        assert (lost["alive"], lost["exit_code"]) == (False, None)
        with pytest.raises(InstanceFailedError):
            async with looking(second, other, "lost") as viewer:
                await viewer.end()
        # A sandbox that is killed takes its terminals along, and those who look hear of it.
        pid = int((second.machine(instance).state_dir / "sandbox.pid").read_text())
        with pytest.raises(InstanceFailedError):
            async with looking(second, instance, name) as viewer:
                os.kill(pid, 9)
                await viewer.end()
    assert leaks.wait_for_none(home) == []


async def _ended(host: Host, instance: UUID, name: str) -> bool:
    return not (await rows(host, instance))[name]["alive"]


async def test_what_runs_by_itself_keeps_a_guest_from_being_idle(host: Host, instance: UUID) -> None:
    """A terminal that nobody looks at, and a command that nobody waits for: the machine says of itself that it is in use."""

    async def idle() -> float:
        machines = (await host.request(ListMachines()))["machines"]
        return next(float(one["idle_seconds"]) for one in machines if one["instance_id"] == str(instance))

    name = await start(host, instance, programs=(("sleep", "1000"),))
    await asyncio.sleep(0.2)
    assert await idle() == 0.0
    await host.request(verbs.EndTerminal(instance, name))
    await eventually(idle)
    execution = uuid4()
    await host.request(Execute(instance, execution, "sleep 1000", 600, detach=True))
    await asyncio.sleep(0.2)
    assert await idle() == 0.0
    await host.request(SignalExecution(instance, execution, 9))
    await eventually(idle)


async def test_a_broken_link_is_not_noticed(host: Host, instance: UUID) -> None:
    name = await start(host, instance)
    async with looking(host, instance, name) as viewer:
        await viewer.type("echo before\n")
        await viewer.until("before\r\nbash")
        link = await host.machine(instance).endpoint.link(timeout_seconds=10)
        link.close()
        await eventually(lambda: host.machine(instance).endpoint.linked)
        terminal = host.machine(instance).terminals[name]
        await eventually(lambda: terminal.program.linked)
        await viewer.type("echo af''ter\n")
        await viewer.until("after\r\n")
        assert viewer.offsets == [0]
    with contextlib.suppress(TerminalNotFoundError):
        await host.request(verbs.EndTerminal(instance, name))


async def test_echo_is_quick(host: Host, instance: UUID) -> None:
    """No bound on a noisy machine: printed, and that the bytes come back one by one."""
    name = await start(host, instance, programs=(("cat",),))
    async with looking(host, instance, name) as viewer:
        took = []
        for number in range(50):
            began = time.perf_counter()
            await viewer.type("abcdefghij"[number % 10])
            while len(viewer.seen) <= number:
                viewer._changed.clear()
                await viewer._changed.wait()
            took.append((time.perf_counter() - began) * 1000)
        print(f"echo: median {sorted(took)[25]:.2f} ms")
    await host.request(verbs.EndTerminal(instance, name))
