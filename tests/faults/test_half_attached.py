"""A fault, or the daemon's death, at any step of attaching or detaching a volume: it is attached or it is not, and nothing that was written is lost."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests.faults.faulty_host import InjectedError, nothing_but
from tests.guest_drivers import GVISOR, QEMU, missing
from tests.integration.daemon_fixture import (
    NEEDS_RUNSC,
    REPOSITORY,
    START_SECONDS,
    Host,
    built_agent,
    eventually,
    running_host,
)
from tests.integration.test_volumes import described, file_of, let_go, new

from innkeeper.core import volume_verbs as verbs
from innkeeper.errors import InnkeeperError
from innkeeper.host import volumes
from innkeeper.host.drivers.gvisor import GvisorDriver
from innkeeper.host.drivers.qemu import QemuDriver
from innkeeper.host.linux import loop_device
from innkeeper.host.volume_attachment import Attachment

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]

# A guest whose instructions are translated is asked for half a minute at most, and then once more.
SETTLE_SECONDS = 90.0

# Functions that are called on the way, after each of which something may go wrong, and on which way.
ATTACHING = ((Attachment, "save"), (GvisorDriver, "attach"), (volumes, "_show"))
DETACHING = (
    (volumes, "_hide"),
    (Attachment, "save"),
    (GvisorDriver, "detach"),
    (volumes, "_has_let_go"),
    (Attachment, "forget"),
)


def quick(steps: tuple[tuple[object, str], ...], one: str) -> list[Any]:
    """The steps as parameters, of which all but one are for long runs."""
    return [pytest.param(place, name, id=name, marks=[] if name == one else pytest.mark.long) for place, name in steps]


@pytest.fixture(scope="module")
async def instance(host: Host) -> AsyncIterator[UUID]:
    instance = await host.ensure()
    yield instance
    await host.destroy(instance)
    await nothing_but(host)


@pytest.fixture
async def volume(host: Host) -> AsyncIterator[UUID]:
    made = await new(host)
    yield made
    await let_go(host, made)
    await host.request(verbs.RemoveVolume(made))


def fail_after(monkeypatch: pytest.MonkeyPatch, place: object, name: str) -> None:
    """Have the function do its work once, and fail then."""
    original = getattr(place, name)

    def once(*args: object, **more: object) -> object:
        monkeypatch.setattr(place, name, original)
        done = original(*args, **more)
        if not asyncio.iscoroutine(done):
            raise InjectedError

        async def awaited() -> None:
            await done
            raise InjectedError

        return awaited()

    monkeypatch.setattr(place, name, once)


@pytest.mark.parametrize(("place", "name"), quick(ATTACHING, "_show"))
async def test_what_fails_while_attaching_leaves_nothing_attached(
    host: Host, instance: UUID, volume: UUID, monkeypatch: pytest.MonkeyPatch, place: object, name: str
) -> None:
    fail_after(monkeypatch, place, name)
    with pytest.raises((InnkeeperError, InjectedError)):
        await host.request(verbs.AttachVolume(instance, volume, "/data"))
    if name == "save":
        # Nothing had been done, and nobody knew that it may have been written that it would be.
        await host.request(verbs.AttachVolume(instance, volume, "/data"))
        await host.request(verbs.DetachVolume(instance, volume))
    assert (await described(host, volume))["attached"] == []
    assert loop_device.devices_backed_by(file_of(host, volume)) == {}
    assert (await host.ok(instance, "test ! -e /data && echo gone")).text == "gone\n"


@pytest.mark.parametrize(("place", "name"), quick(DETACHING, "detach"))
async def test_what_fails_while_detaching_can_be_done_again(
    host: Host, instance: UUID, volume: UUID, monkeypatch: pytest.MonkeyPatch, place: object, name: str
) -> None:
    await host.request(verbs.AttachVolume(instance, volume, "/data"))
    await host.ok(instance, "echo kept > /data/file")
    fail_after(monkeypatch, place, name)
    with pytest.raises((InnkeeperError, InjectedError)):
        await host.request(verbs.DetachVolume(instance, volume))
    await host.request(verbs.DetachVolume(instance, volume))
    assert (await described(host, volume))["attached"] == []
    await host.request(verbs.AttachVolume(instance, volume, "/other", read_only=True))
    assert (await host.ok(instance, "cat /other/file")).text == "kept\n"


DIES = """
import asyncio, os, sys
sys.path[:0] = [{repository!r}, {repository!r} + "/tests/integration"]
from pathlib import Path
from uuid import UUID
from tests.integration.daemon_fixture import running_host
from innkeeper.core import volume_verbs as verbs
from innkeeper.host import volumes
from innkeeper.host.disks import volume_store
from innkeeper.host.disks.volume_store import VolumeStore
from innkeeper.host.drivers import gvisor_volumes
from innkeeper.host.drivers.gvisor import GvisorDriver
from innkeeper.host.drivers.qemu import QemuDriver
from innkeeper.host.drivers.qmp import Qmp
from innkeeper.host.volume_attachment import Attachment

INSTANCE, VOLUME = UUID({instance!r}), UUID({volume!r})
DRIVER, WHEN, PLACE, NAME = {step!r}

def die_after(place, name):
    name, _, word = name.partition(" ")
    original = getattr(place, name)
    def last(*args, **more):
        done = original(*args, **more)
        if word and word not in args:
            return done
        if not asyncio.iscoroutine(done):
            os._exit(9)
        async def awaited():
            await done
            os._exit(9)
        return awaited()
    setattr(place, name, last)

async def main():
    async with running_host(Path({home!r}), agent=Path({agent!r}), keep_running=True) as host:
        place = eval(PLACE)
        await host.ensure(INSTANCE, shape=host.shape(driver=DRIVER, memory_mb=256, disk_mb=1024))
        if WHEN == "making":
            die_after(place, NAME)
        await host.request(verbs.CreateVolume(VOLUME, 64))
        if WHEN == "attaching":
            die_after(place, NAME)
        await host.request(verbs.AttachVolume(INSTANCE, VOLUME, "/data"))
        await host.ok(INSTANCE, "echo kept > /data/file; sync")
        if WHEN == "growing":
            await host.request(verbs.DetachVolume(INSTANCE, VOLUME))
            die_after(place, NAME)
            await host.request(verbs.GrowVolume(VOLUME, 128))
        die_after(place, NAME)
        await host.request(verbs.DetachVolume(INSTANCE, VOLUME))

asyncio.run(main())
"""
# The driver, on which way, and after what; of QEMU's control socket, after which command.
STEPS = (
    (GVISOR, "detaching", "GvisorDriver", "detach"),
    (GVISOR, "attaching", "GvisorDriver", "attach"),
    (GVISOR, "making", "volume_store.command", "run"),
    (GVISOR, "making", "volume_store", "_sync"),
    (GVISOR, "attaching", "Attachment", "save"),
    (GVISOR, "attaching", "gvisor_volumes", "_mount"),
    (GVISOR, "attaching", "volumes", "_show"),
    (GVISOR, "detaching", "volumes", "_hide"),
    (GVISOR, "detaching", "gvisor_volumes", "_take_away"),
    (GVISOR, "detaching", "volumes", "_has_let_go"),
    (GVISOR, "detaching", "Attachment", "forget"),
    (GVISOR, "growing", "volume_store", "_enlarge"),
    (GVISOR, "growing", "volume_store", "_sync"),
    (QEMU, "detaching", "Qmp", "execute device_del"),
    (QEMU, "attaching", "Attachment", "save"),
    (QEMU, "attaching", "Qmp", "execute add-fd"),
    (QEMU, "attaching", "Qmp", "execute blockdev-add"),
    (QEMU, "attaching", "Qmp", "execute device_add"),
    (QEMU, "attaching", "volumes", "_show"),
    (QEMU, "detaching", "volumes", "_hide"),
    (QEMU, "detaching", "Qmp", "execute blockdev-del"),
    (QEMU, "detaching", "QemuDriver", "detach"),
    (QEMU, "detaching", "VolumeStore", "renew"),
    (QEMU, "detaching", "Attachment", "forget"),
)
QUICK = (STEPS[0], STEPS[13])


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(step, id=f"{'-'.join(step[0:2])}-{step[3]}", marks=[] if step in QUICK else pytest.mark.long)
        for step in STEPS
    ],
)
async def test_a_daemon_that_dies_at_a_step_leaves_a_volume_that_is_whole_and_can_be_had(
    homes: Callable[[str], Path], step: tuple[str, str, str, str]
) -> None:
    driver, way, *_ = step
    if (why := missing(driver)) is not None:
        pytest.skip(why)
    home, instance, volume = homes(driver), uuid4(), uuid4()
    program = DIES.format(
        repository=str(REPOSITORY),
        home=str(home),
        agent=str(built_agent()),
        step=step,
        instance=str(instance),
        volume=str(volume),
    )
    died = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True, timeout=START_SECONDS
    )
    assert died.returncode == 9, died.stderr[-3000:]
    async with running_host(home) as host:
        assert host.daemon.recovered.adopted == 1
        # Made again, it is the one that was made, or is made now.
        await host.request(verbs.CreateVolume(volume, 64 if way != "growing" else size_of(host, volume)))

        async def settled() -> bool:
            return all(one["ready"] for one in (await described(host, volume))["attached"])

        await eventually(settled, seconds=SETTLE_SECONDS)
        assert len((await described(host, volume))["attached"]) <= 1
        await let_go(host, volume)
        assert loop_device.devices_backed_by(file_of(host, volume)) == {}
        assert await plugged_in(host, instance) == []
        await host.request(verbs.AttachVolume(instance, volume, "/data"))
        if way in ("detaching", "growing"):
            assert (await host.ok(instance, "cat /data/file")).text == "kept\n"
        await host.ok(instance, "echo more > /data/more")
        await host.destroy(instance)
        await host.request(verbs.RemoveVolume(volume))
        await nothing_but(host)
        assert list((host.settings.host_dir / "pool" / "volumes").iterdir()) == []


async def plugged_in(host: Host, instance: UUID) -> list[Any]:
    """What QEMU still has of volumes: disks, files behind them, and descriptors."""
    driver = host.machine(instance).driver
    if not isinstance(driver, QemuDriver):
        return []
    async with driver._control(host.machine(instance).id) as session:
        disks = await session.execute("qom-list", {"path": "/machine/peripheral"})
        nodes = await session.execute("query-named-block-nodes", {"flat": True})
        return [
            *(one["name"] for one in disks if one["name"].startswith("volume-")),
            *(one["node-name"] for one in nodes if one["node-name"].startswith("volume-")),
            # Those of its own disks have no name.
            *(one for one in await session.execute("query-fdsets") if any(fd.get("opaque") for fd in one["fds"])),
        ]


def size_of(host: Host, volume: UUID) -> int:
    return file_of(host, volume).stat().st_size >> 20
