"""A fault at any step of building, claiming and destroying a machine, or of filling a pool, leaves nothing but what was there before."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

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

from innkeeper.core import host_verbs as verbs
from innkeeper.core.instance import BootStep, InstanceState
from innkeeper.errors import InnkeeperError
from innkeeper.host import guest_link, machine_builder
from innkeeper.host.disks.image_build import build_argv
from innkeeper.host.drivers.gvisor import GvisorDriver
from innkeeper.host.linux import loop_device
from innkeeper.host.machine import Machine

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]

STEPS = (
    InstanceState.ACTIVE,
    InstanceState.NETWORK_ALLOCATED,
    InstanceState.FTAP_CREATED,
    InstanceState.IMAGE_GENERATED,
    InstanceState.VM_STARTED,
    InstanceState.VM_BOOTED,
    InstanceState.READY,
)


@pytest.mark.parametrize("step", STEPS[:-1])
async def test_a_fault_after_each_step_leaves_nothing(faulty: Host, step: InstanceState) -> None:
    def fail(reached: BootStep) -> None:
        if reached.step == step.value:
            raise InjectedError

    request = verbs.EnsureMachine(uuid4(), faulty.shape(), "guest")
    with pytest.raises(InjectedError):
        await faulty.daemon.fleet.ensure(request, fail)
    await nothing_but(faulty)


async def test_a_fault_after_the_last_step_leaves_the_machine_to_its_instance(faulty: Host) -> None:
    def fail(reached: BootStep) -> None:
        if reached.step == InstanceState.READY.value:
            raise InjectedError

    request = verbs.EnsureMachine(instance := uuid4(), faulty.shape(), "guest")
    with pytest.raises(InjectedError):
        await faulty.daemon.fleet.ensure(request, fail)
    machine = faulty.machine(instance)
    await faulty.ensure(instance)
    assert faulty.machine(instance) is machine
    await faulty.ok(instance, "true")
    await faulty.destroy(instance)
    await nothing_but(faulty)


@pytest.mark.parametrize(
    "step", [InstanceState.VM_STARTED, *(pytest.param(step, marks=pytest.mark.long) for step in STEPS[:-1])]
)
async def test_a_cancellation_at_each_step_leaves_nothing(faulty: Host, step: InstanceState) -> None:
    def cancel(reached: BootStep) -> None:
        if reached.step == step.value:
            building.cancel()

    request = verbs.EnsureMachine(uuid4(), faulty.shape(), "guest")
    building = asyncio.ensure_future(faulty.daemon.fleet.ensure(request, cancel))
    with pytest.raises(asyncio.CancelledError):
        await building
    await nothing_but(faulty)


@pytest.mark.parametrize(
    "kind",
    ["fails-late", pytest.param("fails", marks=pytest.mark.long), pytest.param("between", marks=pytest.mark.long)],
)
@pytest.mark.gvisor_only(reason="a runsc that fails")
async def test_a_runsc_that_fails_leaves_nothing(faulty: Host, fault: FaultyRunsc, kind: str) -> None:
    fault("run", kind)
    with pytest.raises(InnkeeperError, match="could not be started"):
        await faulty.ensure(instance := uuid4())
    await nothing_but(faulty)
    # The same instance, once the fault is over.
    fault.works()
    await faulty.ensure(instance)
    await faulty.ok(instance, "true")
    await faulty.destroy(instance)
    await nothing_but(faulty)


@pytest.mark.gvisor_only(reason="the agent of a microVM is dialled")
async def test_an_agent_that_never_dials_in_leaves_nothing(
    faulty: Host, fault: FaultyRunsc, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It dials where nobody listens. A short patience alone is not enough: on a busy machine it dials in before the start returns.
    monkeypatch.setattr(guest_link, "SOCKET_NAME", "another.sock")
    monkeypatch.setattr(GvisorDriver, "patience_seconds", 1.0)
    with pytest.raises(InnkeeperError, match="did not answer"):
        await faulty.ensure()
    await nothing_but(faulty)


@pytest.mark.long
@pytest.mark.gvisor_only(reason="the host mounts no disk of a microVM")
async def test_a_disk_that_cannot_be_mounted_leaves_nothing(faulty: Host) -> None:
    shape = faulty.shape(disk_mb=64)
    template = faulty.settings.host_dir / "pool" / "templates" / "ext4-v1-64m.img"
    instance = await faulty.ensure(shape=shape)
    await faulty.destroy(instance)
    content = template.read_bytes()
    template.chmod(0o600)
    template.write_bytes(bytes(1 << 20))
    with pytest.raises((InnkeeperError, OSError)):
        await faulty.ensure(shape=shape)
    await nothing_but(faulty)
    template.write_bytes(content)
    instance = await faulty.ensure(shape=shape)
    await faulty.destroy(instance)
    await nothing_but(faulty)


@pytest.mark.long
@pytest.mark.gvisor_only(reason="a runsc that fails")
async def test_a_fault_keeps_the_disk_that_a_room_had_before(faulty: Host, fault: FaultyRunsc) -> None:
    instance = await faulty.ensure()
    await faulty.ok(instance, "echo kept > file; sync")
    for kind in ("fails", "fails-late", "between"):
        await faulty.destroy(instance, keep_disk=True)
        fault("run", kind)
        with pytest.raises(InnkeeperError):
            await faulty.ensure(instance)
        fault.works()
        await faulty.ensure(instance)
        assert (await faulty.ok(instance, "cat file")).text == "kept\n"
    await nothing_but(faulty, instance)
    await faulty.destroy(instance)
    await nothing_but(faulty)


@pytest.mark.gvisor_only(reason="a runsc that fails")
async def test_pools_that_cannot_be_filled_leave_nothing(
    faulty: Host, fault: FaultyRunsc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("innkeeper.host.warm.RETRY_SECONDS", 0.1)
    for kind in ("fails", "fails-late"):
        fault("run", kind)
        await faulty.request(verbs.SetPools((verbs.WarmPool(faulty.shape(f"pool-{kind}"), 1),)))
        await asyncio.sleep(1)
        assert faulty.daemon.fleet.warm.machines() == []
        await faulty.request(verbs.SetPools())
        await nothing_but(faulty)
    # A guest that comes up and cannot be given its identity.
    fault.works()
    await faulty.request(verbs.SetPools((verbs.WarmPool(faulty.shape("pool-user"), 1, user="nobodyhere"),)))
    await asyncio.sleep(2)
    assert faulty.daemon.fleet.warm.machines() == []
    await faulty.request(verbs.SetPools())
    await nothing_but(faulty)


async def test_a_claim_that_fails_at_its_records_takes_its_guest_along(faulty: Host) -> None:
    shape = faulty.shape("pool-claim")
    await faulty.request(verbs.SetPools((verbs.WarmPool(shape, 1),)))
    (warm,) = await eventually(faulty.daemon.fleet.warm.machines)
    instance = uuid4()
    folder = faulty.settings.host_dir / "instances" / str(instance)
    folder.mkdir()
    (folder / "journals").write_text("a file where a folder is to be made")
    answer = await faulty.ensure_answer(instance, shape=shape)
    assert not answer["claimed"]
    assert faulty.machine(instance).id != warm.id
    await faulty.request(verbs.SetPools())
    await nothing_but(faulty, instance)
    await faulty.destroy(instance)
    await nothing_but(faulty)


async def test_a_guest_that_ends_while_it_is_claimed_leaves_no_disk(
    faulty: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, configure = faulty.shape("pool-end"), machine_builder.MachineBuilder.configure

    async def killed_first(
        builder: machine_builder.MachineBuilder, machine: Machine, request: verbs.EnsureMachine
    ) -> bool:
        if machine is warm:
            # Its records name the instance by now.
            os.kill(process_of(machine), signal.SIGKILL)
            await eventually(lambda: machine not in faulty.daemon.fleet.held())
        return await configure(builder, machine, request)

    await faulty.request(verbs.SetPools((verbs.WarmPool(shape, 1),)))
    (warm,) = await eventually(faulty.daemon.fleet.warm.machines)
    monkeypatch.setattr(machine_builder.MachineBuilder, "configure", killed_first)
    instance = uuid4()
    answer = await faulty.ensure_answer(instance, shape=shape)
    assert not answer["claimed"]
    await faulty.request(verbs.SetPools())
    await nothing_but(faulty, instance)
    await faulty.destroy(instance)
    await nothing_but(faulty)


@pytest.mark.gvisor_only(reason="the host mounts no disk of a microVM")
async def test_a_disk_that_somebody_holds_busy_is_waited_for(faulty: Host) -> None:
    instance = await faulty.ensure()
    await faulty.ok(instance, "echo kept > file; sync")
    (upper,) = faulty.settings.host_dir.glob("mounts/machines/*/disk/u/home/user/file")
    with upper.open("rb"):
        await faulty.destroy(instance, keep_disk=True)
        again = asyncio.ensure_future(faulty.ensure(instance))
        await asyncio.sleep(0.5)
        assert not again.done()
    await again
    assert (await faulty.ok(instance, "cat file")).text == "kept\n"
    await faulty.destroy(instance)
    await nothing_but(faulty)


async def test_an_image_that_is_being_built_keeps_no_pool_mounted(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("home")
    argv = [*build_argv(Path("/nowhere"))[:-3], "sh", "-c", "echo built; read line"]
    async with running_host(home):
        building = await asyncio.create_subprocess_exec(*argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert building.stdout is not None
        assert await building.stdout.readline() == b"built\n"
    try:
        await eventually(lambda: not loop_device.devices_backed_by(home))
    finally:
        building.kill()
        await building.wait()


DIES = """
import asyncio, os, sys
from pathlib import Path
from uuid import uuid4
sys.path.insert(0, {repository!r})
from tests.integration.daemon_fixture import running_host
from innkeeper.core import host_verbs as verbs

async def main():
    async with running_host(Path({home!r}), agent=Path({agent!r}), keep_running=True) as host:
        host.driver = {driver!r}
        if {step!r} == "warm":
            await host.request(verbs.SetPools((verbs.WarmPool(host.shape("pool"), 1),)))
            while not any(Path({home!r}).glob("host/machines/*/*.pid")):
                await asyncio.sleep(0.001)
            os._exit(9)
        def die(reached):
            if reached.step == {step!r}:
                os._exit(9)
        await host.daemon.fleet.ensure(verbs.EnsureMachine(uuid4(), host.shape(), "guest"), die)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    "step",
    [
        "image_generated",
        "warm",
        *(
            pytest.param(step.value, marks=pytest.mark.long)
            for step in STEPS
            if step is not InstanceState.IMAGE_GENERATED
        ),
    ],
)
async def test_a_daemon_that_dies_at_a_step_leaves_nothing_for_the_next_one(
    homes: Callable[[str], Path], driver: str, step: str
) -> None:
    home = homes(driver)
    program = DIES.format(
        repository=str(REPOSITORY), home=str(home), agent=str(built_agent()), step=step, driver=driver
    )
    died = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True, timeout=START_SECONDS
    )
    assert died.returncode == 9, died.stderr[-3000:]
    async with running_host(home) as host:
        ready = step == InstanceState.READY.value
        assert host.daemon.recovered.adopted == ready
        if not ready and step != "active":
            assert host.daemon.recovered.removed > 0
        assert host.daemon.fleet.warm.machines() == []
        # One that has reached `ready` waits for whoever owns its row to say that there is none.
        for instance in host.daemon.fleet.disks():
            await host.destroy(instance)
        await nothing_but(host)
