"""The relay between one's own terminal and the one in the guest, where the order of things is what matters."""

import asyncio
import json
import os

import pytest
from websockets.exceptions import ConnectionClosedOK

from innkeeper.cli.terminal_relay import _Relay


class Ended:
    """A connection whose other end has said that the program ended and closed it, before this one said that its input is over."""

    def __init__(self):
        self.tried = asyncio.Event()

    async def send(self, message):
        self.tried.set()
        raise ConnectionClosedOK(None, None)

    async def __aiter__(self):
        await self.tried.wait()
        # The failed attempt is known to the relay first.
        for _ in range(10):
            await asyncio.sleep(0)
        yield json.dumps({"type": "exit", "exit_code": 3})


@pytest.fixture
def no_input():
    """Standard input that has ended, as file descriptor 0."""
    kept, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    yield
    os.dup2(kept, 0)
    os.close(kept)
    os.close(nothing)


def test_a_program_that_has_ended_is_no_broken_connection(no_input):
    async def run():
        return await asyncio.wait_for(_Relay(Ended(), b"").run(), 20)

    assert asyncio.run(run()) == 3
