import asyncio

import pytest

from innkeeper.host.output_pace import OutputPace

pytestmark = pytest.mark.anyio


async def test_a_burst_is_free_and_the_rest_is_paced():
    pace, loop = OutputPace(bytes_per_second=1_000, bytes_at_once=500), asyncio.get_running_loop()
    began = loop.time()
    await pace.take(500)
    assert loop.time() - began < 0.1
    # From here on a hundred bytes take a tenth of a second, whoever takes them.
    for _ in range(3):
        await asyncio.gather(*(pace.take(50) for _ in range(2)))
    assert 0.19 < loop.time() - began < 2
