"""A hostile program in the agent's place: its instance fails or errs in shape, the daemon and its neighbours do not notice."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, build_go, eventually, running_host

from innkeeper.core import host_verbs as verbs
from innkeeper.errors import InnkeeperError
from innkeeper.host import executions, files
from innkeeper.host.daemon import install_agent

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]

GROWTH_MIB = 50
HUGE = 10**400


@pytest.fixture(scope="module")
async def neighbours(
    anyio_backend: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Host, UUID, UUID]]:
    """One daemon with a guest of the real agent and a guest of the hostile one."""
    async with running_host(tmp_path_factory.mktemp("home")) as host:
        # An agent that ignores a command's time limit is cut off this much later; nobody wants to wait for that here.
        patch = pytest.MonkeyPatch()
        patch.setattr(executions, "OVERTIME_SECONDS", 0.5)
        honest = await host.ensure()
        # From now on cold starts get the other binary.
        hostile = install_agent(
            build_go(Path(__file__).parents[1] / "hostile_agent", "hostile"), host.settings.host_dir
        )
        host.daemon.fleet._builder._agent_dir = hostile
        yield host, honest, await host.ensure()
        patch.undo()


def resident_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


async def again(host: Host, instance_id: UUID) -> None:
    """The hostile instance ready, restarted where it has failed."""
    await host.ensure(instance_id)


@pytest.mark.parametrize(
    "mode",
    ["malformed", "giant", "messages", "credit", "deep", "opens", "hello", "connections", "unknown", "never-read"],
)
async def test_a_broken_protocol_costs_only_its_own_instance(neighbours: tuple[Host, UUID, UUID], mode: str) -> None:
    host, honest, hostile = neighbours
    await again(host, hostile)
    assert (await host.run(honest, "true")).exit_code == 0
    before = resident_mib()
    failing = asyncio.ensure_future(host.run(hostile, mode, timeout_seconds=1))
    latest = []
    while not failing.done():
        answer = await host.run(honest, "echo neighbour")
        assert answer.text == "neighbour\n"
        latest.append(resident_mib())
        if len(latest) > 400:
            break
    with pytest.raises(InnkeeperError) as refused:
        await failing
    assert refused.value.code in ("instance_failed", "link_lost", "guest_error", "service_unavailable"), refused.value
    assert max([*latest, resident_mib()]) - before < GROWTH_MIB, (before, max(latest, default=0))
    assert len(refused.value.message) < 700
    assert (await host.run(honest, "echo neighbour")).text == "neighbour\n"


LIES = [
    "[]", "null", "7", '"text"', "{}",
    json.dumps({"exited": True}),
    json.dumps({"exited": True, "exit_code": "0", "user_processes": 0}),
    '{"exited": true, "exit_code": 1e400, "user_processes": 0}',
    json.dumps({"exited": True, "exit_code": HUGE, "user_processes": 0}),
    json.dumps({"exited": True, "exit_code": 0, "user_processes": -HUGE}),
    '{"exited": true, "exit_code": NaN, "user_processes": 0}',
    '{"exited": true, "exit_code": 0}',
    '{"exited": true, "exit_code": 0, "user_processes": null, "signal": {"a": []}}',
]  # fmt: skip


@pytest.mark.parametrize("lie", LIES, ids=range(len(LIES)))
async def test_a_lie_about_the_end_of_a_command_is_an_error_in_shape(
    neighbours: tuple[Host, UUID, UUID], lie: str
) -> None:
    host, honest, hostile = neighbours
    await again(host, hostile)
    with pytest.raises(InnkeeperError):
        await host.run(hostile, f"say:{lie}", timeout_seconds=1)
    assert (await host.run(honest, "echo neighbour")).text == "neighbour\n"


async def test_a_signal_that_is_none_is_not_passed_on(neighbours: tuple[Host, UUID, UUID]) -> None:
    host, _, hostile = neighbours
    for signal in ('"<script>"', '{"a": 1}', "-1", str(HUGE), "true"):
        await again(host, hostile)
        lie = f'{{"exited": true, "exit_code": 0, "user_processes": 0, "signal": {signal}}}'
        try:
            answer = await host.run(hostile, f"say:{lie}", timeout_seconds=1)
        except InnkeeperError:
            continue
        assert answer.body["signal"] is None, signal


ANSWERS = [
    "[]", "{}", "7",
    json.dumps({"type": 7, "size": "x", "mode": -1, "uid": None, "mtime_ns": 1.5, "target": 9}),
    json.dumps({"type": "file", "size": HUGE, "mtime_ns": HUGE}),
    json.dumps({"type": "\x1b]0;owned\x07", "target": "\x00" * 100, "size": True}),
    json.dumps({"entries": 7}),
    json.dumps({"entries": [7, None, "x"]}),
    json.dumps({"entries": [{"name": "../../etc", "type": "file"}]}),
    json.dumps({"entries": [{"name": "", "type": "file"}]}),
    json.dumps({"entries": [{"name": "a\x00b", "type": "file"}]}),
    json.dumps({"entries": [{"name_b64": "!!!", "type": "file"}]}),
    json.dumps({"entries": [{"name": "x" * 300, "type": "file"}]}),
    json.dumps({"entries": [{"name": "a", "type": {"x": 1}, "size": "y"}]}),
    json.dumps({"entries": [{"name": "a", "type": "file"}] * 1001}),
    json.dumps({"entries": [], "next": 7}),
    json.dumps({"entries": [], "next": "x" * 5000}),
    json.dumps({"entries": [{"name": "\ud800", "type": "file"}]}),
]  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
async def test_a_lie_about_files_is_cleaned_or_an_error(
    neighbours: tuple[Host, UUID, UUID], answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "STAT_SECONDS", 60.0)
    host, _, hostile = neighbours
    await again(host, hostile)
    path = f"/result:{answer}"
    if len(path) > 4096:
        path = path[:4000]
    for request in (verbs.StatFile(hostile, path), verbs.ListFiles(hostile, path)):
        await again(host, hostile)
        try:
            # At once, not when the time limit of the verb is over.
            async with asyncio.timeout(20):
                body = await host.request(request, timeout_seconds=60)
        except InnkeeperError as error:
            assert error.code != "internal_error", error
            continue
        text = json.dumps(body)
        assert "\\u001b" not in text
        assert all(abs(number) < 2**63 for number in numbers(body)), body
    with pytest.raises(InnkeeperError) as refused:
        await host.read(hostile, f"/say:{answer}"[:4000])
    assert refused.value.code != "internal_error", refused.value


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, int | float) else []


async def test_an_errors_text_is_bounded_and_printable(neighbours: tuple[Host, UUID, UUID]) -> None:
    host, _, hostile = neighbours
    await again(host, hostile)
    for body in ({"code": 7, "message": {"a": 1}}, {"code": "x" * 3000, "message": "\x1b[2J\n" * 50}, {}):
        with pytest.raises(InnkeeperError) as refused:
            await host.request(verbs.StatFile(hostile, f"/error:{json.dumps(body)}"))
        assert len(refused.value.message) < 700
        assert refused.value.message.isprintable()


async def test_a_failed_instance_is_told_and_can_be_had_again(neighbours: tuple[Host, UUID, UUID]) -> None:
    host, _, hostile = neighbours
    await again(host, hostile)
    with pytest.raises(InnkeeperError):
        await host.run(hostile, "giant", timeout_seconds=1)

    async def failed() -> bool:
        return await host.listed(hostile) is None

    await eventually(failed, seconds=10)
    await again(host, hostile)
    assert (await host.listed(hostile) or {})["ready"]
