"""Which driver an instance gets, and that nothing is started on less than was asked for: over a scripted host."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from innkeeper.control import hosts, placement, profiles, rooms, session_vm, vms, warm_pools
from innkeeper.control.host_table import HostEntry
from innkeeper.core.host_verbs import EnsureMachine
from innkeeper.core.instance import InstanceState
from innkeeper.core.instance_spec import spec_of_profile
from innkeeper.core.isolation import Offer
from innkeeper.core.vm import VmRequest
from innkeeper.errors import ConflictError, DriverNotOfferedError, InvalidRequestError
from scripted_host import GVISOR, KVM, TCG

pytestmark = pytest.mark.anyio
World = Any
ON_GVISOR = Offer("gvisor", GVISOR, GVISOR.reason, frozenset({"freeze", "host_sees_changes"}))
ON_KVM = Offer("qemu", KVM, KVM.reason, frozenset({"freeze"}))
ON_TCG = Offer("qemu", TCG, TCG.reason, frozenset({"freeze"}))


def asked(world: World) -> list[str]:
    """The drivers of the machines that the host was asked for, in order."""
    return [one.shape.driver for one in world.host.asked if isinstance(one, EnsureMachine)]


def stop(world: World, room: Any) -> None:
    """What a host says that has lost the machine and kept the disk."""
    world.host.machines.pop(room.instance.id)


async def make_room(world: World, name: str, **fields: Any) -> Any:
    profile = await profiles.create(world.control, world.me, {"name": name, "image": "base", **fields})
    return await rooms.get_or_create(world.control, world.me, profile.profile.id, "r")


async def test_auto_takes_a_vm_where_hardware_runs_it(still_world: World) -> None:
    still_world.host.offers = [ON_GVISOR, ON_KVM]
    async with still_world.running() as control:
        still_world.control = control
        room = await make_room(still_world, "any")
        assert dataclasses.astuple(room.instance.isolation) == dataclasses.astuple(KVM)
        assert (await make_room(still_world, "named", driver="gvisor")).instance.isolation == GVISOR
        vm = await session_vm.create(control, still_world.me, VmRequest(min_isolation="microvm"))
        assert vm.instance.isolation == KVM
        assert asked(still_world) == ["qemu", "gvisor", "qemu"]
        # The row says so too, with the accelerator.
        await control.later.flush(control)
    async with still_world.running() as control:
        still_world.control = control
        found = await rooms.list_all(control, still_world.me)
        assert [view.instance.isolation.accelerator for view in found] == ["kvm", None]


async def test_tcg_is_taken_by_name_alone_and_only_where_it_may_count(still_world: World) -> None:
    still_world.host.offers = [ON_GVISOR, ON_TCG]
    async with still_world.running() as control:
        still_world.control = control
        assert (await make_room(still_world, "auto")).instance.isolation == GVISOR
        for wish in (VmRequest(driver="qemu"), VmRequest(driver="qemu", min_isolation="none")):
            with pytest.raises(
                DriverNotOfferedError, match=r"^min_isolation: .*qemu \(none, on tcg, only by its name\)"
            ):
                await session_vm.create(control, still_world.me, wish)
    async with still_world.running(tcg_counts_as_microvm=True) as control:
        still_world.control = control
        vm = await session_vm.create(control, still_world.me, VmRequest(driver="qemu", min_isolation="microvm"))
        assert (vm.instance.isolation.level, vm.instance.isolation.accelerator) == ("microvm", "tcg")
        assert "TCG" in vm.instance.isolation.reason
        with pytest.raises(DriverNotOfferedError):
            await session_vm.create(control, still_world.me, VmRequest(min_isolation="microvm"))
    async with still_world.running(min_isolation="none") as control:
        still_world.control = control
        vm = await session_vm.create(control, still_world.me, VmRequest(driver="qemu", min_isolation="none"))
        assert vm.instance.isolation.level == "none"
        with pytest.raises(DriverNotOfferedError, match="'gvisor' now with the driver 'qemu'"):
            await session_vm.create(control, still_world.me, VmRequest(driver="qemu"))


async def test_what_nobody_offers_is_refused_and_leaves_nothing(world: World) -> None:
    for fields in ({"driver": "qemu"}, {"min_isolation": "microvm"}):
        with pytest.raises(
            DriverNotOfferedError, match=rf"^{next(iter(fields))}: .*; offered: gvisor \(gvisor, on systrap\)$"
        ):
            await profiles.create(world.control, world.me, {"name": "x", "image": "base", **fields})
        with pytest.raises(DriverNotOfferedError):
            await session_vm.create(world.control, world.me, VmRequest(**fields))
    with pytest.raises(InvalidRequestError, match=r"^min_isolation: "):
        await session_vm.create(world.control, world.me, VmRequest(driver="gvisor", min_isolation="microvm"))
    assert "x" not in {stored.profile.name for stored in world.control.profiles.values()}
    assert (list(world.control.live), world.host.count(EnsureMachine)) == ([], 0)
    assert await world.control.database.read(lambda c: c.exec_driver_sql("select count(*) from sessions").scalar()) == 0


async def test_the_servers_minimum_is_everyones(still_world: World) -> None:
    async with still_world.running(min_isolation="microvm") as control:
        still_world.control = control
        with pytest.raises(DriverNotOfferedError, match="'microvm', which is this server's minimum, now"):
            await rooms.get_or_create(control, still_world.me, still_world.profile_id(), "r")
        with pytest.raises(InvalidRequestError, match="allows nothing below 'microvm'"):
            await session_vm.create(control, still_world.me, VmRequest(driver="gvisor"))
        assert still_world.host.count(EnsureMachine) == 0
        assert all(pool.pools == () for pool in still_world.host.pools)


async def test_the_servers_driver_is_what_auto_means(still_world: World) -> None:
    still_world.host.offers = [ON_GVISOR, ON_KVM]
    async with still_world.running(driver="gvisor") as control:
        still_world.control = control
        assert (await make_room(still_world, "auto")).instance.isolation == GVISOR
        assert (await make_room(still_world, "named", driver="qemu")).instance.isolation == KVM
        with pytest.raises(InvalidRequestError, match=r"^min_isolation: .*server's default driver"):
            await session_vm.create(control, still_world.me, VmRequest(min_isolation="microvm"))


async def test_an_instance_is_never_started_again_on_less(still_world: World) -> None:
    still_world.host.offers = [ON_GVISOR, ON_KVM]
    async with still_world.running() as control:
        still_world.control = control
        room = await make_room(still_world, "any")
        await control.later.flush(control)
    stop(still_world, room)
    for offers, settings in (([ON_GVISOR], {}), ([ON_GVISOR, ON_TCG], {"min_isolation": "none"})):
        still_world.host.offers = offers
        async with still_world.running(**settings) as control:
            still_world.control = control
            with pytest.raises(DriverNotOfferedError, match="ran as 'microvm' on qemu, and is not started on less"):
                await rooms.get_or_create(control, still_world.me, room.profile.id, "r")
            found = await rooms.find(control, still_world.me, room.profile.id, "r")
            # It waits for a host that can, as it is.
            assert (found.instance.state, found.instance.isolation) == (InstanceState.STOPPED, KVM)
    still_world.host.offers = [ON_GVISOR, ON_KVM]
    async with still_world.running() as control:
        still_world.control = control
        again = await rooms.get_or_create(control, still_world.me, room.profile.id, "r")
        assert (again.instance.id, again.instance.isolation) == (room.instance.id, KVM)
    assert asked(still_world) == ["qemu", "qemu"]


async def test_an_instance_keeps_its_driver_where_a_stronger_one_has_come(still_world: World) -> None:
    async with still_world.running() as control:
        still_world.control = control
        room = await make_room(still_world, "any")
        await control.later.flush(control)
    stop(still_world, room)
    still_world.host.offers = [ON_GVISOR, ON_KVM]
    async with still_world.running() as control:
        still_world.control = control
        again = await rooms.get_or_create(control, still_world.me, room.profile.id, "r")
        assert again.instance.isolation == GVISOR
        await control.later.flush(control)
    stop(still_world, room)
    # Until more is asked for than that gives.
    async with still_world.running(min_isolation="microvm") as control:
        still_world.control = control
        again = await rooms.get_or_create(control, still_world.me, room.profile.id, "r")
        assert again.instance.isolation == KVM


async def test_pools_are_of_the_driver_that_their_rooms_get(still_world: World) -> None:
    still_world.host.offers = [ON_GVISOR, ON_KVM]
    async with still_world.running() as control:
        still_world.control = control
        profile = await profiles.create(
            control, still_world.me, {"name": "plain", "image": "base", "driver": "gvisor", "warm_pool_size": 1}
        )
        (host,) = control.hosts
        drivers = [pool.shape.driver for pool in warm_pools.desired(control, host)]
        assert sorted(drivers) == ["gvisor", "qemu", "qemu", "qemu"]
        room = await rooms.get_or_create(control, still_world.me, profile.profile.id, "r")
        ensured = next(one for one in still_world.host.asked if isinstance(one, EnsureMachine))
        assert room.instance.isolation == GVISOR
        assert ensured.shape.pool_key in {pool.shape.pool_key for pool in warm_pools.desired(control, host)}
        # Guests of a VM in software are never taken for those of one with KVM.
        software = dataclasses.replace(host, offers=(ON_TCG,))
        still_world.control.settings = still_world.settings.model_copy(
            update={"tcg_counts_as_microvm": True, "driver": "qemu"}
        )
        keys = [{pool.shape.pool_key for pool in warm_pools.desired(control, one)} for one in (host, software)]
        assert keys[1] and not keys[0] & keys[1]


async def test_a_sessions_vm_is_asked_for_as_it_is(still_world: World) -> None:
    still_world.host.offers = [ON_GVISOR, ON_KVM]
    async with still_world.running() as control:
        still_world.control = control
        made = await session_vm.create(control, still_world.me, VmRequest(driver="gvisor"))
        (entry,) = control.live
        session = await control.database.read(_session, made.vm.session_id)
        for wish, field in (
            (VmRequest(driver="qemu"), "driver"),
            (VmRequest(min_isolation="microvm", driver="auto"), "min_isolation"),
        ):
            # What the session was made with counts beside it.
            with pytest.raises((ConflictError, InvalidRequestError), match=f"^{field}: "):
                await session_vm.create(control, still_world.me, wish, session=session)
        for same in (VmRequest(driver="gvisor"), VmRequest(driver="auto"), VmRequest(min_isolation="none")):
            assert (
                await session_vm.create(control, still_world.me, same, session=session)
            ).instance.id == entry.instance.id


async def test_a_sessions_vm_that_has_more_than_it_asked_for_serves_who_asks_for_that(still_world: World) -> None:
    still_world.host.offers = [ON_GVISOR, ON_KVM]
    async with still_world.running() as control:
        still_world.control = control
        made = await session_vm.create(control, still_world.me, VmRequest(min_isolation="none"))
        assert (made.vm.wish.min_isolation, made.instance.isolation) == ("none", KVM)
        session = await control.database.read(_session, made.vm.session_id)
        for wish in (VmRequest(min_isolation="microvm"), VmRequest(driver="qemu")):
            again = await session_vm.create(control, still_world.me, wish, session=session)
            assert again.instance.id == made.instance.id


def _session(connection: Any, session_id: Any) -> Any:
    from innkeeper.store import sessions

    return sessions.get(connection, session_id)


async def test_what_a_vm_asked_for_counts_at_its_next_start(still_world: World) -> None:
    still_world.host.offers = [ON_GVISOR, ON_KVM]
    async with still_world.running() as control:
        still_world.control = control
        made = await session_vm.create(control, still_world.me, VmRequest(driver="gvisor", vm_lifetime_seconds=3_600))
        await control.later.flush(control)
    stop(still_world, made)
    async with still_world.running(driver="qemu") as control:
        still_world.control = control
        again = await vms.ready_entry(control, still_world.me, made.vm.vm_id)
        assert (again.vm.wish.driver, again.instance.isolation) == ("gvisor", GVISOR)


async def test_a_host_is_shown_with_all_its_drivers(still_world: World) -> None:
    still_world.host.offers = [ON_GVISOR, ON_TCG, Offer("firecracker", None, "no /dev/kvm")]
    async with still_world.running() as control:
        still_world.control = control
        (view,) = await hosts.list_hosts(control, still_world.operator)
        assert view.default is not None
        assert view.default.driver == "gvisor"
        levels = [None if one.isolation is None else one.isolation.level for one in view.offers]
        assert levels == ["gvisor", "none", None]


async def test_guests_of_builds_have_disks_that_the_host_may_read(still_world: World) -> None:
    still_world.host.offers = [ON_KVM, ON_GVISOR]
    async with still_world.running(driver="qemu") as control:
        host, offer = placement.choose_for_build(control)
        assert (host.host.id, offer) == (still_world.host.id, ON_GVISOR)
    async with still_world.running(min_isolation="microvm") as control:
        with pytest.raises(DriverNotOfferedError, match="from a driver whose guests' disks the host may read"):
            placement.choose_for_build(control)


async def test_of_several_hosts_one_is_taken_that_isolates_as_is_asked(
    still_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    still_world.host.offers = [ON_GVISOR]
    async with still_world.running() as control:
        (plain,) = control.hosts
        strong = HostEntry(dataclasses.replace(plain.host, id=uuid4()), (ON_GVISOR, ON_KVM), plain.agent_version)
        control.hosts.put(strong)
        with monkeypatch.context() as patched:
            patched.setattr(control.bus, "hosts", lambda: [plain.host.id, strong.host.id])
            # Whichever of them is used less.
            for busy in (plain, strong):
                patched.setattr(control, "live", [used(busy.host.id)])
                spec = spec_with(control, still_world, "microvm")
                assert placement.choose(control, spec, host_id=None).host.id == strong.host.id
                with pytest.raises(DriverNotOfferedError):
                    placement.choose(control, spec, host_id=plain.host.id)
            usual = spec_with(control, still_world, "gvisor")
            assert placement.choose(control, usual, host_id=None).host.id == plain.host.id


def spec_with(control: Any, world: World, min_isolation: str) -> Any:
    """The spec of a room whose profile asks for that."""
    world.control = control
    profile = control.profiles[world.profile_id()].profile
    return spec_of_profile(dataclasses.replace(profile, min_isolation=min_isolation))


def used(host_id: Any) -> Any:
    """What the table of living instances has of one on that host."""
    return SimpleNamespace(instance=SimpleNamespace(host_id=host_id))


async def test_guests_that_read_a_volumes_files_are_no_less_than_the_server_allows(still_world: World) -> None:
    still_world.host.offers = [ON_GVISOR, ON_TCG]
    async with still_world.running() as control:
        (host,) = control.hosts
        assert placement.offer_for_files(control, host, guest_written=False) == ON_GVISOR
        # Software is no boundary, and what a virtual machine has written no other driver reads.
        with pytest.raises(DriverNotOfferedError, match="A virtual machine has written the volume"):
            placement.offer_for_files(control, host, guest_written=True)
    async with still_world.running(tcg_counts_as_microvm=True, min_isolation="microvm") as control:
        (host,) = control.hosts
        assert placement.offer_for_files(control, host, guest_written=True) == ON_TCG
        with pytest.raises(DriverNotOfferedError, match="'microvm', which is this server's minimum"):
            placement.offer_for_files(control, host, guest_written=False)
    still_world.host.offers = [ON_KVM]
    async with still_world.running(min_isolation="microvm") as control:
        (host,) = control.hosts
        # It leaves the volume to virtual machines, which are all that there is.
        for guest_written in (False, True):
            assert placement.offer_for_files(control, host, guest_written=guest_written) == ON_KVM
