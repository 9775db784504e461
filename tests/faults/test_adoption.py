"""A daemon that starts again adopts its frozen guests within moments, and leaves them frozen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.faults.faulty_host import process_of
from tests.guest_drivers import GVISOR
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, eventually, running_host

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]

AT_ONCE = 4
# The budget is 2 s for 100 guests; the bound here only catches what grows with their square, on a machine with whatever else to do.
BOUND_SECONDS = 20.0


async def test_frozen_guests_are_adopted_at_once(homes: Callable[[str], Path], driver: str) -> None:
    await adopt(homes(driver), driver, 6)


@pytest.mark.long
@pytest.mark.gvisor_only(
    reason="a hundred kernels whose instructions are translated come up for longer than a test may take"
)
async def test_a_hundred_frozen_guests_are_adopted_at_once(homes: Callable[[str], Path], driver: str) -> None:
    await adopt(homes(driver), driver, 100)


async def adopt(home: Path, driver: str, count: int) -> None:
    async with running_host(home, keep_running=True, memory_overcommit=16) as first:
        first.driver = driver
        shape = first.shape(memory_mb=128 if driver == GVISOR else 256, disk_mb=256)
        turns = asyncio.Semaphore(AT_ONCE)

        async def make(number: int) -> object:
            async with turns:
                instance = await first.ensure(shape=shape)
                await first.ok(instance, f"echo {number} > number")
                return instance

        instances = await asyncio.gather(*map(make, range(count)))
        await eventually(lambda: frozen(first) == count, seconds=60)
        processes = {str(instance): process_of(first.machine(instance)) for instance in instances}
    began = time.monotonic()
    async with running_host(home, memory_overcommit=16) as second:
        started = time.monotonic() - began
        recovered = second.daemon.recovered
        print(f"{count} frozen guests: adopted in {recovered.seconds:.2f} s, the daemon ready after {started:.2f} s")
        assert recovered.adopted == count
        assert frozen(second) == count
        assert started < BOUND_SECONDS
        assert {str(instance): process_of(second.machine(instance)) for instance in instances} == processes
        for number in (0, count // 2, count - 1):
            assert (await second.ok(instances[number], "cat number")).text == f"{number}\n"
        assert (await second.status())["leaked"] == 0


def frozen(host: Host) -> int:
    return sum(machine.frozen for machine in host.daemon.fleet.machines())
