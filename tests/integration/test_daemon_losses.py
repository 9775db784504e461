"""What must not be lost, on the paths where it could be: disks, guests, and the daemon's attention."""

import asyncio
import json
from uuid import uuid4

import pytest
from tests.integration.daemon_fixture import Host, eventually, running_host

from innkeeper.bus.contract import Data
from innkeeper.core import host_verbs as verbs
from innkeeper.errors import InnkeeperError

pytestmark = pytest.mark.anyio


async def test_a_reader_of_a_destroyed_rooms_output_hears_of_it_and_holds_nobody_up(host: Host) -> None:
    instance = await host.ensure()
    request = verbs.Execute(instance, uuid4(), "yes", 60, stream=True)
    received = 0
    with pytest.raises(InnkeeperError):
        async with host.bus.open(host.daemon.host_id, verbs.Execute.verb, verbs.to_wire(request)) as call:
            async for event in call.events():
                received += len(event.data) if isinstance(event, Data) else 0
                if received > 1 << 20:
                    await host.destroy(instance)
                    received = -(1 << 60)
    async with asyncio.timeout(20):
        await host.status()


async def test_a_claim_that_fails_again_and_again_leaves_no_guest(host: Host) -> None:
    instance = uuid4()
    for _ in range(3):
        with pytest.raises(InnkeeperError):
            await host.ensure(instance, user="nobodyhere")
    await eventually(lambda: all(machine.record.instance_id != instance for machine in host.daemon.fleet.held()))
    await host.ensure(instance)
    await host.ok(instance, "true")
    await host.destroy(instance)
    await host.destroy(instance)


async def test_a_room_without_a_machine_takes_its_disk_along(host: Host) -> None:
    instance = await host.ensure()
    await host.ok(instance, "echo x > file; sync")
    await host.destroy(instance, keep_disk=True)
    assert instance in host.daemon.fleet.disks()
    await host.destroy(instance)
    assert instance not in host.daemon.fleet.disks()

    async def clean() -> bool:
        return (await host.status())["leaked"] == 0

    for _ in range(50):
        if await clean():
            break
        await asyncio.sleep(0.1)
    assert await clean()


async def test_a_machine_on_somebodys_disk_is_never_a_spare_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    """As a daemon leaves it that is killed while a room starts again on its disk."""
    home = tmp_path_factory.mktemp("home")
    async with running_host(home, keep_running=True) as first:
        instance = await first.ensure()
        await first.ok(instance, "echo kept > file; sync")
        state = first.machine(instance).state_dir
    for name in ("claim.json", "configured"):
        (state / name).unlink()
    async with running_host(home) as second:
        assert second.daemon.recovered.adopted == 0
        assert second.daemon.fleet.warm.machines() == []
        await second.ensure(instance)
        assert (await second.ok(instance, "cat file")).text == "kept\n"
        await second.destroy(instance)


async def test_a_record_that_cannot_be_read_costs_no_disk(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("home")
    async with running_host(home, keep_running=True) as first:
        instance = await first.ensure()
        await first.ok(instance, "echo kept > file; sync")
        record = first.daemon.fleet.journals(instance).parent / "instance.json"
        kept = json.loads(record.read_text())
        await first.destroy(instance, keep_disk=True)
    record.write_text("")
    async with running_host(home, keep_running=True) as second:
        with pytest.raises(InnkeeperError, match="record"):
            await second.ensure(instance)
    record.write_text(json.dumps(kept))
    async with running_host(home) as third:
        await third.ensure(instance)
        assert (await third.ok(instance, "cat file")).text == "kept\n"
        await third.destroy(instance)
