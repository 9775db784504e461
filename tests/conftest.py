"""Settings of the whole suite."""

import os
import signal
from collections.abc import Iterator

import pytest
from tests import leaks

# A job that a shell put into the background ignores Ctrl-C, and so would every command line that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After every module that could start a server (as root): nothing of it is left on this machine."""
    yield
    if os.geteuid() == 0:
        left = leaks.wait_for_none(tmp_path_factory.getbasetemp())
        assert left == [], left
