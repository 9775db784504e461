"""The relay between one's own terminal and the one in the guest, where the order of things is what matters."""

import asyncio
import json
import os

import pytest
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK
from websockets.frames import Close

from innkeeper.cli.terminal_relay import FINAL_CODES, GaveUpError, _keyboard, _Relay


class Ended:
    """A connection whose other end has said that the program ended and closed it, before this one said that its input is over."""

    def __init__(self):
        self.tried = asyncio.Event()

    async def send(self, message):
        self.tried.set()
        raise ConnectionClosedOK(None, None)

    async def recv(self):
        await self.tried.wait()
        # The failed attempt is known to the relay first.
        for _ in range(10):
            await asyncio.sleep(0)
        return json.dumps({"type": "exit", "exit_code": 3})


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
        relay = _Relay(b"")
        async with _keyboard(relay.keys):
            return await asyncio.wait_for(relay.run(Ended()), 20)

    assert asyncio.run(run()) == 3


class Broken:
    """A connection that shows something and is then closed with a code, or cut."""

    def __init__(self, *said, code):
        self.said = list(said)
        self.close = None if code is None else Close(code, "so be it\x1b[2J")

    async def send(self, message):
        pass

    async def recv(self):
        if self.said:
            return self.said.pop(0)
        raise ConnectionClosedError(self.close, None)


@pytest.mark.parametrize("code", [None, 1011, 4500, 4502, 4504, 4429, *sorted(FINAL_CODES)])
def test_what_is_tried_again_and_from_where(code, no_input, capfdbinary):
    async def run():
        relay = _Relay(b"")
        # It had to begin later than it was asked to.
        said = [json.dumps({"type": "offset", "offset": 1000}), b"shown", json.dumps({"type": "of a newer server"})]
        with pytest.raises(GaveUpError if code in FINAL_CODES else ConnectionError) as raised:
            await relay.run(Broken(*said, code=code))
        return relay.offset, str(raised.value)

    offset, why = asyncio.run(run())
    assert (offset, why) == (1005, "it was cut" if code is None else "so be it\\x1b[2J")
    assert capfdbinary.readouterr().out == b"shown"
