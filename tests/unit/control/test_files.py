"""Files: read, stat, write, list, and the public ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest

from innkeeper.control import files, guest_calls, profiles, rooms
from innkeeper.control.reconciler import adopt
from innkeeper.control.room_entry import RoomEntry
from innkeeper.core.host_verbs import EnsureMachine, ReadFile
from innkeeper.errors import (
    FileMissingError,
    InstanceFailedError,
    InstanceNotFoundError,
    InvalidRequestError,
    PayloadTooLargeError,
    UnavailableError,
)

pytestmark = pytest.mark.anyio
World = Any


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


async def entry(world: World) -> RoomEntry:
    return await rooms.existing_entry(world.control, world.me, world.profile_id(), "r")


async def read(world: World, path: bytes, **options: Any) -> bytes:
    async with files.read(world.control, world.me, await entry(world), path, **options) as reader:
        return b"".join([piece async for piece in reader.chunks])


@pytest.fixture
async def room(world: World) -> rooms.RoomView:
    view: rooms.RoomView = await rooms.get_or_create(world.control, world.me, world.profile_id(), "r")
    return view


async def test_write_read_stat_list(world: World, room: rooms.RoomView) -> None:
    args = (world.control, world.me, await entry(world))
    written = await files.write(*args, b"/tmp/a", pieces(b"one ", b"", b"two"))
    assert (written.size, written.created) == (7, True)
    assert await read(world, b"/tmp/a") == b"one two"
    assert await read(world, b"/tmp/a", offset=4, length=2) == b"tw"
    assert (await files.stat(*args, b"/tmp/a")).size == 7
    assert [entry.name for entry in (await files.list_directory(*args, b"/tmp")).entries] == ["a"]
    with pytest.raises(FileMissingError):
        await read(world, b"/tmp/b")


async def test_a_path_that_is_not_utf8(world: World, room: rooms.RoomView) -> None:
    await files.write(world.control, world.me, await entry(world), b"/tmp/\xff", pieces(b"x"))
    assert await read(world, b"/tmp/\xff") == b"x"


async def test_too_large_an_upload_leaves_nothing(world: World, room: rooms.RoomView) -> None:
    args = (world.control, world.me, await entry(world), b"/tmp/a")
    with pytest.raises(PayloadTooLargeError):
        await files.write(*args, pieces(b"x" * 10, b"y" * 10), max_bytes=15)
    with pytest.raises(FileMissingError):
        await read(world, b"/tmp/a")


@pytest.mark.parametrize("path", [b"", b"tmp/a", b"/a\0b", b"/" + b"x" * 4_096])
async def test_bad_paths(world: World, room: rooms.RoomView, path: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        await read(world, path)


async def test_files_make_no_room(world: World) -> None:
    with pytest.raises(InstanceNotFoundError):
        await rooms.existing_entry(world.control, world.me, world.profile_id(), "never")
    assert world.host.count(EnsureMachine) == 0


async def test_files_of_a_room_that_was_destroyed_meanwhile(world: World, room: rooms.RoomView) -> None:
    found = await entry(world)
    await rooms.destroy(world.control, world.me, world.profile_id(), "r")
    with pytest.raises(InstanceNotFoundError):
        await files.stat(world.control, world.me, found, b"/tmp/a")
    assert world.host.count(EnsureMachine) == 1


async def test_a_sleeping_room_wakes(world: World, room: rooms.RoomView) -> None:
    world.host.files[room.instance.id, "/tmp/a"] = b"kept"
    world.host.machines.clear()
    assert await read(world, b"/tmp/a") == b"kept"
    world.host.machines.clear()
    await adopt(world.control, world.host.id)
    assert await read(world, b"/tmp/a") == b"kept"
    world.host.machines.clear()
    assert (await files.stat(world.control, world.me, await entry(world), b"/tmp/a")).size == 4
    assert world.host.count(EnsureMachine) == 4


async def test_a_failed_room_says_so(world: World, room: rooms.RoomView) -> None:
    world.host.publish({"type": "machine.failed", "instance_id": str(room.instance.id), "failure": "broke"})
    failed = world.control.live.by_instance(room.instance.id)
    await world.until(lambda: not failed.ready)
    with pytest.raises(InstanceFailedError, match="broke"):
        await read(world, b"/tmp/a")


async def public(world: World, public_id: Any, path: bytes = b"/tmp/a") -> bytes:
    async with files.read_public(world.control, public_id, path) as reader:
        return b"".join([piece async for piece in reader.chunks])


async def test_public_files(world: World, room: rooms.RoomView) -> None:
    world.host.files[room.instance.id, "/tmp/a"] = b"chart"
    assert await public(world, room.instance.public_id) == b"chart"
    assert next(r for r in world.host.asked if isinstance(r, ReadFile)).public == "reported"
    for unknown in (uuid4(), room.instance.id, world.profile_id()):
        with pytest.raises(FileMissingError):
            await public(world, unknown)
    await profiles.update(world.control, world.me, world.profile_id(), {"public_files": "all"})
    await public(world, room.instance.public_id)
    assert [r for r in world.host.asked if isinstance(r, ReadFile)][-1].public == "all"
    await profiles.update(world.control, world.me, world.profile_id(), {"public_files": "off"})
    with pytest.raises(FileMissingError):
        await public(world, room.instance.public_id)


async def test_public_files_end_with_the_room(world: World, room: rooms.RoomView) -> None:
    world.host.files[room.instance.id, "/tmp/a"] = b"chart"
    await rooms.destroy(world.control, world.me, world.profile_id(), "r")
    with pytest.raises(FileMissingError):
        await public(world, room.instance.public_id)


async def test_a_guest_that_takes_no_more_of_a_file_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_calls, "STALL_SECONDS", 0.05)

    class Full:
        async def send_data(self, data: bytes) -> None:
            await asyncio.Event().wait()

    async def chunks() -> AsyncIterator[bytes]:
        yield b"x"

    with pytest.raises(UnavailableError, match="takes no more"):
        await asyncio.wait_for(guest_calls._send(Full(), chunks(), None), 5)
