"""Profiles: limits, secrets, changes, and what is refused because nothing could honour it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa

from innkeeper.control import profiles, rooms, secrets
from innkeeper.control.secrets import SealedError, SecretBox, load_box
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import ConflictError, ForbiddenError, InvalidRequestError, ProfileNotFoundError
from innkeeper.settings import Settings
from innkeeper.store import tables

pytestmark = pytest.mark.anyio
World = Any
SECRET = "s3cr3t-value"


async def test_create_get_list_delete(world: World) -> None:
    made = await profiles.create(world.control, world.me, {"name": "mine", "image": "base", "vcpu_count": 1})
    assert (made.profile.vcpu_count, made.profile.memory_mb, made.profile.warm_pool_size) == (1, 1024, 2)
    assert await profiles.get(world.control, world.me, made.profile.id) == made
    listed = await profiles.list_profiles(world.control, world.me)
    assert [view.profile.name for view in listed] == ["base", "python-data-science", "node", "mine"]
    await profiles.delete(world.control, world.me, made.profile.id)
    with pytest.raises(ProfileNotFoundError):
        await profiles.get(world.control, world.me, made.profile.id)


def open_env(world: World, stored: Any) -> dict[str, str]:
    return world.control.box.open_env(
        stored.env_sealed, organization_id=stored.profile.organization_id, object_id=stored.profile.id
    )


async def test_env_is_sealed_and_never_shown(world: World) -> None:
    made = await profiles.create(world.control, world.me, {"name": "mine", "image": "base", "env": {"KEY": SECRET}})
    assert made.env_names == ("KEY",)
    assert made.profile.env == {}
    stored = world.control.profiles[made.profile.id]
    assert SECRET not in repr(stored) + repr(made)
    assert open_env(world, stored) == {"KEY": SECRET}

    def everything(connection: sa.Connection) -> bytes:
        rows = [tuple(row) for table in tables.metadata.sorted_tables for row in connection.execute(sa.select(table))]
        return repr(rows).encode()

    assert SECRET.encode() not in await world.control.database.read(everything)
    assert SECRET.encode() not in b"".join(path.read_bytes() for path in world.home.rglob("*") if path.is_file())


async def test_patch(world: World) -> None:
    made = await profiles.create(
        world.control, world.me, {"name": "mine", "image": "base", "env": {"A": "1", "B": "2"}, "idle_seconds": 600}
    )
    view = await profiles.update(
        world.control, world.me, made.profile.id, {"env": {"B": None, "C": "3"}, "idle_seconds": None, "memory_mb": 256}
    )
    assert view.env_names == ("A", "C")
    assert (view.profile.memory_mb, view.profile.idle_seconds, view.profile.image) == (256, None, "base")
    assert view.profile.revision == made.profile.revision + 1
    assert open_env(world, world.control.profiles[made.profile.id]) == {"A": "1", "C": "3"}
    same = await profiles.update(world.control, world.me, made.profile.id, {"memory_mb": 256})
    assert same.profile.revision == view.profile.revision
    cleared = await profiles.update(world.control, world.me, made.profile.id, {"env": None})
    assert cleared.env_names == ()


async def test_a_change_reaches_rooms_that_are_there(world: World) -> None:
    view = await rooms.get_or_create(world.control, world.me, world.profile_id(), "r")
    await profiles.update(world.control, world.me, world.profile_id(), {"idle_seconds": 60})
    assert view.profile.idle_seconds == 86_400
    assert (await rooms.find(world.control, world.me, world.profile_id(), "r")).profile.idle_seconds == 60


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"image": "base"}, "name"),
        ({"name": "x"}, "image"),
        ({"name": "X Y", "image": "base"}, "name"),
        ({"name": "x", "image": "nope"}, "'nope'"),
        ({"name": "x", "image": "base", "driver": "firecracker"}, "driver"),
        ({"name": "x", "image": "base", "min_isolation": "strong"}, "min_isolation"),
        ({"name": "x", "image": "base", "driver": "gvisor", "min_isolation": "microvm"}, "min_isolation"),
        ({"name": "x", "image": "base", "egress_policy": {"mode": "allow"}}, "egress_policy"),
        ({"name": "x", "image": "base", "memory_mb": 1}, "memory_mb"),
        ({"name": "x", "image": "base", "memory_mb": "1024"}, "memory_mb"),
        ({"name": "x", "image": "base", "vcpu_count": True}, "vcpu_count"),
        ({"name": "x", "image": "base", "env": {"A": 1}}, "env"),
        ({"name": "x", "image": "base", "env": {"A B": "1"}}, "env"),
        ({"name": "x", "image": "base", "id": "1"}, "id"),
    ],
)
async def test_refused(world: World, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        await profiles.create(world.control, world.me, fields)


async def test_names_are_unique_in_an_organization(world: World) -> None:
    with pytest.raises(ConflictError, match="'base'"):
        await profiles.create(world.control, world.me, {"name": "base", "image": "base"})
    with pytest.raises(ConflictError, match="'base'"):
        await profiles.update(world.control, world.me, world.profile_id("node"), {"name": "base"})


async def test_a_profile_with_rooms_stays(world: World) -> None:
    await rooms.get_or_create(world.control, world.me, world.profile_id(), "r")
    with pytest.raises(ConflictError, match="1 room"):
        await profiles.delete(world.control, world.me, world.profile_id())
    await rooms.destroy(world.control, world.me, world.profile_id(), "r")
    await profiles.delete(world.control, world.me, world.profile_id())


async def test_another_organization_sees_nothing(world: World) -> None:
    stranger, profile_id = await world.stranger(), world.profile_id()
    for call in (
        profiles.get(world.control, stranger, profile_id),
        profiles.update(world.control, stranger, profile_id, {"memory_mb": 512}),
        profiles.delete(world.control, stranger, profile_id),
        profiles.get(world.control, stranger, uuid4()),
    ):
        with pytest.raises(ProfileNotFoundError):
            await call
    weak = Principal(world.me.organization_id, None, frozenset({Scope.ROOMS}), "weak")
    with pytest.raises(ForbiddenError):
        await profiles.delete(world.control, weak, profile_id)
    await profiles.get(world.control, world.me, profile_id)


async def test_a_damaged_or_moved_secret_does_not_open(world: World) -> None:
    one, two = [
        (await profiles.create(world.control, world.me, {"name": name, "image": "base", "env": {"A": name}})).profile
        for name in ("one", "two")
    ]
    sealed = world.control.profiles[one.id].env_sealed
    box = world.control.box
    assert box.open(sealed, organization_id=one.organization_id, object_id=one.id) == b'{"A": "one"}'
    with pytest.raises(SealedError):
        box.open(sealed, organization_id=two.organization_id, object_id=two.id)
    with pytest.raises(SealedError):
        box.open(sealed, organization_id=uuid4(), object_id=one.id)
    for at in range(len(sealed)):
        damaged = bytearray(sealed)
        damaged[at] ^= 1
        with pytest.raises(SealedError):
            box.open(bytes(damaged), organization_id=one.organization_id, object_id=one.id)
    for end in (0, 3, 15, 20):
        with pytest.raises(SealedError):
            box.open(sealed[:end], organization_id=one.organization_id, object_id=one.id)
    other = SecretBox(b"k" * 32)
    with pytest.raises(SealedError, match="another master key"):
        other.open(sealed, organization_id=one.organization_id, object_id=one.id)


def test_the_key_file(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    ids = {"organization_id": uuid4(), "object_id": uuid4()}
    sealed = load_box(settings).seal(b"x", **ids)
    path = settings.api_dir / secrets.KEY_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in settings.api_dir.iterdir()] == [secrets.KEY_FILE]
    assert load_box(settings).open(sealed, **ids) == b"x"
    path.write_text("short")
    with pytest.raises(ValueError, match="not the base64"):
        load_box(settings)
    with pytest.raises(ValueError, match="the base64 of a 32-byte key"):
        Settings(home=tmp_path, master_key="bm90IDMyIGJ5dGVz")
