"""Cells, programs without a shell, and executions that nobody waits for, over the bus in real guests."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from tests.integration.daemon_fixture import NEEDS_RUNSC, Answer, Host, eventually, running_host

from innkeeper.bus.contract import Data, Message
from innkeeper.core import host_verbs as verbs
from innkeeper.core.cell_results import parse_results
from innkeeper.core.host_verbs import to_wire
from innkeeper.errors import ConflictError, ExecutionNotFoundError, InvalidRequestError

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]


@pytest.fixture(scope="module")
async def shared(host: Host) -> UUID:
    """An instance for tests that leave nothing in it."""
    return await host.ensure(env={"FROM_PROFILE": "profile"})


@pytest.fixture
def kernel() -> str:
    return f"k-{uuid4()}"


async def cell(host: Host, instance: UUID, kernel: str, code: str, **more: object) -> Answer:
    return await host.run(instance, code, kernel=kernel, merge=False, **more)


async def results(host: Host, instance: UUID, execution_id: UUID) -> list[dict[str, str]]:
    request = verbs.ReadResults(instance, execution_id)
    packed = b""
    async with host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call:
        async for event in call.events():
            if isinstance(event, Data):
                packed += event.data
        await call.result()
    return [one.data for one in parse_results(packed)]


async def follow(host: Host, instance: UUID, execution_id: UUID, offset: int = 0) -> tuple[list[object], dict]:
    """[(channel, bytes) or {"offset"}] and the record at the end."""
    request = verbs.FollowOutput(instance, execution_id, offset)
    found: list[object] = []
    async with host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call:
        async for event in call.events():
            if isinstance(event, Data):
                found.append((event.channel, event.data))
            elif isinstance(event, Message):
                found.append(event.body)
        return found, await call.result()


async def test_cells_keep_their_state_and_report_everything(host: Host, instance: UUID, kernel: str) -> None:
    first = await cell(host, instance, kernel, "import os, sys\nx = 20\nopen('made', 'w').write('m')\nx + 1")
    assert (first.text, first.errors, first.exit_code) == ("21\n", b"", 0)
    assert first.body["kernel"] == {"fresh": True, "lost": False}
    assert first.changed == {"/home/user/made": "created"}
    assert await results(host, instance, first.execution_id) == [{"text/plain": "21"}]
    second = await cell(
        host,
        instance,
        kernel,
        "print(x, os.getcwd()); print('e', file=sys.stderr)",
    )
    assert (second.text, second.errors) == ("20 /home/user\n", b"e\n")
    assert second.body["kernel"] == {"fresh": False, "lost": False}
    assert (second.body["output_bytes"], second.body["stderr_bytes"]) == (14 + 2, 2)
    burnt = await cell(host, instance, kernel, "n = 0\nfor i in range(3_000_000): n += i")
    assert burnt.body["cpu_ms"] > 10
    assert burnt.body["duration_ms"] >= burnt.body["cpu_ms"] * 0.5
    wrong = await cell(host, instance, kernel, "def f():\n    return 1 / 0\nf()")
    assert wrong.exit_code == 1
    assert wrong.errors.decode().splitlines()[0] == "Traceback (most recent call last):"
    assert "<kernel>" not in wrong.errors.decode()
    assert wrong.errors.decode().splitlines()[-1] == "ZeroDivisionError: division by zero"
    html = "class H:\n    def _repr_html_(self): return '<i>'\n    def __repr__(self): return 'H'\nH()"
    shown = await cell(host, instance, kernel, html)
    assert await results(host, instance, shown.execution_id) == [{"text/plain": "H", "text/html": "<i>"}]


async def test_an_interpreter_belongs_to_its_name(host: Host, shared: UUID, kernel: str) -> None:
    await cell(host, shared, kernel, "x = 1")
    other = await cell(host, shared, kernel + "-2", "x")
    assert other.exit_code == 1
    assert (await cell(host, shared, kernel, "x")).text == "1\n"
    for name in (kernel, kernel + "-2"):
        assert (await cell(host, shared, name, "import os; os._exit(3)")).body["kernel"]["lost"]


async def test_a_time_limit_interrupts_and_keeps_the_state(host: Host, shared: UUID, kernel: str) -> None:
    await cell(host, shared, kernel, "x = 1")
    answer = await cell(host, shared, kernel, "while True: pass", timeout_seconds=1)
    assert (answer.exit_code, answer.body["timed_out"], answer.body["kernel"]["lost"]) == (124, True, False)
    assert (await cell(host, shared, kernel, "x")).text == "1\n"
    answer = await cell(host, shared, kernel, "import os\nos._exit(7)")
    assert (answer.exit_code, answer.body["kernel"]) == (7, {"fresh": False, "lost": True})
    answer = await cell(host, shared, kernel, "print('new')")
    assert (answer.text, answer.body["kernel"]) == ("new\n", {"fresh": True, "lost": False})


async def test_endless_output_is_kept_with_a_gap_and_can_be_interrupted(host: Host, shared: UUID, kernel: str) -> None:
    answer = await cell(host, shared, kernel, "while True: print('x' * 4095)", timeout_seconds=2)
    assert (answer.exit_code, answer.body["kernel"]["lost"], answer.body["output_truncated"]) == (124, False, True)
    assert len(answer.output) == 1_048_576
    assert answer.errors.endswith(b"KeyboardInterrupt\n")
    assert answer.body["stderr_bytes"] == len(answer.errors)


async def test_an_idle_interpreter_lets_the_guest_freeze(host: Host, instance: UUID, kernel: str) -> None:
    await cell(host, instance, kernel, "x = 1")

    async def frozen() -> bool:
        return (await host.listed(instance) or {})["frozen"]

    await eventually(frozen, seconds=15)
    assert (await cell(host, instance, kernel, "x")).text == "1\n"


async def test_programs_without_a_shell(host: Host, shared: UUID) -> None:
    answer = await host.run(shared, "", argv=("printf", "%s|", "a b", "$HOME", "*"), merge=False)
    assert (answer.text, answer.exit_code) == ("a b|$HOME|*|", 0)
    script = "echo $FROM_PROFILE; id -un; pwd; cat; echo e >&2; touch made-by-argv"
    answer = await host.run(
        shared,
        "",
        argv=("sh", "-c", script),
        merge=False,
        stdin=b"in\n",
        cwd="/home/user",
    )
    assert (answer.text, answer.errors) == ("profile\nuser\n/home/user\nin\n", b"e\n")
    assert answer.changed == {"/home/user/made-by-argv": "created"}
    with pytest.raises(InvalidRequestError, match="no-such: command not found"):
        await host.run(shared, "", argv=("no-such",))
    root = await host.run(shared, "", argv=("id", "-u"), user="root")
    assert root.text == "0\n"


async def test_outputs_apart_keep_their_order(host: Host, shared: UUID) -> None:
    script = "for i in 1 2 3; do echo o$i; sleep 0.1; echo e$i >&2; sleep 0.1; done; exit 3"
    answer = await host.run(shared, script, merge=False)
    assert (answer.text, answer.errors, answer.exit_code) == ("o1\no2\no3\n", b"e1\ne2\ne3\n", 3)
    found, record = await follow(host, shared, answer.execution_id)
    assert found == [(1, b"o1\n"), (2, b"e1\n"), (1, b"o2\n"), (2, b"e2\n"), (1, b"o3\n"), (2, b"e3\n")]
    assert (record["ended"], record["exit_code"], record["stderr_bytes"]) == (True, 3, 9)
    assert await follow(host, shared, answer.execution_id, 7) == (
        [(1, b"2\n"), (2, b"e2\n"), (1, b"o3\n"), (2, b"e3\n")],
        record,
    )


async def test_an_execution_that_nobody_waits_for(host: Host, shared: UUID) -> None:
    request = verbs.Execute(
        shared, uuid4(), "echo one; read x; echo $x; sleep 0.5; exit 4", 30, stdin=True, merge=False, detach=True
    )
    async with host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call:
        await call.send_data(b"typed\n")
        await call.send_end()
        assert await call.result() == {}
    found, record = await follow(host, shared, request.execution_id)
    assert b"".join(data for _, data in found) == b"one\ntyped\n"
    assert (record["ended"], record["exit_code"]) == (True, 4)
    bad = verbs.Execute(shared, uuid4(), "", 30, argv=("no-such",), detach=True)
    with pytest.raises(InvalidRequestError, match="no-such"):
        await host.request(bad)


async def test_a_program_in_the_background_reads_its_input_when_it_likes(host: Host, shared: UUID) -> None:
    # As much as a request to the API can bring.
    data = bytes(range(256)) * 4_096
    line = "until [ -e /tmp/go ]; do sleep 0.1; done; md5sum"
    request = verbs.Execute(shared, uuid4(), line, 120, stdin=True, merge=False, detach=True)
    async with host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call:
        await call.send_data(data)
        await call.send_end()
        async with asyncio.timeout(60):
            assert await call.result() == {}
    assert not (await host.output(shared, request.execution_id))[0]["ended"]
    await host.run(shared, "touch /tmp/go")
    found, record = await follow(host, shared, request.execution_id)
    assert found == [(1, hashlib.md5(data).hexdigest().encode() + b"  -\n")]
    assert (record["ended"], record["exit_code"]) == (True, 0)


async def test_signals(host: Host, shared: UUID, kernel: str) -> None:
    async def begin(command: str, **more: object) -> UUID:
        request = verbs.Execute(shared, uuid4(), command, 30, merge=False, detach=True, **more)
        await host.request(request)

        async def said() -> bool:
            return (await host.output(shared, request.execution_id))[1] == b"begun\n"

        await eventually(said)
        return request.execution_id

    one = await begin("trap 'exit 9' TERM; echo begun; while :; do sleep 0.1; done")
    await host.request(verbs.SignalExecution(shared, one, 15))
    assert (await follow(host, shared, one))[1]["exit_code"] == 9
    with pytest.raises(ConflictError):
        await host.request(verbs.SignalExecution(shared, one, 15))
    with pytest.raises(ExecutionNotFoundError):
        await host.request(verbs.SignalExecution(shared, uuid4(), 15))
    for wrong in (0, 65, -9):
        with pytest.raises(InvalidRequestError, match="signal"):
            await host.request(verbs.SignalExecution(shared, one, wrong))
    one = await begin("import time; print('begun'); time.sleep(60)", kernel=kernel)
    await host.request(verbs.SignalExecution(shared, one, 2))
    assert (await follow(host, shared, one))[1]["exit_code"] == 130
    # One that waits for its turn is called off; the cell before it hears nothing.
    one = await begin("import time; print('begun'); time.sleep(60)", kernel=kernel)
    waiting = verbs.Execute(shared, uuid4(), "print('never')", 30, merge=False, detach=True, kernel=kernel)
    await host.request(waiting)
    await host.request(verbs.SignalExecution(shared, waiting.execution_id, 15))
    found, record = await follow(host, shared, waiting.execution_id)
    assert (found, record["exit_code"], record["signal"], record["kernel"]["lost"]) == ([], 143, 15, False)
    assert not (await host.output(shared, one))[0]["ended"]
    await host.request(verbs.SignalExecution(shared, one, 9))
    assert (await follow(host, shared, one))[1]["exit_code"] == 137


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Path]:
    yield tmp_path


async def test_a_restart_of_the_daemon_loses_neither_cells_nor_what_they_show(home: Path, kernel: str) -> None:
    async with running_host(home, keep_running=True) as first:
        instance = await first.ensure()
        await cell(first, instance, kernel, "x = 5")
        code = "import sys, time\nfor n in range(6):\n    print(n, file=sys.stderr if n % 2 else sys.stdout); time.sleep(0.4)\nx"
        request = verbs.Execute(instance, uuid4(), code, 30, kernel=kernel, merge=False, detach=True)
        await first.request(request)
        await asyncio.sleep(0.6)
    async with running_host(home) as second:
        second.instances.add(instance)
        found, record = await follow(second, instance, request.execution_id)
        assert (record["ended"], record["lost"]) == (True, None)
        for channel, expected in ((1, b"0\n2\n4\n5\n"), (2, b"1\n3\n5\n")):
            assert b"".join(data for at, data in found if at == channel) == expected
        assert (record["exit_code"], record["kernel"]) == (0, {"fresh": False, "lost": False})
        assert await results(second, instance, request.execution_id) == [{"text/plain": "5"}]
        assert (await cell(second, instance, kernel, "x")).text == "5\n"
        await second.destroy(instance)
