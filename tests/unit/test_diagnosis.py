"""A look into this very process: what it says of a thread, a task and an allocation that the test made."""

import asyncio
import threading
import time

import pytest

from innkeeper.diagnosis import MAX_DEPTH, Diagnosis, _sample, task_stacks
from innkeeper.errors import ConflictError, InvalidRequestError

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


def spin(stop):
    while not stop.is_set():
        sum(range(1_000))


async def test_stacks_name_the_function_that_takes_the_time():
    stop = threading.Event()
    worker = threading.Thread(target=spin, args=(stop,), name="spinner")
    worker.start()
    try:
        found = await Diagnosis().ask("stacks", seconds=0.3)
    finally:
        stop.set()
        worker.join()
    spinning = {stack: count for stack, count in found["stacks"].items() if stack.startswith("spinner;")}
    assert sum(spinning.values()) == found["samples"] > 2
    assert all(f"{__name__.rpartition('.')[2]}:spin" in stack for stack in spinning)
    assert not any(stack.endswith(":_sample") for stack in found["stacks"]), "the sampler sampled itself"


def test_a_deep_stack_is_cut_and_a_stopped_sampling_ends():
    done = threading.Event()

    def deep(depth):
        if depth:
            deep(depth - 1)
        else:
            done.wait(10)

    worker = threading.Thread(target=deep, args=(MAX_DEPTH * 2,), name="deep")
    worker.start()
    try:
        found = _sample(0.05, threading.Event())
    finally:
        done.set()
        worker.join()
    assert all(stack.count(";") <= MAX_DEPTH for stack in found["stacks"] if stack.startswith("deep;"))
    stopped = threading.Event()
    stopped.set()
    began = time.monotonic()
    assert _sample(50, stopped)["samples"] == 0 and time.monotonic() - began < 10


async def waits_for(event, *, secret):
    await inner(event)


async def inner(event):
    await event.wait()


async def test_tasks_that_wait_at_the_same_place_are_one_line_with_the_whole_chain():
    event = asyncio.Event()
    tasks = {asyncio.create_task(waits_for(event, secret="hunter2")) for _ in range(3)}
    tasks.add(asyncio.create_task(inner(event), name="other"))
    await asyncio.sleep(0)
    found = task_stacks(tasks)
    event.set()
    await asyncio.wait(tasks)
    assert [(one["name"], one["count"]) for one in found] == [("", 3), ("other", 1)]
    names = [line.partition(" ")[0] for line in found[0]["stack"]]
    assert names[:3] == ["waits_for", "inner", "Event.wait"]
    assert "hunter2" not in str(found)


async def test_memory_names_the_line_that_holds_it():
    held = []

    async def allocate():
        await asyncio.sleep(0.05)
        held.append(bytearray(8_000_000))

    task = asyncio.create_task(allocate())
    found = await Diagnosis().ask("memory", seconds=0.3)
    await task
    first = found["allocated"][0]
    assert "test_diagnosis.py" in first["where"] and first["bytes"] >= 8_000_000
    assert 0 < found["resident_kib"] <= found["peak_kib"] + 1024 and len(found["objects"]) > 5
    import tracemalloc

    assert not tracemalloc.is_tracing()


async def test_one_question_at_a_time_within_bounds():
    diagnosis = Diagnosis()
    first = asyncio.create_task(diagnosis.ask("stacks", seconds=30))
    await asyncio.sleep(0.05)
    with pytest.raises(ConflictError):
        await diagnosis.ask("tasks")
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert (await diagnosis.ask("tasks"))["tasks"]
    for kind, seconds in (("heap", 1), ("stacks", 61), ("stacks", -1), ("memory", float("nan"))):
        with pytest.raises(InvalidRequestError):
            await diagnosis.ask(kind, seconds=seconds)
