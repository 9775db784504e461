"""A daemon with a runsc that fails as a test says, and what has to be left after each fault: nothing."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.faults import census
from tests.integration.daemon_fixture import Host, eventually, running_host

# It does to the verb that a file beside it names what that says: fails before it began or when it was done; is killed before, while it works, or then.
FAULTY_RUNSC = """#!/bin/sh
read -r verb fault < "$(dirname "$0")/fault"
for word in "$@"; do
    [ "$word" = "$verb" ] || continue
    case $fault in
        fails) exit 3 ;;
        fails-late) {runsc} "$@"; exit 3 ;;
        before) kill -9 $$ ;;
        after) {runsc} "$@"; kill -9 $$ ;;
        between) {runsc} "$@" & sleep 0.05; kill -9 $! ; kill -9 $$ ;;
    esac
done
exec {runsc} "$@"
"""


class InjectedError(Exception):
    """The fault of a test."""


class FaultyRunsc:
    """The runsc of one daemon."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "runsc"
        self._fault = folder / "fault"
        self.works()
        self.path.write_text(FAULTY_RUNSC.format(runsc=shutil.which("runsc")))
        self.path.chmod(0o755)

    def __call__(self, verb: str, fault: str) -> None:
        """From now on, this happens to this verb."""
        self._fault.write_text(f"{verb} {fault}\n")

    def works(self) -> None:
        """From now on, nothing happens to any."""
        self._fault.write_text("none none\n")


@pytest.fixture(scope="module")
def runsc(tmp_path_factory: pytest.TempPathFactory) -> FaultyRunsc:
    """The runsc of the module's daemon."""
    return FaultyRunsc(tmp_path_factory.mktemp("faulty"))


@pytest.fixture(scope="module")
async def faulty(anyio_backend: str, runsc: FaultyRunsc) -> AsyncIterator[Host]:
    """The module's daemon."""
    async with running_host(runsc.path.parent / "home", runsc=str(runsc.path)) as host:
        yield host


@pytest.fixture
def fault(runsc: FaultyRunsc) -> Iterator[FaultyRunsc]:
    """The runsc of the module's daemon, which works again after the test."""
    yield runsc
    runsc.works()


async def nothing_but(host: Host, *instances: object) -> None:
    """Only the machines of these instances are there, no checkpoint, and nothing half-made or left of others."""
    alive = {str(instance) for instance in instances}
    machines = host.settings.host_dir / "machines"
    await eventually(lambda: len(list(machines.iterdir())) == len(alive))
    left = await asyncio.to_thread(census.wait_for_none, host.settings.home, instances=alive)
    assert left == []
    assert {entry.name for entry in host.settings.host_dir.joinpath("instances").iterdir()} == alive
    assert list((host.settings.host_dir / "pool" / "checkpoints").iterdir()) == []
    assert (await host.status())["leaked"] == 0
