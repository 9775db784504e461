"""A hostile program in the guest agent's place: what it does to the daemon's memory and to a neighbour's commands. Lies in answers are tested in
tests/integration/test_daemon_hostile_agent.py."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, build_go, running_host
from tests.security.neighbour import ATTEMPTS, GROWTH_MIB, Side, median_seconds, proportional_mib

from innkeeper.errors import InnkeeperError
from innkeeper.host import executions
from innkeeper.host.daemon import install_agent

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.alone,
    NEEDS_RUNSC,
    pytest.mark.gvisor_only(reason="test_hostile_port.py has a microVM's agent"),
]

QUICK = ["pings", "strays", "json", "bytes", "reconnect", "dials"]
FULL = [
    *QUICK, "pongs", "credits", "empties", "interleaved", "half", "silence", "offsets", "malformed", "giant", "messages", "credit", "deep",
    "opens", "hello", "connections", "unknown", "never-read",
]  # fmt: skip
CLEAR = ("instance_failed", "link_lost", "guest_error", "service_unavailable", "instance_not_found")


@pytest.fixture(scope="module")
async def neighbours(
    anyio_backend: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Host, UUID, UUID]]:
    """One daemon with a guest of the real agent and a guest of the hostile one."""
    async with running_host(tmp_path_factory.mktemp("home"), freeze_after_seconds=60) as host:
        patch = pytest.MonkeyPatch()
        # An agent that ignores a command's time limit is cut off this much later; nobody wants to wait for that here.
        patch.setattr(executions, "OVERTIME_SECONDS", 0.5)
        honest = await host.ensure()
        hostile = install_agent(
            build_go(Path(__file__).parents[1] / "hostile_agent", "hostile"), host.settings.host_dir
        )
        host.daemon.fleet._builder._agent_dir = hostile
        yield host, honest, await host.ensure()
        patch.undo()


async def attack(neighbours: tuple[Host, UUID, UUID], mode: str, side: Side, *, seconds: float) -> float:
    """One attempt; how much the daemon grew, in MiB."""
    host, honest, hostile = neighbours
    await host.ensure(hostile)

    async def true() -> None:
        assert (await host.run(honest, "true")).exit_code == 0

    side.quiet.append(await median_seconds(true, seconds=seconds / 2))
    before = most = proportional_mib()

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, proportional_mib())
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    failing = asyncio.ensure_future(host.run(hostile, mode, timeout_seconds=seconds))
    try:
        side.attacked.append(await median_seconds(true, seconds=seconds))
        async with asyncio.timeout(seconds + 10):
            with pytest.raises(InnkeeperError) as refused:
                await failing
        assert refused.value.code in CLEAR, refused.value
        assert len(refused.value.message) < 700
    finally:
        watching.cancel()
        failing.cancel()
    return most - before


async def keeps_to_itself(neighbours: tuple[Host, UUID, UUID], mode: str, *, seconds: float) -> None:
    side, growth = Side(mode), 0.0
    for _ in range(ATTEMPTS):
        growth = max(growth, await attack(neighbours, mode, side, seconds=seconds))
        if side.fine():
            break
    print(f"{side}; daemon grew by {growth:.1f} MiB")
    assert side.fine(), str(side)
    assert growth < GROWTH_MIB


@pytest.mark.parametrize("mode", QUICK)
async def test_it_slows_no_neighbour_and_fills_no_memory(neighbours: tuple[Host, UUID, UUID], mode: str) -> None:
    await keeps_to_itself(neighbours, mode, seconds=1.5)


@pytest.mark.long
@pytest.mark.parametrize("mode", FULL)
async def test_the_same_for_longer_and_in_every_way(neighbours: tuple[Host, UUID, UUID], mode: str) -> None:
    await keeps_to_itself(neighbours, mode, seconds=6)
