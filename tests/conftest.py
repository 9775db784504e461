"""Settings of the whole suite."""

import contextlib
import fcntl
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tests import guest_drivers, leaks

# A job that a shell put into the background ignores Ctrl-C, and so would every command line that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes, and making it, is the machine's doing: one that is busy, or pauses for a second, has no fault to find in the code.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


# Tests that start servers and guests meet a machine that others use, too. One that fails is run once more, with what it shares with its
# module made anew, and is listed either way. An attack has a second try only where it is a measurement, or where what failed is no statement of
# the test's but a wait that ended or a peer that was gone: to succeed once is to succeed.
SECOND_TRY = ("contracts", "integration", "faults", "acceptance")
ON_EACH_DRIVER = ("acceptance", "security", "faults")
NO_STATEMENT = ["TimeoutError", "TimeoutExpired", "Timeout:", "ConnectError", "ProcessLookupError", "waited in vain"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    for item in items:
        kind = item.path.relative_to(folder).parts[0]
        if kind in SECOND_TRY or item.get_closest_marker("alone"):
            item.add_marker(pytest.mark.flaky(reruns=1))
        elif kind == "security":
            item.add_marker(pytest.mark.flaky(reruns=1, only_rerun=NO_STATEMENT))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of a whole server whose guests may be of several drivers runs with each."""
    kind = metafunc.definition.path.relative_to(Path(__file__).parent).parts[0]
    if kind in ON_EACH_DRIVER and "driver" in metafunc.fixturenames:
        metafunc.parametrize("driver", guest_drivers.values(metafunc.definition), indirect=True, scope="package")


@pytest.fixture(scope="package")
def driver(request: pytest.FixtureRequest) -> str:
    """The name of the driver that the guests of a test run with."""
    name: str = request.param
    if (why := guest_drivers.missing(name)) is not None:
        pytest.skip(why)
    return name


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How the first try of each test that had a second one failed: a defect, of the test or of what it tests."""
    for report in terminalreporter.getreports("rerun"):
        terminalreporter.section(f"first try of {report.nodeid} ({report.when})", sep="_")
        terminalreporter.line(report.longreprtext)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test that is marked `alone` runs while no other worker of this run does anything: it measures what one guest does to another."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return (yield)
    place = Path(os.environ.get("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir()), f"innkeeper-tests-{run}")
    alone = item.get_closest_marker("alone") is not None
    with contextlib.ExitStack() as held:
        gate, room = (held.enter_context(place.with_suffix(f".{name}").open("ab")) for name in ("gate", "room"))
        # Whoever wants to be alone keeps the gate shut, so that those who follow each other quickly do not keep it out.
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if not alone:
            fcntl.flock(gate, fcntl.LOCK_UN)
        return (yield)


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After every module that could start a server (as root): nothing of it is left on this machine."""
    yield
    if os.geteuid() == 0:
        left = leaks.wait_for_none(tmp_path_factory.getbasetemp())
        assert left == [], left
