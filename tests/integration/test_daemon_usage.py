"""What guests use is measured by the kernel, and is told once it has ended, whoever ends first."""

from __future__ import annotations

import time
from typing import Any
from uuid import UUID

import pytest
from tests import leaks
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, running_host

from innkeeper.core import host_verbs as verbs

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]

# The same work whatever else the machine does: a second or so of one processor.
BURN = "for ((i = 0; i < 400000; i++)); do :; done"
BURNT_US = 300_000


async def told(host: Host, *counted: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    answer = await host.request(verbs.ReadUsage(counted))
    return answer["running"], answer["ended"]


def of(rows: list[dict[str, Any]], instance: UUID) -> dict[str, Any]:
    (row,) = [row for row in rows if row["instance_id"] == str(instance)]
    return row


async def test_processor_and_memory_time_of_a_guest(host: Host) -> None:
    began = time.time()
    instance = await host.ensure()
    before = of((await told(host))[0], instance)
    await host.ok(instance, BURN)
    after = of((await told(host))[0], instance)
    assert after["memory_mb"] == 512
    assert 0 < before["seconds"] < after["seconds"] <= time.time() - began
    assert after["cpu_us"] - before["cpu_us"] > BURNT_US
    await host.destroy(instance)
    running, ended = await told(host)
    last = of(ended, instance)
    assert str(instance) not in {row["instance_id"] for row in running}
    assert last["cpu_us"] >= after["cpu_us"] and last["seconds"] >= after["seconds"]
    assert of((await told(host))[1], instance) == last
    assert str(instance) not in {row["instance_id"] for row in (await told(host, last["machine_id"]))[1]}


async def test_a_name_that_is_a_path_forgets_nothing_else(host: Host) -> None:
    marker = host.settings.host_dir / "kept.json"
    marker.write_text("{}")
    await told(host, "../kept", str(marker.with_suffix("")), "", ".")
    assert marker.exists()
    marker.unlink()


async def test_it_outlives_the_daemon(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("home")
    async with running_host(home, keep_running=True) as first:
        ends, goes_on, dies = [await first.ensure() for _ in range(3)]
        for instance in (goes_on, dies):
            await first.ok(instance, BURN)
        before = of((await told(first))[0], goes_on)
        await first.destroy(ends)
        state_dir = first.machine(dies).state_dir
    # As if the daemon had been killed before this guest was configured: the next one takes it away.
    (state_dir / "configured").unlink()
    async with running_host(home) as second:
        running, ended = await told(second)
        after = of(running, goes_on)
        assert after["cpu_us"] >= before["cpu_us"] and after["seconds"] > before["seconds"]
        assert of(ended, ends)["cpu_us"] > 0
        assert of(ended, dies)["cpu_us"] > BURNT_US
    assert leaks.wait_for_none(home) == []
