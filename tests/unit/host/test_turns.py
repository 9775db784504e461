import asyncio
from itertools import pairwise

import pytest
from tests.unit.virtual_time import anyio_backend as anyio_backend

from innkeeper.host.turns import Turns

pytestmark = pytest.mark.anyio


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


async def test_first_come_first_served():
    turns, order = Turns(2, hold_seconds=60), []

    async def take(number):
        turn = await turns.take()
        order.append(number)
        return turn

    tasks = [asyncio.create_task(take(number)) for number in range(5)]
    await settle()
    assert (order, turns.waiting) == ([0, 1], 3)
    for before, after in pairwise(range(2, 5)):
        turn = tasks[before - 2].result()
        turn.end()
        turn.end()
        await settle()
        assert order[-1] == before
        assert after not in order
    for task in tasks[2:4]:
        if task.done():
            task.result().end()
    tasks[2].result().end()
    await settle()
    assert order == [0, 1, 2, 3, 4]
    for task in tasks:
        task.result().end()
    await asyncio.wait_for(turns.take(), 20)
    (await asyncio.wait_for(turns.take(), 20)).end()


async def test_a_place_is_given_back_when_its_time_is_over():
    turns = Turns(1, hold_seconds=0.01)
    first = await turns.take()
    second = await asyncio.wait_for(turns.take(), 20)
    first.end()
    waiting = asyncio.create_task(turns.take())
    await settle()
    assert not waiting.done()
    second.end()
    await waiting


@pytest.mark.parametrize("when", ["waiting", "given back after", "given before"])
async def test_cancelling_loses_no_place(when):
    turns = Turns(1, hold_seconds=60)
    first = await turns.take()
    cancelled, patient = asyncio.create_task(turns.take()), asyncio.create_task(turns.take())
    await settle()
    if when == "given before":
        first.end()
        cancelled.cancel()
    else:
        cancelled.cancel()
        if when == "waiting":
            await settle()
        first.end()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    (await asyncio.wait_for(patient, 20)).end()
    assert turns.waiting == 0
    (await asyncio.wait_for(turns.take(), 20)).end()
    assert turns._free == 1
