"""A daemon of a driver, whose runsc fails as a test says, and what has to be left after each fault: nothing."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from tests.faults import census
from tests.guest_drivers import GVISOR, QEMU
from tests.guest_kernel import put_kernel
from tests.integration.daemon_fixture import Host, eventually, running_host

from innkeeper.host.machine import Machine

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


def vm_home() -> Path:
    """A state directory with the kernel of microVMs. A path of pytest's own is too long for the socket of a link in it."""
    made = Path(tempfile.mkdtemp(prefix="ikv", dir="/var/tmp"))
    made.chmod(0o755)
    put_kernel(made / "host")
    return made


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """State directories of daemons that follow each other. That of microVMs is one for the module, and keeps their template: only the first boots."""
    kept: list[Path] = []

    def home(driver: str) -> Path:
        if driver == GVISOR:
            return tmp_path_factory.mktemp("home")
        if not kept:
            kept.append(vm_home())
        return kept[0]

    yield home
    for path in kept:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
async def faulty(anyio_backend: str, driver: str, runsc: FaultyRunsc) -> AsyncIterator[Host]:
    """The module's daemon, whose guests run with the test's driver."""
    home = runsc.path.parent / "home" if driver == GVISOR else vm_home()
    async with running_host(home, runsc=str(runsc.path)) as host:
        host.driver = driver
        yield host
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def fault(runsc: FaultyRunsc) -> Iterator[FaultyRunsc]:
    """The runsc of the module's daemon, which works again after the test."""
    yield runsc
    runsc.works()


def process_of(machine: Machine) -> int:
    """The sandbox, or QEMU."""
    name = "vm.pid" if machine.record.driver == QEMU else "sandbox.pid"
    return int((machine.state_dir / name).read_text())


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
