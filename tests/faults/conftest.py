"""Fault tests drive the servers of tests/acceptance and the daemons of tests/integration, and break them."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "acceptance"), str(Path(__file__).parents[1] / "integration")]
from server_fixture import Server  # noqa: E402
from tests.faults.faulty_host import fault, faulty, homes, runsc  # noqa: E402
from tests.integration.daemon_fixture import anyio_backend, host  # noqa: E402

__all__ = ["anyio_backend", "fault", "faulty", "homes", "host", "runsc"]

LOG_TAIL = 40_000


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    """A failure shows what its servers said."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            # One whose end was in order has taken its log along.
            if isinstance(value, Server) and value.log_path.exists():
                report.sections.append((f"log of the server on {value.home}", value.log()[-LOG_TAIL:]))
    return report
