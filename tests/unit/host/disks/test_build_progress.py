"""What people hear of an image's build while a step of it takes long."""

import asyncio
from collections import deque

import pytest

from innkeeper.host.disks import image_build

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


async def test_a_long_step_is_repeated_with_its_time_and_the_last_line_of_its_tool(monkeypatch):
    monkeypatch.setattr(image_build, "REMIND_SECONDS", 0.05)
    said, tail, heard = [], deque(maxlen=3), asyncio.Event()

    def progress(line):
        said.append(line)
        if "so far: I: unpacking" in line:
            heard.set()

    told = image_build._Told("base", tail, progress)
    reminding = asyncio.create_task(told.remind())
    told.step("bootstrapping Debian")
    tail.append("I: " + "unpacking " * 50)
    await asyncio.wait_for(heard.wait(), 30)
    told.step("compressing")
    reminding.cancel()
    assert said[0] == "image base: bootstrapping Debian" and said[-1] == "image base: compressing"
    assert all(line.startswith("image base: bootstrapping Debian, ") for line in said[1:-1])
    assert max(map(len, said)) < 200
    assert not tail, "what the last step said is not the next one's"
