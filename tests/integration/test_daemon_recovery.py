"""A daemon that starts again: it adopts what runs, cleans what does not, and loses no disk."""

import asyncio
import os
import signal
from pathlib import Path
from uuid import UUID

import pytest
from tests import leaks
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, eventually, running_host

from innkeeper.bus.contract import Message
from innkeeper.core import host_verbs as verbs
from innkeeper.errors import InnkeeperError, InstanceNotFoundError
from innkeeper.host.linux import mounts, netns
from innkeeper.host.linux.cgroup import CgroupTree

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]


def sentry(host: Host, instance: UUID) -> int:
    return int((host.machine(instance).state_dir / "sandbox.pid").read_text())


async def frozen(host: Host, instance: UUID) -> None:
    async def so() -> bool:
        return bool((await host.listed(instance) or {})["frozen"])

    await eventually(so)


async def test_guests_outlive_the_daemon_and_are_adopted(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("home")
    async with running_host(home, keep_running=True) as first:
        busy, asleep, damaged, foreign = [await first.ensure() for _ in range(4)]
        long = await first.ok(busy, "(sleep 1.5; echo late > /tmp/late; sleep 60) >/dev/null 2>&1 & echo $!")
        await first.ok(asleep, "echo mine > file")
        for instance in (damaged, foreign):
            await first.ok(instance, "echo kept > file")
        await frozen(first, asleep)
        pids = {instance: sentry(first, instance) for instance in (busy, asleep, damaged, foreign)}
        records = [first.machine(instance).state_dir / "machine.json" for instance in (damaged, foreign)]
    records[0].write_text('{"machine_id": 7')
    # As a version of the server writes it that has more drivers: to this one it is nobody's.
    records[1].write_text(records[1].read_text().replace('"driver": "gvisor"', '"driver": "another"'))
    # That is what the leak check is for.
    assert any("process" in left for left in leaks.leftovers(home))
    async with running_host(home) as second:
        assert second.daemon.recovered.adopted == 2
        row = await second.listed(asleep)
        assert row is not None
        assert row["frozen"]
        assert (sentry(second, busy), sentry(second, asleep)) == (pids[busy], pids[asleep])
        assert (await second.ok(busy, f"kill -0 {long.text.strip()}; sleep 2; cat /tmp/late")).text == "late\n"
        assert (await second.ok(asleep, "cat file")).text == "mine\n"
        # Nobody knows whose guest it was: it is gone, and the instance's disk is not.
        for instance in (damaged, foreign):
            with pytest.raises(InstanceNotFoundError):
                await second.run(instance, "true")
            with pytest.raises(ProcessLookupError):
                os.kill(pids[instance], 0)
            await second.ensure(instance)
            assert (await second.ok(instance, "cat file")).text == "kept\n"
    assert leaks.wait_for_none(home) == []


async def test_a_killed_sandbox_is_told_and_restarts_on_its_disk(host: Host) -> None:
    instance = await host.ensure()
    await host.ok(instance, "echo kept > file")
    events: list[dict[str, object]] = []

    async def watch() -> None:
        async with host.bus.open(host.daemon.host_id, verbs.WatchHost.verb, {}) as call:
            async for event in call.events():
                assert isinstance(event, Message)
                events.append(event.body)

    watching = asyncio.ensure_future(watch())
    running = asyncio.ensure_future(host.run(instance, "sleep 60"))
    await asyncio.sleep(0.3)
    os.kill(sentry(host, instance), signal.SIGKILL)
    with pytest.raises(InnkeeperError) as refused:
        await running
    assert refused.value.code == "instance_failed"
    await eventually(lambda: events, seconds=5)
    assert events == [{"type": "machine.failed", "instance_id": str(instance), "failure": "The sandbox ended"}]
    watching.cancel()
    await host.ensure(instance)
    assert (await host.ok(instance, "cat file")).text == "kept\n"
    await host.destroy(instance)


async def test_a_reboot_of_the_host_loses_no_disk(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("home")
    async with running_host(home, keep_running=True) as first:
        instance = await first.ensure()
        pooled = first.shape("pool")
        await first.request(verbs.SetPools((verbs.WarmPool(pooled, 1),)))
        await eventually(first.daemon.fleet.warm.machines)
        done = await first.ok(instance, "echo kept > file; sync; echo said")
    await reboot(home)
    async with running_host(home) as second:
        assert second.daemon.recovered.adopted == 0
        with pytest.raises(InstanceNotFoundError):
            await second.run(instance, "true")
        await second.ensure(instance)
        answer = await second.ok(instance, "cat file")
        assert (answer.text, answer.changed) == ("kept\n", {})
        assert (await second.output(instance, done.execution_id))[1] == b"said\n"
        assert len(second.daemon.fleet.disks()) == 1


async def reboot(home: Path) -> None:
    """What is left of a server when the host comes up again: its files."""
    identifier = leaks.server_id(home)
    group = CgroupTree.detect().server_root(f"innkeeper-{identifier}")
    for name in group.children():
        await group.child(name).kill_all()
    await group.remove()
    for name in netns.names(f"ik{identifier}"):
        await netns.delete(name)
    await mounts.umount_tree(home)
