"""Freezing and thawing, and the records of a machine, with a driver that follows a script."""

import asyncio
import gc
import json
import time
from contextlib import AsyncExitStack
from types import SimpleNamespace
from uuid import uuid4

import pytest
from tests.unit.virtual_time import anyio_backend as anyio_backend

from innkeeper.core.host_verbs import MachineShape
from innkeeper.errors import GuestError, InstanceFailedError
from innkeeper.host import machine as machine_module
from innkeeper.host.drivers.contract import Capabilities, Needs
from innkeeper.host.machine import Machine, MachineRecord, load_machine_record

pytestmark = pytest.mark.anyio
SHAPE = MachineShape("key", "digest", "gvisor", 1, 128, 64, "none")
SOON = 0.01


class Driver:
    def __init__(self, *, freeze=True):
        self.capabilities = Capabilities(freeze=freeze)
        self.needs = Needs()
        self.did = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fault = None

    async def freeze(self, machine_id):
        self.did.append("freeze")
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault

    def thaw(self, machine_id):
        self.did.append("thaw")


class Endpoint:
    def __init__(self):
        self.answers, self.asked, self.closed, self.told = [], 0, [], []
        self.gate = asyncio.Event()
        self.gate.set()

    async def request(self, verb, params, *, timeout_seconds):
        if verb == "configure":
            assert list(params) == ["time_unix_ns"]
            self.told.append(params["time_unix_ns"])
            raise GuestError("The guest did not answer configure in time")
        assert verb == "processes"
        self.asked += 1
        await self.gate.wait()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def close(self, *, remove):
        self.closed.append(remove)


def record():
    return MachineRecord("m1", SHAPE, "gvisor", "disk-m1", 3, "room-m1")


def make(tmp_path, *, after=SOON, freeze=True):
    return Machine(
        record=record(),
        state_dir=tmp_path,
        driver=Driver(freeze=freeze),
        running=SimpleNamespace(),
        endpoint=Endpoint(),
        upper=tmp_path,
        lowers=(),
        resources=AsyncExitStack(),
        freeze_after_seconds=after,
    )


@pytest.fixture
async def machine(tmp_path):
    made = make(tmp_path)
    yield made
    await made.close(stop=True)
    assert made._tasks == set()


async def use(machine, seconds=0.0):
    async with machine.in_use():
        assert not machine.frozen
        assert machine.driver.did[-1:] != ["freeze"]
        await asyncio.sleep(seconds)


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


async def test_an_idle_guest_freezes_and_thaws_on_use(machine):
    await use(machine)
    assert not machine.frozen
    await asyncio.sleep(5 * SOON)
    assert (machine.frozen, machine.driver.did) == (True, ["freeze"])
    await use(machine)
    assert (machine.frozen, machine.driver.did) == (False, ["freeze", "thaw"])
    await asyncio.sleep(5 * SOON)
    assert machine.frozen


@pytest.mark.parametrize("stop", [False, True])
async def test_nobody_freezes_a_guest_after_letting_go_of_it(tmp_path, stop):
    machine = make(tmp_path)
    machine.start_task(use(machine, 60))
    await settle()
    await machine.close(stop=stop)
    await asyncio.sleep(5 * SOON)
    assert (machine.driver.did, machine._tasks) == ([], set())


async def test_it_never_freezes_while_it_is_used(machine):
    async with machine.in_use():
        await use(machine)
        assert machine.idle_seconds == 0.0
        await asyncio.sleep(5 * SOON)
        await machine.freeze()
        assert machine.driver.did == []
    assert machine.idle_seconds < 60


async def test_use_during_freezing_waits_and_thaws(machine):
    machine.driver.gate.clear()
    freezing = asyncio.create_task(machine.freeze())
    await settle()
    using = asyncio.create_task(use(machine))
    await settle()
    assert not using.done()
    machine.driver.gate.set()
    await asyncio.gather(freezing, using)
    assert (machine.frozen, machine.driver.did) == (False, ["freeze", "thaw"])


async def test_a_use_that_is_cancelled_while_it_waits_for_the_thaw_is_no_use(machine):
    machine.driver.gate.clear()
    freezing = asyncio.create_task(machine.freeze())
    await settle()
    using = asyncio.create_task(use(machine))
    await settle()
    using.cancel()
    await settle()
    machine.driver.gate.set()
    await freezing
    assert (machine.uses, machine.frozen) == (0, True)
    await use(machine)
    assert not machine.frozen


@pytest.mark.parametrize("fault", [OSError("busy"), TimeoutError()])
async def test_freezing_that_fails_is_undone(machine, fault):
    machine.driver.fault = fault
    await machine.freeze()
    assert (machine.frozen, machine.driver.did) == (False, ["freeze", "thaw"])
    machine.driver.fault = None
    await machine.freeze()
    assert machine.frozen


async def test_user_processes_keep_it_thawed_until_they_are_gone(machine, monkeypatch):
    monkeypatch.setattr(machine_module, "RECHECK_SECONDS", SOON)
    machine.user_processes = 2
    machine.endpoint.answers = [{"user_processes": 2}, {"user_processes": 1}, {"user_processes": 0}]
    await use(machine)
    await asyncio.sleep(1.5 * SOON)
    assert not machine.frozen
    await asyncio.sleep(20 * SOON)
    assert (machine.frozen, machine.endpoint.asked, machine.user_processes) == (True, 3, 0)


@pytest.mark.parametrize("answer", [{}, {"user_processes": "x"}, {"user_processes": None}, GuestError()], ids=repr)
async def test_an_agent_that_does_not_say_keeps_it_thawed(machine, answer):
    machine.user_processes = 1
    machine.endpoint.answers = [answer]
    await use(machine)
    await asyncio.sleep(5 * SOON)
    assert (machine.frozen, machine.user_processes, machine.endpoint.asked) == (False, 1, 1)


async def test_an_answer_that_a_use_overtook_counts_for_nothing(machine):
    machine.user_processes = 1
    machine.endpoint.answers = [{"user_processes": 0}, {"user_processes": 5}]
    machine.endpoint.gate.clear()
    await use(machine)
    await asyncio.sleep(3 * SOON)
    assert machine.endpoint.asked == 1
    async with machine.in_use():
        machine.user_processes = 5
    machine.endpoint.gate.set()
    await settle()
    assert (machine.frozen, machine.user_processes) == (False, 5)
    await asyncio.sleep(5 * SOON)
    assert (machine.frozen, machine.endpoint.asked) == (False, 2)


async def test_a_failed_machine_serves_nobody_and_freezes_no_more(machine):
    told = []
    machine.when_failed = told.append
    machine.fail("first")
    machine.fail("second")
    assert (machine.failure, told) == ("first", ["first"])
    with pytest.raises(InstanceFailedError, match="first"):
        await use(machine)
    await machine.freeze()
    await asyncio.sleep(3 * SOON)
    assert (machine.uses, machine.driver.did) == (0, [])


async def test_a_driver_that_cannot_freeze_is_not_asked_to(tmp_path):
    machine = make(tmp_path, freeze=False)
    await use(machine)
    await asyncio.sleep(3 * SOON)
    assert machine.driver.did == []
    await machine.close(stop=False)


@pytest.mark.parametrize("stop", [True, False])
async def test_closing_ends_its_tasks(tmp_path, stop):
    machine = make(tmp_path)
    released = []
    machine.resources.callback(lambda: released.append(1))
    task = machine.start_task(asyncio.sleep(60))
    await use(machine)
    await settle()
    await machine.close(stop=stop)
    assert task.cancelled()
    assert (released, machine.endpoint.closed) == (([1], []) if stop else ([], [False]))
    await asyncio.sleep(3 * SOON)
    assert machine.driver.did == []


async def test_work_that_is_cancelled_before_it_begins_is_cancelled_cleanly(tmp_path):
    machine = make(tmp_path)
    task = machine.start_task(asyncio.sleep(60))
    # A coroutine that is left unawaited is a warning, and warnings are errors here.
    await machine.close(stop=True)
    del machine
    assert task.cancelled()
    gc.collect()


def test_records_survive(tmp_path):
    assert load_machine_record(tmp_path) is None
    made = record()
    made.save(tmp_path)
    assert load_machine_record(tmp_path) == made
    made.instance_id = uuid4()
    made.save_claim(tmp_path)
    assert load_machine_record(tmp_path) == made
    made.save_configured(tmp_path)
    made.save_configured(tmp_path)
    found = load_machine_record(tmp_path)
    assert (found, found.configured) == (made, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["claim.json", "configured", "machine.json"]


@pytest.mark.parametrize("name", ["machine.json", "claim.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", "{}", '{"shape": 1}', '{"shape": {"x": 1}}', "\0\0"])
def test_damaged_records_are_none(tmp_path, name, text):
    record().save(tmp_path)
    (tmp_path / name).write_text(text)
    assert load_machine_record(tmp_path) is None


@pytest.mark.parametrize("instance_id", [None, 5, "x", ["a"]])
def test_a_claim_of_nobody_is_damage(tmp_path, instance_id):
    record().save(tmp_path)
    (tmp_path / "claim.json").write_text(json.dumps({"instance_id": instance_id}))
    assert load_machine_record(tmp_path) is None


async def test_a_clock_of_the_guests_own_is_set_with_a_use_now_and_then(machine, monkeypatch):
    machine.driver.needs = Needs(clock=True)

    async def use():
        await machine.freeze()
        async with machine.in_use():
            await asyncio.sleep(SOON)
        return len(machine.endpoint.told)

    # Nobody knows when it was set last. That the guest does not answer is nothing to its user.
    before = time.time_ns()
    assert await use() == 1
    assert before <= machine.endpoint.told[0] <= time.time_ns()
    assert [await use() for _ in range(3)] == [1, 1, 1]
    machine.clock_set_at -= machine_module.CLOCK_SECONDS + 1
    assert await use() == 2
    # The host's own needs no setting.
    machine.driver.needs = Needs()
    machine.clock_set_at -= machine_module.CLOCK_SECONDS + 1
    assert await use() == 2
