"""A fault at any step of a checkpoint, of a restore or of a fork: the guest goes on, and nothing half-made is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests.faults.faulty_host import FaultyRunsc, InjectedError, nothing_but, process_of
from tests.integration.daemon_fixture import (
    NEEDS_RUNSC,
    REPOSITORY,
    START_SECONDS,
    Host,
    built_agent,
    eventually,
    running_host,
)

from innkeeper.core import checkpoint_verbs as verbs
from innkeeper.core.host_verbs import EnsureMachine, to_wire
from innkeeper.errors import CheckpointFailedError, InnkeeperError, InstanceFailedError
from innkeeper.host.checkpoints import Clock

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]

STEPS = ("quiet", "paused", "saved", "copied", "resumed", "linked")


@pytest.fixture
async def instance(faulty: Host) -> AsyncIterator[UUID]:
    instance = await faulty.ensure()
    yield instance
    await faulty.destroy(instance)
    await nothing_but(faulty)


async def ask(host: Host, verb: Any) -> dict[str, Any]:
    async with asyncio.timeout(120), host.bus.open(host.daemon.host_id, verb.verb, to_wire(verb)) as call:
        async for _ in call.events():
            pass
        return await call.result()


async def works(host: Host, instance: UUID) -> None:
    """The guest that was there before is there, and nothing is left of the attempt."""
    assert (await host.ok(instance, "hostname")).text == "guest\n"
    await nothing_but(host, instance)


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=[] if step == "saved" else pytest.mark.long) for step in STEPS]
)
async def test_a_fault_after_each_step_leaves_the_guest_as_it_was(
    faulty: Host, instance: UUID, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(clock: Clock, reached: str) -> None:
        if reached == step:
            raise InjectedError

    monkeypatch.setattr(Clock, "__call__", fail)
    with pytest.raises(InnkeeperError):
        await ask(faulty, verbs.TakeCheckpoint(instance, uuid4()))
    await works(faulty, instance)


@pytest.mark.parametrize(
    "words",
    [
        "checkpoint between",
        *(
            pytest.param(f"{verb} {fault}", marks=pytest.mark.long)
            for verb, fault in (
                ("pause", "fails"),
                ("pause", "before"),
                ("pause", "after"),
                ("checkpoint", "fails"),
                ("checkpoint", "before"),
                ("checkpoint", "after"),
            )
        ),
    ],
)
@pytest.mark.gvisor_only(reason="a runsc that fails")
async def test_a_runsc_that_fails_or_is_killed_leaves_the_guest_as_it_was(
    faulty: Host, instance: UUID, fault: FaultyRunsc, words: str
) -> None:
    fault(*words.split())
    with pytest.raises(CheckpointFailedError):
        await ask(faulty, verbs.TakeCheckpoint(instance, uuid4()))
    fault.works()
    await works(faulty, instance)


@pytest.mark.long
@pytest.mark.gvisor_only(reason="a runsc that fails")
async def test_a_guest_that_cannot_go_on_is_a_failed_one(
    faulty: Host, instance: UUID, fault: FaultyRunsc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("innkeeper.host.checkpoints.LINK_SECONDS", 1.0)
    await faulty.ok(instance, "echo kept > file; sync")
    fault("resume", "fails")
    with pytest.raises(InstanceFailedError, match="did not go on"):
        await ask(faulty, verbs.TakeCheckpoint(instance, uuid4()))
    fault.works()
    await faulty.ensure(instance)
    assert (await faulty.ok(instance, "cat file")).text == "kept\n"


@pytest.mark.long
@pytest.mark.parametrize("step", ["paused", "saved"])
async def test_a_guest_that_is_killed_meanwhile_is_a_failed_one(
    faulty: Host, instance: UUID, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = process_of(faulty.machine(instance))

    def kill(clock: Clock, reached: str) -> None:
        if reached == step:
            os.kill(running, signal.SIGKILL)

    monkeypatch.setattr(Clock, "__call__", kill)
    with pytest.raises(InnkeeperError):
        await ask(faulty, verbs.TakeCheckpoint(instance, uuid4()))
    await faulty.ensure(instance)
    await works(faulty, instance)


@pytest.mark.long
async def test_whoever_goes_away_meanwhile_leaves_a_guest_that_works(
    faulty: Host, instance: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancel(clock: Clock, reached: str) -> None:
        if reached == "paused":
            asking.cancel()

    monkeypatch.setattr(Clock, "__call__", cancel)
    asking = asyncio.ensure_future(ask(faulty, verbs.TakeCheckpoint(instance, uuid4())))
    with pytest.raises(asyncio.CancelledError):
        await asking
    await works(faulty, instance)


@pytest.mark.long
@pytest.mark.parametrize("words", ["exec fails", "restore fails", "restore between", "restore after"])
@pytest.mark.gvisor_only(reason="a runsc that fails")
async def test_a_restore_and_a_fork_that_fail_leave_nothing(
    faulty: Host, instance: UUID, fault: FaultyRunsc, words: str
) -> None:
    await ask(faulty, verbs.TakeCheckpoint(instance, checkpoint := uuid4()))
    fault(*words.split())
    machine = EnsureMachine(uuid4(), faulty.shape(), "clone")
    for verb in (verbs.RestoreCheckpoint(checkpoint, machine), verbs.ForkMachine(instance, machine)):
        with pytest.raises(InnkeeperError, match="could not be started"):
            await ask(faulty, verb)
    fault.works()
    # The same instance, once the fault is over.
    await ask(faulty, verbs.RestoreCheckpoint(checkpoint, machine))
    assert (await faulty.ok(machine.instance_id, "hostname")).text == "clone\n"
    await faulty.destroy(machine.instance_id)
    await faulty.request(verbs.DropCheckpoint(checkpoint))
    await works(faulty, instance)


DIES = """
import asyncio, os, sys
from pathlib import Path
from uuid import UUID, uuid4
sys.path.insert(0, {repository!r})
from tests.integration.daemon_fixture import running_host
from innkeeper.core import checkpoint_verbs as verbs
from innkeeper.core.host_verbs import EnsureMachine
from innkeeper.host.checkpoints import Clock
from innkeeper.host.disks.checkpoint_store import CheckpointStore

INSTANCE = UUID({instance!r})

def die(*_, **__):
    os._exit(9)

def die_at(clock, reached):
    if reached == {step!r}:
        die()

async def main():
    async with running_host(Path({home!r}), agent=Path({agent!r}), keep_running=True) as host:
        host.driver = {driver!r}
        await host.ensure(INSTANCE)
        await host.ok(INSTANCE, "(n=0; while :; do n=$((n + 1)); echo $n > new; mv new count; sleep 0.02; done) > /dev/null 2>&1 &")
        Clock.__call__ = die_at
        if {step!r} == "dropped":
            await host.request(verbs.TakeCheckpoint(INSTANCE, kept := uuid4()))
            import shutil
            shutil.rmtree = die
            await host.request(verbs.DropCheckpoint(kept))
        elif {step!r} == "published":
            import innkeeper.host.disks.checkpoint_store as store
            store.write_manifest = die
        elif {step!r} == "restored":
            await host.request(verbs.TakeCheckpoint(INSTANCE, kept := uuid4()))
            from innkeeper.host.machine_builder import MachineBuilder
            MachineBuilder.configure = die
            await host.request(verbs.RestoreCheckpoint(kept, EnsureMachine(uuid4(), host.shape(), "clone")))
        await host.request(verbs.TakeCheckpoint(INSTANCE, uuid4()))

asyncio.run(main())
"""


@pytest.mark.parametrize(
    "step",
    [
        "saved",
        *(
            pytest.param(step, marks=pytest.mark.long)
            for step in ("restored", "quiet", "paused", "copied", "resumed", "linked", "published", "dropped")
        ),
    ],
)
async def test_a_daemon_that_dies_at_a_step_leaves_a_guest_that_the_next_one_lets_go_on(
    homes: Callable[[str], Path], driver: str, step: str
) -> None:
    home, instance = homes(driver), uuid4()
    program = DIES.format(
        repository=str(REPOSITORY),
        home=str(home),
        agent=str(built_agent()),
        step=step,
        instance=str(instance),
        driver=driver,
    )
    died = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True, timeout=START_SECONDS
    )
    assert died.returncode == 9, died.stderr[-3000:]
    async with running_host(home) as host:
        assert host.daemon.recovered.adopted == 1
        first = (await host.ok(instance, "cat count")).text
        await eventually(lambda: counts_on(host, instance, first))
        # It can be taken now.
        await ask(host, verbs.TakeCheckpoint(instance, uuid4()))
        answer = await ask(host, verbs.ListCheckpoints())
        assert len(answer["checkpoints"]) == 1 + (step == "restored")
        for row in answer["checkpoints"]:
            await host.request(verbs.DropCheckpoint(UUID(row["checkpoint_id"])))
        for other in host.daemon.fleet.disks():
            await host.destroy(other)
        await nothing_but(host)


async def counts_on(host: Host, instance: UUID, first: str) -> bool:
    return (await host.ok(instance, "cat count")).text != first
