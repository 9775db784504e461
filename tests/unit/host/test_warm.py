"""Warm pools with a builder that follows a script."""

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from tests.unit.virtual_time import anyio_backend as anyio_backend

from innkeeper.core.host_verbs import MachineShape, WarmPool
from innkeeper.errors import InnkeeperError, NoHostError
from innkeeper.host import warm
from innkeeper.host.warm import WarmPools

pytestmark = pytest.mark.anyio


def shape(key):
    return MachineShape(key, "digest", "gvisor", 1, 128, 64, "none")


def pool(key, size):
    return WarmPool(shape(key), size)


@dataclass(eq=False)
class Guest:
    key: str
    failure: str | None = None
    id: str = "m"

    @property
    def record(self):
        return SimpleNamespace(shape=shape(self.key))


class World:
    def __init__(self, parallel=2):
        self.built, self.discarded, self.ready, self.faults = [], [], [], []
        self.gate = asyncio.Event()
        self.gate.set()
        self.busy = False
        self.at_once = self.most_at_once = 0
        self.pools = WarmPools(
            build=self.build,
            discard=self.discard,
            busy=lambda: self.busy,
            parallel=parallel,
            on_ready=self.ready.append,
        )

    async def build(self, wanted):
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.gate.wait()
            if self.faults:
                raise self.faults.pop(0)
            guest = Guest(wanted.shape.pool_key)
            self.built.append(guest)
            return guest
        finally:
            self.at_once -= 1

    async def discard(self, guest):
        await asyncio.sleep(0)
        self.discarded.append(guest)
        if guest.failure is not None:
            raise OSError(guest.failure)

    def levels(self):
        return {level["pool_key"]: level["ready"] for level in self.pools.levels()}


async def settle():
    for _ in range(60):
        await asyncio.sleep(0)


@pytest.fixture
async def world():
    made = World()
    running = asyncio.create_task(made.pools.run())
    yield made
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_pools_are_filled_and_no_faster_than_allowed(world):
    world.gate.clear()
    world.pools.set([pool("a", 3), pool("b", 2)])
    await settle()
    assert world.at_once == 2
    world.gate.set()
    await settle()
    assert world.levels() == {"a": 3, "b": 2}
    assert (world.most_at_once, sorted(world.ready)) == (2, ["a", "a", "a", "b", "b"])
    await settle()
    assert len(world.built) == 5


async def test_the_emptiest_is_filled_first(world):
    world.gate.clear()
    world.pools.set([pool("a", 4), pool("b", 1)])
    await settle()
    world.gate.set()
    await settle()
    assert [guest.key for guest in world.built[:2]] == ["a", "b"]


async def test_a_claim_takes_the_oldest_and_is_made_up_for(world):
    world.pools.set([pool("a", 2)])
    await settle()
    first, second = world.built
    assert world.pools.claim(shape("b")) is None
    assert world.pools.claim(shape("a")) is first
    await settle()
    assert world.levels() == {"a": 2}
    second.failure = "gone"
    assert world.pools.claim(shape("a")) is world.built[2]
    assert world.pools.claim(shape("a")) is None
    await settle()
    assert world.levels() == {"a": 2}


async def test_pools_that_are_not_wanted_are_drained(world):
    world.pools.set([pool("a", 2), pool("b", 3)])
    await settle()
    world.pools.set([pool("b", 1)])
    await settle()
    assert (world.levels(), [guest.key for guest in world.pools.machines()]) == ({"b": 1}, ["b"])
    assert sorted(guest.key for guest in world.discarded) == ["a", "a", "b", "b"]


async def test_a_guest_that_cannot_be_taken_away_stops_nothing(world):
    world.pools.set([pool("a", 2)])
    await settle()
    world.built[0].failure = "busy"
    world.pools.set([pool("b", 1)])
    await settle()
    assert (len(world.discarded), world.levels()) == (2, {"b": 1})


async def test_a_guest_that_became_ready_too_late_is_drained(world):
    world.gate.clear()
    world.pools.set([pool("a", 1)])
    await settle()
    world.pools.set([])
    world.gate.set()
    await settle()
    assert (world.pools.machines(), world.discarded) == ([], world.built)


async def test_adopted_guests_stay_until_the_pools_are_known(world):
    kept, dropped = Guest("a"), Guest("b")
    world.pools.adopt(kept)
    world.pools.adopt(dropped)
    failed = Guest("a")
    world.pools.adopt(failed)
    world.pools.forget(failed)
    await settle()
    assert world.discarded == []
    world.pools.set([pool("a", 1)])
    await settle()
    assert (world.pools.machines(), world.discarded, world.built) == ([kept], [dropped], [])


async def test_the_fullest_pool_gives_one_up():
    world = World()
    assert world.pools.evict() is None
    guests = [Guest("a"), Guest("b"), Guest("b")]
    for guest in guests:
        world.pools.adopt(guest)
    assert world.pools.evict() is guests[1]
    assert world.pools.evict() in guests
    assert world.pools.evict() in guests
    assert world.pools.evict() is None


async def test_a_failed_guest_is_forgotten_and_replaced(world):
    world.pools.set([pool("a", 1)])
    await settle()
    world.pools.forget(world.built[0])
    world.pools.forget(Guest("a"))
    world.pools.forget(Guest("z"))
    await settle()
    assert world.pools.machines() == [world.built[1]]


@pytest.mark.parametrize(
    "fault", [InnkeeperError("x"), OSError("y"), NoHostError(), TimeoutError(), ValueError("a bug")], ids=repr
)
async def test_a_failure_waits_before_the_next_try_and_stops_no_other_pool(world, fault, monkeypatch):
    monkeypatch.setattr(warm, "RETRY_SECONDS", 0.5)
    world.faults = [fault]
    world.pools.set([pool("a", 1), pool("b", 1)])
    await settle()
    await asyncio.sleep(0.03)
    assert sorted(world.levels().items()) == [("a", 0), ("b", 1)]
    async with asyncio.timeout(20):
        while world.levels() != {"a": 1, "b": 1}:
            await asyncio.sleep(0.005)


async def test_new_settings_try_a_failed_pool_again_at_once(world):
    world.faults = [InnkeeperError("x")]
    world.pools.set([pool("a", 1)])
    await settle()
    assert world.built == []
    world.pools.set([pool("a", 1)])
    await settle()
    assert len(world.built) == 1


async def test_filling_yields_to_requests_but_not_for_ever(world, monkeypatch):
    monkeypatch.setattr(warm, "QUIET_SECONDS", 0.002)
    monkeypatch.setattr(warm, "STARVED_SECONDS", 60)
    world.busy = True
    world.pools.set([pool("a", 1)])
    await asyncio.sleep(0.01)
    assert world.built == []
    world.busy = False
    async with asyncio.timeout(20):
        while len(world.built) != 1:
            await asyncio.sleep(0.002)
    world.busy = True
    monkeypatch.setattr(warm, "STARVED_SECONDS", 0.05)
    world.pools.set([pool("a", 2)])
    async with asyncio.timeout(20):
        while len(world.built) != 2:
            await asyncio.sleep(0.002)


async def test_cancelling_cancels_what_is_being_built():
    world = World()
    running = asyncio.create_task(world.pools.run())
    world.gate.clear()
    world.pools.set([pool("a", 2)])
    await settle()
    assert world.at_once == 2
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert world.at_once == 0
