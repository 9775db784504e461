"""Suspended guests of a real daemon: nothing of them runs, and what ran in them goes on; on their disk where their memory cannot be used."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests import leaks
from tests.integration.booted_vm import NEEDS_QEMU, boot_files
from tests.integration.daemon_fixture import NEEDS_RUNSC, START_SECONDS, Host, eventually, running_host

from innkeeper.core import checkpoint_verbs as verbs
from innkeeper.core.host_verbs import EnsureMachine, Execute, FollowOutput, to_wire
from innkeeper.errors import (
    CheckpointFailedError,
    InnkeeperError,
    InstanceNotFoundError,
    InstanceSuspendedError,
    UnavailableError,
)
from innkeeper.host.admission import Admission
from innkeeper.host.disks.checkpoint_store import CheckpointStore
from innkeeper.host.disks.disk_pool import DiskPool
from innkeeper.host.fleet import Fleet
from innkeeper.host.machine_builder import MachineBuilder

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]

COUNT = "for ((n = 0; ; n++)); do echo $n > /home/user/new; mv /home/user/new /home/user/count; sleep 0.02; done"


@pytest.fixture(
    scope="module",
    params=["gvisor", pytest.param("qemu", marks=[pytest.mark.long, NEEDS_QEMU])],
)
async def host(
    anyio_backend: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Host]:
    home = tmp_path_factory.mktemp("home")
    if request.param == "qemu":
        take_kernel(home)
    async with running_host(home) as host:
        host.driver = request.param
        yield host
        assert (await host.status())["leaked"] == 0


def take_kernel(home: Path) -> None:
    """A kernel of its own: a server removes what its own guests do not boot."""
    kernel = boot_files().kernel.parent
    shutil.copytree(kernel, home / "host" / "kernels" / kernel.name, ignore=shutil.ignore_patterns("initramfs-*"))


async def suspend(host: Host, instance: UUID) -> int:
    began = time.monotonic()
    answer = await host.request(verbs.SuspendMachine(instance))
    size = answer["memory_bytes"]
    print(f"suspended in {(time.monotonic() - began) * 1000:.0f} ms, {size} B")
    assert isinstance(size, int) and size > 0
    return size


async def wake(host: Host, instance: UUID) -> dict[str, Any]:
    began = time.monotonic()
    answer = await host.ensure_answer(instance)
    print(f"woken in {(time.monotonic() - began) * 1000:.0f} ms: {answer['woken']}")
    woken = answer["woken"]
    assert isinstance(woken, dict)
    return woken


def folder_of(host: Host, instance: UUID) -> Path:
    return host.settings.host_dir / "pool" / "suspended" / str(instance)


async def count(host: Host, instance: UUID) -> int:
    async def so() -> str:
        answer = await host.run(instance, "cat count")
        return answer.text if answer.exit_code == 0 else ""

    return int(await eventually(so))


async def goes_on(host: Host, instance: UUID, *, above: int) -> None:
    async def so() -> bool:
        return await count(host, instance) > above

    await eventually(so)


WITH_MEMORY = {"with_memory": True, "reason": ""}


async def test_what_runs_in_a_suspended_guest_goes_on(host: Host, instance: UUID) -> None:
    await host.ok(instance, f"({COUNT}) > /dev/null 2>&1 & echo in-memory > /dev/shm/kept; echo before > file")
    before = await count(host, instance)
    identity = "cat /etc/machine-id; hostname"
    same = (await host.ok(instance, identity)).text
    machine = host.machine(instance)
    # A command that runs: whoever waits for it hears of the end of the wait, and its output goes on where it was.
    execution = uuid4()
    until_told = (
        "for n in 1 2 3 4 5; do echo $n; sleep 0.1; done; until [ -e /dev/shm/told ]; do sleep 0.1; done; echo 6"
    )
    request = Execute(instance, execution, until_told, 120, stream=True)
    async with host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call:
        await anext(aiter(call.events()))
        await suspend(host, instance)
        with pytest.raises(InstanceSuspendedError):
            async for _ in call.events():
                pass
            await call.result()
    # Repeated, it says the same; the machine is gone, and the instance has none.
    await suspend(host, instance)
    with pytest.raises(InstanceNotFoundError):
        await host.run(instance, "true")
    assert not machine.driver.runs(machine.id, machine.state_dir)
    await eventually(lambda: not machine.state_dir.exists())
    assert (await host.status())["leaked"] == 0
    assert await wake(host, instance) == WITH_MEMORY
    assert not folder_of(host, instance).exists()
    await goes_on(host, instance, above=before)
    assert (await host.ok(instance, f"{identity}; cat /dev/shm/kept file")).text == f"{same}in-memory\nbefore\n"
    await host.ok(instance, "touch /dev/shm/told")
    follow = FollowOutput(instance, execution)
    async with host.bus.open(host.daemon.host_id, follow.verb, to_wire(follow)) as call:
        async for _ in call.events():
            pass
        assert (await call.result())["exit_code"] == 0
    _, output = await host.output(instance, execution)
    assert output == b"1\n2\n3\n4\n5\n6\n"
    # What changed before is reported as what it is, and no more than that.
    changed = (await host.ok(instance, "echo new > mine")).changed
    assert "/home/user/mine" in changed and "/etc/hostname" not in changed
    # It may be done again, and what was written since is there.
    await suspend(host, instance)
    assert await wake(host, instance) == WITH_MEMORY
    assert (await host.ok(instance, "cat mine")).text == "new\n"


async def test_memory_that_cannot_be_used_is_said_and_the_disk_is_kept(host: Host, instance: UUID) -> None:
    await host.ok(instance, "echo kept > file; echo in-memory > /dev/shm/lost")
    for spoil, reason in ((_spoil_needs, "another"), (_spoil_memory, "damaged")):
        await suspend(host, instance)
        await eventually(lambda: sealed(folder_of(host, instance)))
        spoil(folder_of(host, instance))
        woken = await wake(host, instance)
        assert not woken["with_memory"] and reason in woken["reason"], woken
        assert (await host.ok(instance, "cat file; ls /dev/shm")).text == "kept\n"
        assert not folder_of(host, instance).exists()


async def test_others_go_on_from_where_a_suspended_guest_is_and_it_sleeps_on(host: Host, instance: UUID) -> None:
    await host.ok(instance, f"({COUNT}) > /dev/null 2>&1 & echo in-memory > /dev/shm/kept; echo before > file; sync")
    before = await count(host, instance)
    await suspend(host, instance)
    kept = uuid4()
    answer = await host.request(verbs.TakeCheckpoint(instance, kept))
    assert (answer["downtime_ms"], answer["memory"]["memory_mb"]) == (0, host.shape().memory_mb)
    assert folder_of(host, instance).exists() and await host.listed(instance) is None
    others = [uuid4(), uuid4()]
    for number, other in enumerate(others):
        machine = EnsureMachine(other, host.shape(), f"clone-{number}")
        told = await host.request(verbs.RestoreCheckpoint(kept, machine), timeout_seconds=START_SECONDS)
        host.instances.add(other)
        assert told["restored"]
        await goes_on(host, other, above=before)
        seen = (await host.ok(other, "hostname; cat /dev/shm/kept file; echo other > file; sync")).text
        assert seen == f"clone-{number}\nin-memory\nbefore\n"
    await host.request(verbs.DropCheckpoint(kept))
    assert await wake(host, instance) == WITH_MEMORY
    await goes_on(host, instance, above=before)
    assert (await host.ok(instance, "hostname; cat /dev/shm/kept file")).text == "guest\nin-memory\nbefore\n"
    machine_ids = {(await host.ok(one, "cat /etc/machine-id")).text for one in (instance, *others)}
    assert len(machine_ids) == 3
    for other in others:
        await host.destroy(other)


async def test_memory_without_checksums_yet_is_used_while_the_host_is_up(
    host: Host, instance: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    await host.ok(instance, "echo kept > file; echo in-memory > /dev/shm/kept")
    monkeypatch.setattr(CheckpointStore, "seal", lambda *_: False)
    await suspend(host, instance)
    assert not sealed(folder_of(host, instance))
    assert await wake(host, instance) == WITH_MEMORY
    assert (await host.ok(instance, "cat /dev/shm/kept")).text == "in-memory\n"
    await suspend(host, instance)
    with monkeypatch.context() as patched:
        patched.setattr("innkeeper.host.disks.checkpoint_store.boot_id", lambda: "another")
        woken = await wake(host, instance)
    assert not woken["with_memory"] and "went down" in woken["reason"], woken
    assert (await host.ok(instance, "cat file; ls /dev/shm")).text == "kept\n"


def sealed(folder: Path) -> bool:
    """Whether the checksums of the memory are there, which are made beside what goes on."""
    return json.loads((folder / "manifest.json").read_text())["memory"]["boot"] == ""


def _spoil_needs(folder: Path) -> None:
    manifest = folder / "manifest.json"
    body = json.loads(manifest.read_text())
    body["memory"]["needs"]["cpu"] = "other"
    manifest.write_text(json.dumps(body))


def _spoil_memory(folder: Path) -> None:
    pages = max((folder / "memory").iterdir(), key=lambda path: path.stat().st_size)
    with pages.open("r+b") as file:
        file.seek(pages.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


async def test_a_host_without_room_leaves_it_suspended(
    host: Host, instance: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    await host.ok(instance, "echo in-memory > /dev/shm/kept")
    with monkeypatch.context() as patched:
        patched.setattr(DiskPool, "free_bytes", lambda _: 3 << 20)
        with pytest.raises(UnavailableError, match="disk is full"):
            await suspend(host, instance)
    assert (await host.ok(instance, "cat /dev/shm/kept")).text == "in-memory\n"
    await suspend(host, instance)
    with monkeypatch.context() as patched:
        patched.setattr(Admission, "memory_limit_mb", lambda _: 0)
        with pytest.raises(UnavailableError, match="No available hosts"):
            await host.ensure(instance)
    assert await wake(host, instance) == WITH_MEMORY
    assert (await host.ok(instance, "cat /dev/shm/kept")).text == "in-memory\n"


async def test_a_start_that_fails_is_tried_again_from_the_same_moment(
    host: Host, instance: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    await host.ok(
        instance,
        f"({COUNT}) > /dev/null 2>&1 & (for ((n = 0; ; n++)); do echo $n >> log; sleep 0.02; done) 2> /dev/null &",
    )
    before = await count(host, instance)
    await suspend(host, instance)
    configure = MachineBuilder.configure
    failed: list[Any] = []

    async def fail(builder: MachineBuilder, machine: Any, request: Any) -> bool:
        if not failed:
            # The guest runs by now, and has written to its disk.
            failed.append(machine)
            await configure(builder, machine, request)
            await asyncio.sleep(0.5)
            raise InnkeeperError("The guest cannot be used")
        return await configure(builder, machine, request)

    monkeypatch.setattr(MachineBuilder, "configure", fail)
    assert await wake(host, instance) == WITH_MEMORY
    assert failed
    await goes_on(host, instance, above=before)
    # The disk, too, is of that moment: what the first attempt wrote is not there beside what the second one writes.
    said = [int(line) for line in (await host.ok(instance, "cat log")).text.split()]
    assert said == list(range(len(said)))


async def test_a_suspended_guest_that_is_destroyed_leaves_nothing(host: Host) -> None:
    instance = await host.ensure()
    await suspend(host, instance)
    assert folder_of(host, instance).exists()
    await host.destroy(instance)
    await eventually(lambda: not folder_of(host, instance).exists())
    with pytest.raises(InstanceNotFoundError):
        await host.request(verbs.SuspendMachine(instance))


async def test_what_cannot_be_saved_goes_on(host: Host, instance: UUID) -> None:
    if host.driver != "gvisor":
        pytest.skip("a microVM can be saved whatever runs in it")
    await host.ok(instance, "exec 7>gone; rm gone; (sleep 1000 >&7 2>/dev/null &)")
    with pytest.raises(CheckpointFailedError, match="deleted: /home/user/gone"):
        await suspend(host, instance)
    assert not folder_of(host, instance).exists()
    await host.ok(instance, "pkill sleep")
    await suspend(host, instance)
    await wake(host, instance)


@pytest.mark.parametrize("driver", ["gvisor", pytest.param("qemu", marks=[pytest.mark.long, NEEDS_QEMU])])
async def test_it_outlives_daemons_wherever_they_end(
    tmp_path_factory: pytest.TempPathFactory, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path_factory.mktemp("home")
    if driver == "qemu":
        take_kernel(home)
    try:
        await outlive(home, driver, monkeypatch)
    except BaseException:
        # What was to outlive its daemon is ended by one more.
        async with running_host(home):
            raise
    assert leaks.wait_for_none(home) == []


async def outlive(home: Path, driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_host(home, keep_running=True) as first:
        first.driver = driver
        asleep, caught = [await first.ensure() for _ in range(2)]
        for instance in (asleep, caught):
            await first.ok(instance, "echo in-memory > /dev/shm/kept")
        await suspend(first, asleep)
        # Held still with its memory whole: to the next daemon it is suspended, though nobody was told.
        machine = first.machine(caught)
        held, kept = machine.state_dir / "held-still", folder_of(first, caught)
        await suspend_copy(first, caught, monkeypatch)
        held.touch()
        assert kept.exists()
        pid = int((machine.state_dir / ("vm.pid" if driver == "qemu" else "sandbox.pid")).read_text())
    async with running_host(home, keep_running=True) as second:
        second.driver = driver
        assert second.daemon.recovered.adopted == 0
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        for instance in (asleep, caught):
            assert sealed(folder_of(second, instance))
            second.instances.add(instance)
            assert await wake(second, instance) == WITH_MEMORY
            assert (await second.ok(instance, "cat /dev/shm/kept")).text == "in-memory\n"
        # One that runs on and whose memory was not forgotten yet.
        await suspend(second, asleep)
        stale = folder_of(second, asleep)
        aside = stale.parent.with_name("aside")
        # Until then a file of it takes another's place.
        await eventually(lambda: sealed(stale))
        shutil.copytree(stale, aside)
        await wake(second, asleep)
        aside.rename(stale)
        orphan = stale.with_name(str(uuid4()))
        orphan.mkdir()
        assert (await second.status())["leaked"] == 1
    async with running_host(home) as third:
        assert third.daemon.recovered.adopted == 2
        assert not stale.exists() and not orphan.exists()


async def suspend_copy(host: Host, instance: UUID, monkeypatch: pytest.MonkeyPatch) -> None:
    """Suspend a guest as far as the moment before its machine is ended."""

    async def not_yet(fleet: Fleet, machine: Any) -> None:
        raise InnkeeperError("not yet")

    with monkeypatch.context() as patched:
        patched.setattr(Fleet, "suspend", not_yet)
        patched.setattr("innkeeper.host.suspensions.Suspensions.drop", _keep)
        with pytest.raises(InnkeeperError):
            await suspend(host, instance)


async def _keep(*_: Any) -> None:
    return None
