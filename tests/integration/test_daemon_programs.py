"""Programs of the host daemon in real guests: their bytes, orders and ends, and that nobody outlives who ran them."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import pytest
from tests import leaks
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, eventually, running_host

from innkeeper.bus.contract import Call, Data, Message
from innkeeper.core.host_verbs import to_wire
from innkeeper.core.program_verbs import RunProgram
from innkeeper.errors import FileMissingError, InvalidRequestError
from innkeeper.host.programs import ID_PREFIX

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]
SECONDS = 60


@asynccontextmanager
async def running(host: Host, instance_id: UUID, **asked: Any) -> AsyncIterator[Call]:
    """A program, which runs."""
    request = RunProgram(instance_id, **asked)
    async with (
        asyncio.timeout(SECONDS),
        host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call,
    ):
        first = await anext(aiter(call.events()))
        assert isinstance(first, Message) and first.body == {"started": True}
        yield call


async def said(call: Call) -> tuple[bytes, bytes]:
    """Both outputs, to their ends."""
    outputs = {1: b"", 2: b""}
    async for event in call.events():
        if isinstance(event, Data):
            outputs[event.channel] += event.data
    return outputs[1], outputs[2]


async def until_seen(call: Call, text: bytes) -> None:
    seen = b""
    async for event in call.events():
        if isinstance(event, Data):
            seen += event.data
            if text in seen:
                return
    raise AssertionError(seen)


async def test_input_and_both_outputs_arrive_whole(host: Host, instance: UUID) -> None:
    content = os.urandom(1 << 20) * 4
    async with running(host, instance, command="echo wrong >&2; cat; exit 3") as call:
        feeding = asyncio.ensure_future(call.send_data(content))
        feeding.add_done_callback(lambda _: asyncio.ensure_future(call.send_message({"end": True})))
        output, errors = await said(call)
        assert await call.result() == {"exit_code": 3, "signal": None}
    assert hashlib.sha256(output).digest() == hashlib.sha256(content).digest() and errors == b"wrong\n"


async def test_signals_sizes_and_the_first_program_that_is_there(host: Host, instance: UUID) -> None:
    async with running(host, instance, programs=(("/no/such",), ("/bin/sleep", "1000"))) as call:
        await call.send_message({"end": True})
        await call.send_message({"signal": 15})
        await said(call)
        assert await call.result() == {"exit_code": 143, "signal": 15}
    async with running(
        host, instance, command="tty; until stty size | grep '20 90'; do sleep 0.05; done", cols=80, rows=24
    ) as call:
        await until_seen(call, b"/dev/pts")
        await call.send_message({"resize": {"cols": 90, "rows": 20}})
        await said(call)
        assert (await call.result())["exit_code"] == 0
    with pytest.raises(FileMissingError):
        async with running(host, instance, programs=(("/no/such",),)):
            pass
    for wrong in (
        {},
        {"command": "true", "programs": (("true",),)},
        {"command": "true", "cols": 80},
        {"command": "true", "cols": 0, "rows": 1},
    ):
        with pytest.raises(InvalidRequestError):
            async with running(host, instance, **wrong):
                pass


async def alive(host: Host, instance: UUID, what: str) -> bool:
    return (await host.run(instance, f"pgrep -f '[s]leep {what}'")).exit_code == 0


@pytest.mark.parametrize("size", [{}, {"cols": 80, "rows": 24}])
async def test_whoever_goes_away_hangs_up(host: Host, instance: UUID, size: dict[str, int]) -> None:
    line = "nohup sleep 2222 >/dev/null 2>&1 & sleep 1111 & echo $((40 + 2)); sleep 1111"
    async with running(host, instance, command=line, **size) as call:
        await until_seen(call, b"42")
        assert await alive(host, instance, "1111")
    await eventually(lambda: _not(alive(host, instance, "1111")))
    # What ignores it runs on.
    assert await alive(host, instance, "2222")
    await host.run(instance, "pkill -KILL -f '[s]leep 2222'")


async def _not(question: Any) -> bool:
    return not await question


async def test_the_next_daemon_hangs_up_on_what_the_last_one_ran(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("home")
    async with running_host(home, keep_running=True) as first:
        instance = await first.ensure()
        endpoint = first.machine(instance).endpoint
        # As a daemon leaves them that is killed.
        for program_id, seconds in ((f"{ID_PREFIX}1", "1111"), ("another", "2222")):
            asked = {"id": program_id, "shell": f"sleep {seconds}; :", "stdin": True, "detach_on_cancel": True}
            stream = await endpoint.open("exec", asked)
            await stream.next_event()
        await eventually(lambda: alive(first, instance, "1111"))
    async with running_host(home) as second:
        assert second.daemon.recovered.adopted == 1
        await eventually(lambda: _not(alive(second, instance, "1111")))
        assert await alive(second, instance, "2222")
    assert leaks.wait_for_none(home) == []
