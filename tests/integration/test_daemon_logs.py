"""The log of an instance tells its life, whatever becomes of its machine, and goes with it."""

import asyncio
import dataclasses
import os
import signal
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host

from innkeeper.core.log_verbs import ReadLog
from innkeeper.errors import InnkeeperError, InvalidRequestError

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]


async def lines(host: Host, instance: UUID, **how: Any) -> list[tuple[str, str, str]]:
    answer = await host.request(ReadLog(instance, **how))
    assert [line[0] for line in answer["lines"]] == sorted({line[0] for line in answer["lines"]})
    return [(source, level, message) for _, _, source, level, message in answer["lines"]]


async def test_it_tells_of_starts_stops_and_failures(host: Host) -> None:
    instance = await host.ensure()
    folder = host.settings.host_dir / "instance-logs" / str(instance)
    assert await lines(host, instance) == [("lifecycle", "info", "Created")]
    # Asking again for what is there is no start.
    await host.ensure_answer(instance)
    await host.destroy(instance, keep_disk=True)
    host.instances.add(instance)
    await host.destroy(instance, keep_disk=True)
    host.instances.add(instance)
    assert (await lines(host, instance))[1:] == [("lifecycle", "info", "Stopped")]
    await host.ensure_answer(instance)
    process = int((host.machine(instance).state_dir / "sandbox.pid").read_text())
    os.kill(process, signal.SIGKILL)
    answer = await host.request(ReadLog(instance, after=3, wait_seconds=30))
    assert [line[2:4] for line in answer["lines"]] == [["lifecycle", "error"]]
    assert answer["lines"][0][4].startswith("Failed: ")
    assert (await lines(host, instance, newest=2))[0] == ("lifecycle", "info", "Started on its disk")
    assert folder.is_dir()
    await host.destroy(instance)
    assert not folder.exists()
    assert await host.request(ReadLog(instance)) == {"lines": [], "first": 1, "last": 0}


async def test_a_start_that_fails_is_told_and_the_log_stays(host: Host) -> None:
    instance = uuid4()
    with pytest.raises(InnkeeperError) as caught:
        await host.ensure_answer(instance, shape=dataclasses.replace(host.shape(), image_digest="0" * 64))
    assert await lines(host, instance) == [("lifecycle", "error", f"Not started: {caught.value.message}")]
    await host.ensure_answer(instance)
    assert (await lines(host, instance))[1:] == [("lifecycle", "info", "Created")]


async def test_one_that_waits_hears_of_the_next_line_and_of_the_end(host: Host) -> None:
    instance = await host.ensure()
    waiting = asyncio.ensure_future(host.request(ReadLog(instance, after=1, wait_seconds=30)))
    await host.destroy(instance, keep_disk=True)
    assert [line[4] for line in (await waiting)["lines"]] == ["Stopped"]
    assert (await host.request(ReadLog(instance, after=2, wait_seconds=0.01)))["lines"] == []
    waiting = asyncio.ensure_future(host.request(ReadLog(instance, after=2, wait_seconds=30)))
    await host.destroy(instance)
    assert (await waiting)["lines"] == []


@pytest.mark.parametrize(
    "bad",
    [{"after": -1}, {"limit": 0}, {"limit": 1_001}, {"newest": -1}, {"wait_seconds": 31.0}, {"wait_seconds": -1.0}],
)
async def test_what_no_honest_control_side_asks_is_refused(host: Host, bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        await host.request(ReadLog(uuid4(), **bad))
