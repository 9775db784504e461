"""What works inside a guest of each driver, tried there as root: `python -m bench.abilities` prints the table of docs/drivers.md."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import structlog
from tests.integration.daemon_fixture import Host, running_host

from bench import guest_abilities
from bench.drivers import DRIVERS, home_for_both

PROGRAM = "/home/user/abilities.py"
SECONDS = 300


async def abilities(host: Host, driver: str) -> dict[str, str]:
    """Name -> what came of it, in a new guest."""
    guest = await host.ensure(shape=host.shape(driver=driver))
    await host.write(guest, PROGRAM, Path(guest_abilities.__file__).read_bytes())
    answer = await host.ok(guest, f"sudo python3 {PROGRAM}", timeout_seconds=SECONDS)
    await host.destroy(guest)
    found: dict[str, str] = json.loads(answer.text)
    return found


async def both() -> None:
    """Print the table."""
    with home_for_both() as home:
        async with running_host(home) as host:
            found = [await abilities(host, driver) for driver in DRIVERS]
    print(f"| as root in a guest of | {' | '.join(f'`{driver}`' for driver in DRIVERS)} |")
    print("| --- |" + " --- |" * len(DRIVERS))
    for name in found[0]:
        print(f"| {name} | {' | '.join(one.get(name, '–') for one in found)} |")


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    asyncio.run(both())
