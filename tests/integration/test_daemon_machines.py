"""Machines over the bus: one per instance, warm or cold, admitted or refused, gone when they are told to go."""

import asyncio
import dataclasses
from uuid import UUID, uuid4

import pytest
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, eventually, running_host

from innkeeper.core import host_verbs as verbs
from innkeeper.core.host_verbs import WarmPool
from innkeeper.core.isolation import offer_from_wire
from innkeeper.errors import ImageNotFoundError, InnkeeperError, InstanceNotFoundError, UnavailableError

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]


async def test_asking_again_gives_the_same_machine(host: Host, instance: UUID) -> None:
    before = host.machine(instance).id
    first = await host.ensure_answer(instance)
    assert first == await host.ensure_answer(instance)
    assert host.machine(instance).id == before
    assert [step["step"] for step in first["boot_trace"]] == [
        "active", "network_allocated", "ftap_created", "image_generated", "vm_started", "vm_booted", "ready",
    ]  # fmt: skip
    assert first["isolation"]["level"] == "gvisor"


async def test_what_the_host_offers_is_what_it_starts(host: Host) -> None:
    status = await host.status()
    offer, other = [offer_from_wire(one) for one in status["drivers"]]
    assert offer.isolation is not None
    assert (offer.driver, offer.isolation.level, offer.isolation.accelerator) == ("gvisor", "gvisor", None)
    assert offer.capabilities >= {"freeze", "host_sees_changes"}
    # No kernel was fetched into this server's directory.
    assert (other.driver, other.isolation) == ("qemu", None)
    with pytest.raises(UnavailableError, match="The driver 'qemu' cannot run on this host: "):
        await host.ensure_answer(uuid4(), shape=dataclasses.replace(host.shape(), driver="qemu"))
    after = await host.status()
    assert (after["machines"], after["leaked"]) == (status["machines"], 0)


async def test_twenty_at_once_for_one_instance_make_one_machine(host: Host) -> None:
    before = (await host.status())["machines"]
    instance = uuid4()
    answers = await asyncio.gather(*(host.ensure_answer(instance) for _ in range(20)))
    assert all(answer == answers[0] for answer in answers)
    assert (await host.status())["machines"] == before + 1
    await host.destroy(instance)
    assert (await host.status())["machines"] == before


async def test_a_pool_serves_claims_is_refilled_and_drained(host: Host) -> None:
    shape = host.shape("pool")

    async def level(ready: int) -> bool:
        return [pool["ready"] for pool in (await host.status())["pools"]] == [ready]

    await host.request(verbs.SetPools((WarmPool(shape, 2, user="user"),)))
    await eventually(lambda: level(2))
    assert all(machine.frozen for machine in host.daemon.fleet.warm.machines())
    claimed, cold = uuid4(), uuid4()
    assert (await host.ensure_answer(claimed, shape=shape, user="user", env={"A": "b"}))["claimed"]
    assert (await host.run(claimed, "echo $A; id -un")).text == "b\nuser\n"
    assert not (await host.ensure_answer(cold, shape=host.shape()))["claimed"]
    await eventually(lambda: level(2))
    await host.request(verbs.SetPools(()))
    await eventually(lambda: host.daemon.fleet.warm.machines() == [])
    # What was claimed is nobody's pool any more.
    assert (await host.run(claimed, "echo here")).text == "here\n"
    for instance in (claimed, cold):
        await host.destroy(instance)


async def test_destroying_while_a_command_runs_ends_both(host: Host) -> None:
    instance = await host.ensure()
    running = asyncio.ensure_future(host.run(instance, "echo x; sleep 60"))
    await asyncio.sleep(0.3)
    await host.destroy(instance)
    with pytest.raises(InnkeeperError) as refused:
        await running
    assert refused.value.code in ("instance_failed", "instance_not_found")
    with pytest.raises(InstanceNotFoundError):
        await host.run(instance, "true")
    await host.destroy(instance)
    assert await host.listed(instance) is None


async def test_a_kept_disk_starts_again_with_its_files(host: Host) -> None:
    instance = await host.ensure()
    await host.ok(instance, "echo kept > file")
    await host.destroy(instance, keep_disk=True)
    assert str(instance) in (await host.request(verbs.ListMachines()))["disks"]
    await host.ensure(instance)
    assert (await host.run(instance, "cat file")).text == "kept\n"
    await host.destroy(instance)
    assert str(instance) not in (await host.request(verbs.ListMachines()))["disks"]


async def test_what_cannot_be_made_is_refused_and_leaves_nothing(host: Host) -> None:
    for shape, error in (
        (host.shape(image_digest="0" * 64), ImageNotFoundError),
        (host.shape(memory_mb=262_144), UnavailableError),
    ):
        instance = uuid4()
        with pytest.raises(error):
            await host.ensure_answer(instance, shape=shape)
        assert await host.listed(instance) is None
        assert str(instance) not in (await host.request(verbs.ListMachines()))["disks"]
    with pytest.raises(InnkeeperError):
        await host.ensure_answer(instance, user="no-such-user")
    assert await host.listed(instance) is None
    # Nor in the daemon's memory: who asks again and again while the host is full would make it grow.
    await eventually(lambda: len(host.daemon.fleet._locks) == 0)


async def test_an_instance_takes_the_place_of_a_spare_guest(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Room for one busy guest beside a frozen one, and not for two busy ones."""
    async with running_host(tmp_path_factory.mktemp("home")) as host:
        limit = (await host.status())["memory_limit_mb"]
        shape = host.shape("pool", memory_mb=int(limit * 0.9))
        await host.request(verbs.SetPools((WarmPool(shape, 1),)))
        await eventually(lambda: len(host.daemon.fleet.warm.machines()) == 1)
        first, second = uuid4(), uuid4()
        assert not (await host.ensure_answer(first, shape=host.shape(memory_mb=int(limit * 0.9))))["claimed"]
        assert host.daemon.fleet.warm.machines() == []
        await host.ok(first, "sleep 60 &")
        with pytest.raises(UnavailableError):
            await host.ensure_answer(second, shape=shape)
        await host.destroy(first)


async def test_an_idle_guest_freezes_and_any_request_thaws_it(host: Host, instance: UUID) -> None:
    async def frozen() -> bool:
        return bool((await host.listed(instance) or {})["frozen"])

    await host.ok(instance, "true")
    await eventually(frozen)
    assert (await host.read(instance, "/etc/hostname"))[0]["bytes"] >= 0
    await eventually(frozen)
    assert (await host.run(instance, "echo awake")).text == "awake\n"
    await eventually(frozen)
    await host.destroy(instance)
    await host.ensure(instance)


async def test_a_watched_upper_follows_the_machine(host: Host) -> None:
    """The kernel's count of changes belongs to a mount: it must be let go of before the disk is unmounted."""
    scanner = host.daemon.fleet._changes._mounted._scanner
    instance = await host.ensure()
    upper = host.machine(instance).upper
    await host.ok(instance, "touch a")
    if scanner.watch(upper):
        assert (await host.ok(instance, "touch b")).changed == {"/home/user/b": "created"}
        assert (await host.ok(instance, "true")).changed == {}
        scanner.unwatch(upper)
    await host.destroy(instance)
    await eventually(lambda: not upper.exists())
    assert upper not in scanner._watches
