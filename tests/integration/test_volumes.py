"""Volumes of a real daemon: made, grown, attached to guests that run, shared by readers, and never lost."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, eventually, running_host

from innkeeper.core import checkpoint_verbs
from innkeeper.core import volume_verbs as verbs
from innkeeper.core.host_verbs import DestroyMachine
from innkeeper.errors import (
    CheckpointFailedError,
    ConflictError,
    GuestWrittenError,
    InstanceNotFoundError,
    InvalidRequestError,
    VolumeInUseError,
    VolumeNotFoundError,
)
from innkeeper.host.linux import guest_written, loop_device

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]


@pytest.fixture
async def volume(host: Host) -> AsyncIterator[UUID]:
    made = await new(host)
    yield made
    await let_go(host, made)
    await host.request(verbs.RemoveVolume(made))


@pytest.fixture(scope="module")
async def first(host: Host) -> UUID:
    return await host.ensure()


@pytest.fixture(scope="module")
async def second(host: Host) -> UUID:
    return await host.ensure()


async def new(host: Host, size_mb: int = 64, **more: Any) -> UUID:
    volume = uuid4()
    await host.request(verbs.CreateVolume(volume, size_mb, **more))
    return volume


async def let_go(host: Host, volume: UUID) -> None:
    """Have nobody have it."""
    for holder in (await described(host, volume))["attached"]:
        await host.request(verbs.DetachVolume(UUID(holder["instance_id"]), volume))


async def described(host: Host, volume: UUID) -> dict[str, Any]:
    found = (await host.request(verbs.ListVolumes()))["volumes"]
    return next(one for one in found if one["volume_id"] == str(volume))


def file_of(host: Host, volume: UUID) -> Path:
    return host.settings.host_dir / "pool" / "volumes" / f"{volume}.img"


async def test_a_volume_goes_from_one_guest_to_another_with_what_is_on_it(
    host: Host, first: UUID, second: UUID, volume: UUID
) -> None:
    await host.request(verbs.AttachVolume(first, volume, "/data"))
    await host.request(verbs.AttachVolume(first, volume, "/data"))
    # It is the user's, not root's.
    assert (await host.ok(first, "echo kept > /data/file; df --output=size /data | tail -1")).text.strip() != ""
    with pytest.raises(VolumeInUseError, match=str(first)):
        await host.request(verbs.AttachVolume(second, volume, "/data"))
    for verb in (verbs.RemoveVolume(volume), verbs.GrowVolume(volume, 128)):
        with pytest.raises(VolumeInUseError, match=str(first)):
            await host.request(verb)
    # A copy of it is whole: its writers wait meanwhile.
    kept = verbs.CreateVolume(uuid4(), 64, volume, immutable=True)
    await host.request(kept)
    await host.request(verbs.AttachVolume(second, kept.volume_id, "/kept", read_only=True))
    assert (await host.ok(second, "cat /kept/file")).text == "kept\n"
    await host.ok(first, "echo later > /data/file2")
    await host.request(verbs.DetachVolume(second, kept.volume_id))
    await host.request(verbs.RemoveVolume(kept.volume_id))
    with pytest.raises(VolumeInUseError, match="has the volume at /data"):
        await host.request(verbs.AttachVolume(first, volume, "/other"))
    assert (await described(host, volume))["attached"] == [
        {"instance_id": str(first), "path": "/data", "read_only": False, "ready": True}
    ]
    for _ in range(2):
        await host.request(verbs.DetachVolume(first, volume))
    assert loop_device.devices_backed_by(file_of(host, volume)) == {}
    await host.request(verbs.AttachVolume(second, volume, "/srv/data"))
    assert (await host.ok(second, "cat /srv/data/file")).text == "kept\n"


async def test_many_may_read_it_while_nobody_writes_it(host: Host, first: UUID, second: UUID, volume: UUID) -> None:
    await host.request(verbs.AttachVolume(first, volume, "/data"))
    await host.ok(first, "echo kept > /data/file")
    await host.request(verbs.DetachVolume(first, volume))
    for instance in (first, second):
        await host.request(verbs.AttachVolume(instance, volume, "/data", read_only=True))
    for instance in (first, second):
        assert (await host.run(instance, "cat /data/file; echo x > /data/file")).exit_code != 0
        assert (await host.ok(instance, "cat /data/file")).text == "kept\n"
    third = await host.ensure()
    with pytest.raises(VolumeInUseError):
        await host.request(verbs.AttachVolume(third, volume, "/data"))
    await host.request(verbs.DetachVolume(first, volume))
    assert (await host.ok(second, "cat /data/file")).text == "kept\n"
    await host.destroy(third)


async def test_what_its_guest_uses_stays_and_who_uses_it_is_said(host: Host, first: UUID, volume: UUID) -> None:
    await host.request(verbs.AttachVolume(first, volume, "/data"))
    await host.ok(first, "(exec sleep 1000 > /data/open) 2> /dev/null & until pgrep -x sleep; do sleep 0.1; done")
    with pytest.raises(VolumeInUseError, match=r"sleep \(\d+\)"):
        await host.request(verbs.DetachVolume(first, volume))
    assert (await described(host, volume))["attached"][0]["ready"] is True
    await host.ok(first, "echo still > /data/file; pkill -x sleep; while pgrep -x sleep; do sleep 0.1; done")


async def test_a_guest_that_lies_keeps_it_and_nobody_else_gets_it(
    host: Host, first: UUID, second: UUID, volume: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    await host.request(verbs.AttachVolume(first, volume, "/data"))
    await host.ok(first, "(exec sleep 1000 > /data/open) 2> /dev/null & until pgrep -x sleep; do sleep 0.1; done")
    endpoint = host.machine(first).endpoint
    honest = endpoint.request

    async def lie(verb: str, params: dict[str, Any], *, timeout_seconds: float) -> dict[str, Any]:
        return {} if verb == "unmount_volume" else await honest(verb, params, timeout_seconds=timeout_seconds)

    monkeypatch.setattr("innkeeper.host.volumes.LET_GO_SECONDS", 0.5)
    with monkeypatch.context() as lying:
        lying.setattr(endpoint, "request", lie)
        with pytest.raises(VolumeInUseError, match="has the volume in use"):
            await host.request(verbs.DetachVolume(first, volume))
    with pytest.raises(VolumeInUseError, match=str(first)):
        await host.request(verbs.AttachVolume(second, volume, "/data"))
    assert (await host.ok(first, "echo same > /data/file; cat /data/file")).text == "same\n"
    await host.ok(first, "pkill -x sleep; while pgrep -x sleep; do sleep 0.1; done")


async def test_it_grows_with_what_is_on_it(host: Host, first: UUID, volume: UUID) -> None:
    await host.request(verbs.AttachVolume(first, volume, "/data"))
    await host.ok(first, "echo kept > /data/file")
    await host.request(verbs.DetachVolume(first, volume))
    for _ in range(2):
        assert (await host.request(verbs.GrowVolume(volume, 256)))["size_mb"] == 256
    with pytest.raises(InvalidRequestError, match="256"):
        await host.request(verbs.GrowVolume(volume, 128))
    await host.request(verbs.AttachVolume(first, volume, "/data"))
    assert (
        await host.ok(first, "cat /data/file; head -c 150M /dev/zero > /data/large && rm /data/large")
    ).text == "kept\n"


async def test_a_copy_shares_and_one_that_nobody_may_write_stays_as_it_is(
    host: Host, first: UUID, volume: UUID
) -> None:
    await host.request(verbs.AttachVolume(first, volume, "/data"))
    await host.ok(first, "echo kept > /data/file; head -c 20M /dev/urandom > /data/noise")
    await host.request(verbs.DetachVolume(first, volume))
    frozen = await new(host, 64, copy_of=volume, immutable=True)
    larger = await new(host, 128, copy_of=frozen)
    with pytest.raises(ConflictError, match="never be written"):
        await host.request(verbs.AttachVolume(first, frozen, "/data"))
    with pytest.raises(ConflictError, match="never be written"):
        await host.request(verbs.GrowVolume(frozen, 128))
    await host.request(verbs.AttachVolume(first, frozen, "/frozen", read_only=True))
    await host.request(verbs.AttachVolume(first, larger, "/larger"))
    assert (
        await host.ok(first, "cat /frozen/file && echo new > /larger/file && cat /frozen/file")
    ).text == "kept\nkept\n"
    for made in (frozen, larger):
        await let_go(host, made)
        await host.request(verbs.RemoveVolume(made))
        await host.request(verbs.RemoveVolume(made))
    with pytest.raises(VolumeNotFoundError):
        await host.request(verbs.AttachVolume(first, frozen, "/frozen", read_only=True))


async def test_the_same_id_is_the_same_volume(host: Host, volume: UUID) -> None:
    assert (await host.request(verbs.CreateVolume(volume, 64)))["size_mb"] == 64
    with pytest.raises(ConflictError):
        await host.request(verbs.CreateVolume(volume, 128))
    with pytest.raises(InvalidRequestError):
        await host.request(verbs.CreateVolume(volume, 64, copy_of=volume))
    with pytest.raises(InvalidRequestError):
        await host.request(verbs.CreateVolume(uuid4(), 1))


@pytest.mark.parametrize(
    "path", ["/", "data", "/a/../b", "/a//b", "/proc/x", "/.innkeeper", "/a\0b", "/dev", "/" + "x" * 2000]
)
async def test_a_path_that_is_none_is_refused_before_anything_happens(
    host: Host, first: UUID, volume: UUID, path: str
) -> None:
    with pytest.raises(InvalidRequestError, match="path"):
        await host.request(verbs.AttachVolume(first, volume, path))
    assert (await described(host, volume))["attached"] == []


@pytest.mark.parametrize("path", ["/etc", "/home/user/way/x", "/tmp"])
async def test_a_path_that_the_guest_refuses_leaves_nothing_attached(
    host: Host, first: UUID, volume: UUID, path: str
) -> None:
    await host.ok(first, "ln -sfn /etc /home/user/way")
    with pytest.raises((ConflictError, InvalidRequestError)):
        await host.request(verbs.AttachVolume(first, volume, path))
    assert (await described(host, volume))["attached"] == []
    assert loop_device.devices_backed_by(file_of(host, volume)) == {}


async def test_volumes_do_not_lie_in_each_other(host: Host, first: UUID, volume: UUID) -> None:
    await host.request(verbs.AttachVolume(first, volume, "/data"))
    other = await new(host)
    for path in ("/data", "/data/below"):
        with pytest.raises(ConflictError, match="Another volume"):
            await host.request(verbs.AttachVolume(first, other, path))
    await host.request(verbs.RemoveVolume(other))


async def test_what_a_virtual_machine_has_written_is_refused_and_not_touched(
    host: Host, first: UUID, volume: UUID
) -> None:
    with file_of(host, volume).open("rb") as file:
        guest_written.mark(file.fileno())
    before = file_of(host, volume).read_bytes()
    for read_only in (False, True):
        with pytest.raises(GuestWrittenError):
            await host.request(verbs.AttachVolume(first, volume, "/data", read_only=read_only))
    assert (await described(host, volume))["attached"] == []
    copy = await new(host, 64, copy_of=volume)
    assert (await described(host, copy))["guest_written"] is True
    with pytest.raises(GuestWrittenError):
        await host.request(verbs.CreateVolume(uuid4(), 128, copy_of=volume))
    # Only the file grows: what is in it is for the machine that attaches it.
    assert (await host.request(verbs.GrowVolume(volume, 65)))["size_mb"] == 65
    assert file_of(host, volume).read_bytes()[: len(before)] == before
    await host.request(verbs.RemoveVolume(copy))


async def test_an_instance_whose_disk_a_virtual_machine_wrote_starts_on_none_of_the_hosts_mounts(host: Host) -> None:
    instance = await host.ensure()
    name = host.machine(instance).record.disk
    await host.request(DestroyMachine(instance, keep_disk=True))
    disk = host.settings.host_dir / "pool" / "disks" / f"{name}.img"
    await eventually(lambda: not loop_device.devices_backed_by(disk))
    with disk.open("rb") as file:
        guest_written.mark(file.fileno())
    before = disk.stat().st_mtime_ns
    with pytest.raises(GuestWrittenError):
        await host.ensure(instance)
    assert disk.stat().st_mtime_ns == before
    await host.destroy(instance)


async def test_nothing_of_it_is_a_change_of_the_guests_files(host: Host, first: UUID, volume: UUID) -> None:
    await host.ok(first, "true")
    await host.request(verbs.AttachVolume(first, volume, "/data"))
    assert (await host.ok(first, "echo x > /data/file; echo y > /home/user/file")).changed == {
        "/home/user/file": "created"
    }
    await host.request(verbs.DetachVolume(first, volume))
    assert (await host.ok(first, "true")).changed == {}


async def test_memory_is_not_saved_while_there_is_one(host: Host, first: UUID, volume: UUID) -> None:
    await host.request(verbs.AttachVolume(first, volume, "/data"))
    with pytest.raises(CheckpointFailedError, match="detach them first"):
        await host.request(checkpoint_verbs.TakeCheckpoint(first, uuid4()))
    assert (await host.ok(first, "echo here")).text == "here\n"


async def test_the_end_of_an_instance_gives_it_free(host: Host, volume: UUID, second: UUID) -> None:
    instance = await host.ensure()
    await host.request(verbs.AttachVolume(instance, volume, "/data"))
    await host.ok(instance, "echo kept > /data/file; sync; (cd /data; exec sleep 1000) > /dev/null 2>&1 &")
    await host.destroy(instance)
    await host.request(verbs.AttachVolume(second, volume, "/data"))
    assert (await host.ok(second, "cat /data/file")).text == "kept\n"
    with pytest.raises(InstanceNotFoundError):
        await host.request(verbs.AttachVolume(instance, volume, "/data"))
    await host.request(verbs.DetachVolume(instance, volume))


async def test_a_reader_comes_after_a_writer_that_was_killed(host: Host, volume: UUID, second: UUID) -> None:
    instance = await host.ensure()
    await host.request(verbs.AttachVolume(instance, volume, "/data"))
    await host.ok(instance, "echo kept > /data/file; sync")
    # As after a loss of power: with a journal that was not played back.
    copied = file_of(host, volume).read_bytes()
    await host.destroy(instance)
    await eventually(lambda: not loop_device.devices_backed_by(file_of(host, volume)))
    file_of(host, volume).write_bytes(copied)
    await host.request(verbs.AttachVolume(second, volume, "/data", read_only=True))
    assert (await host.ok(second, "cat /data/file")).text == "kept\n"


@pytest.mark.parametrize(
    "half", ["whole", *(pytest.param(half, marks=pytest.mark.long) for half in ("attaching", "detaching"))]
)
async def test_the_next_daemon_knows_who_has_it(tmp_path: Path, half: str) -> None:
    async with running_host(tmp_path, keep_running=True) as host:
        volume, instance = await new(host), await host.ensure()
        await host.request(verbs.AttachVolume(instance, volume, "/data"))
        await host.ok(instance, "echo kept > /data/file")
        folder = host.machine(instance).state_dir / "volumes"
        assert json.loads((folder / f"{volume}.json").read_text())["path"] == "/data"
        if half != "whole":
            (folder / f"{volume}.ready").unlink()
        if half == "detaching":
            machine = host.machine(instance)
            await machine.endpoint.request(
                "unmount_volume", {"volume": volume.hex, "path": "/data"}, timeout_seconds=30
            )
    async with running_host(tmp_path) as host:
        host.instances.add(instance)
        if half == "whole":
            assert [one["ready"] for one in (await described(host, volume))["attached"]] == [True]
            assert (await host.ok(instance, "cat /data/file")).text == "kept\n"
            other = await host.ensure()
            with pytest.raises(VolumeInUseError):
                await host.request(verbs.AttachVolume(other, volume, "/data"))
        else:

            async def free() -> bool:
                return (await described(host, volume))["attached"] == []

            await eventually(free)
            assert loop_device.devices_backed_by(file_of(host, volume)) == {}
            await host.request(verbs.AttachVolume(instance, volume, "/data"))
            assert (await host.ok(instance, "cat /data/file")).text == "kept\n"
        assert (await host.status())["leaked"] == 0
