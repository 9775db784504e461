import asyncio
from uuid import uuid4

import pytest
from tests.unit.virtual_time import anyio_backend as anyio_backend

from innkeeper.host.instance_locks import InstanceLocks

pytestmark = pytest.mark.anyio


async def test_one_at_a_time_in_order_and_others_beside():
    locks, one, other, said = InstanceLocks(), uuid4(), uuid4(), []

    async def work(instance, name):
        async with locks.hold(instance):
            said.append(f"{name} begins")
            await asyncio.sleep(1)
            said.append(f"{name} ends")

    await asyncio.gather(work(one, "a"), work(one, "b"), work(other, "c"), work(one, "d"))
    assert [text for text in said if text[0] != "c"] == [
        f"{name} {what}" for name in "abd" for what in ("begins", "ends")
    ]
    assert said.index("c begins") < said.index("a ends")
    assert len(locks) == 0


async def test_who_comes_while_the_last_one_ends_waits_like_all_others():
    locks, instance, inside = InstanceLocks(), uuid4(), 0

    async def work(seconds):
        nonlocal inside
        await asyncio.sleep(seconds)
        async with locks.hold(instance):
            inside += 1
            assert inside == 1
            await asyncio.sleep(2)
            inside -= 1

    # The second waits for the first; the third comes when the second has it.
    await asyncio.gather(work(0), work(1), work(3))
    assert len(locks) == 0


async def test_none_stays_of_those_who_fail_or_give_up():
    locks, instance = InstanceLocks(), uuid4()
    with pytest.raises(ValueError, match="no"):
        async with locks.hold(instance):
            waiting = asyncio.ensure_future(locks.hold(instance).__aenter__())
            await asyncio.sleep(1)
            waiting.cancel()
            await asyncio.wait([waiting])
            raise ValueError("no")
    assert len(locks) == 0
