"""A control side over a real database and a real bus, with a host at the other end that follows a script."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from scripted_host import World


@pytest.fixture
def still_world(tmp_path: Path) -> World:
    """A server that does not run yet."""
    return World(tmp_path)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A server that runs."""
    made = World(tmp_path)
    async with made.running() as control:
        made.control = control
        yield made
