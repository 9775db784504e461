"""Images of organizations: names, what they stand for, what keeps them."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from innkeeper.control import images, lifecycle, profiles, rooms
from innkeeper.core.host_verbs import CollectImages, EnsureMachine
from innkeeper.core.image import Image, ImageSource, ImageStatus
from innkeeper.core.image_config import ImageConfig
from innkeeper.errors import (
    ConflictError,
    ForbiddenError,
    ImageNotFoundError,
    InvalidRequestError,
    RateLimitedError,
    UnavailableError,
)
from scripted_host import World

pytestmark = pytest.mark.anyio

CONFIG = ImageConfig(
    user="1000:1000", workdir="/app", env={"A": "1"}, entrypoint=("/run",), cmd=("x",), labels={"l": "m"}
)


async def make(world: World, name: str, digest: str = "d1", **changes: Any) -> Image:
    image = await images.begin(world.control, world.me, name, source=ImageSource.IMPORT, source_ref="r.example/app:1")
    config = dataclasses.replace(CONFIG, **changes)
    return await images.complete(
        world.control, image, digest=digest, size_bytes=5, config=config, source=ImageSource.IMPORT,
        source_ref="r.example/app:1",
    )  # fmt: skip


async def test_an_image_is_made_shown_and_loaded_again(world: World) -> None:
    begun = await images.begin(world.control, world.me, "app:1", source=ImageSource.BUILD, source_ref="dir")
    assert (begun.status, begun.usable) == (ImageStatus.BUILDING, False)
    with pytest.raises(ConflictError, match="being made already"):
        await images.begin(world.control, world.me, "app:1", source=ImageSource.IMPORT, source_ref=None)
    with pytest.raises(ConflictError, match="cancel"):
        await images.remove(world.control, world.me, "app:1")
    made = await images.complete(
        world.control, begun, digest="d", size_bytes=5, config=CONFIG, source=ImageSource.BUILD, source_ref="dir"
    )
    assert await images.get(world.control, world.me, "app:1") == made
    async with world.running() as again:
        found = await images.get(again, world.me, "app:1")
    assert (found.config, found.digest, found.status) == (CONFIG, "d", ImageStatus.READY)


async def test_names_that_are_none(world: World) -> None:
    for name in ("", "A", "a/b", "a:", ":a", "../x", "a:b:c", "a\n", "docker://a", "a" * 64, "a:" + "t" * 129):
        with pytest.raises(InvalidRequestError, match=r"^name:"):
            await images.begin(world.control, world.me, name, source=ImageSource.IMPORT, source_ref=None)


async def test_an_organization_s_own_image_comes_first_and_is_nobody_else_s(world: World) -> None:
    other = await world.stranger()
    await make(world, "base", "mine")
    assert (await images.get(world.control, world.me, "base")).digest == "mine"
    assert (await images.get(world.control, other, "base")).digest == "d-base"
    listed = await images.list_images(world.control, world.me)
    assert [image.name for image in listed] == ["base", "node", "python-data-science"]
    await make(world, "app")
    with pytest.raises(ImageNotFoundError):
        await images.get(world.control, other, "app")
    with pytest.raises(ImageNotFoundError):
        await images.remove(world.control, other, "app")
    with pytest.raises(InvalidRequestError, match="no image named"):
        await profiles.create(world.control, other, {"name": "p", "image": "app"})


async def test_rooms_take_what_the_profile_does_not_say_and_keep_what_they_were_made_of(world: World) -> None:
    await make(world, "app", "d1")
    view = await profiles.create(world.control, world.me, {"name": "p", "image": "app", "env": {"B": "2"}})
    await rooms.get_or_create(world.control, world.me, view.profile.id, "one")
    await make(world, "app", "d2", user="root", workdir="/", env={"A": "2"})
    await rooms.get_or_create(world.control, world.me, view.profile.id, "two")
    one, two = (request for request in world.host.asked if isinstance(request, EnsureMachine))
    assert (one.shape.image_digest, one.shape.user, one.workdir, one.env) == (
        "d1",
        "1000:1000",
        "/app",
        {"A": "1", "B": "2"},
    )
    assert (two.shape.image_digest, two.shape.user, two.workdir, two.env) == ("d2", "root", "/", {"A": "2", "B": "2"})
    await world.control.close()
    world.host.asked.clear()
    world.host.machines.clear()
    async with world.running() as again:
        entry = again.live.find((view.profile.id, "one"))
        assert entry is not None
        await lifecycle.revive(again, world.me, entry)
    (request,) = (request for request in world.host.asked if isinstance(request, EnsureMachine))
    assert (request.shape.image_digest, request.workdir, request.env["A"]) == ("d1", "/app", "1")


async def test_an_image_in_use_stays_and_says_by_what(world: World) -> None:
    image = await make(world, "app")
    view = await profiles.create(world.control, world.me, {"name": "mine", "image": "app"})
    with pytest.raises(ConflictError, match="profile 'mine'"):
        await images.remove(world.control, world.me, "app")
    await rooms.get_or_create(world.control, world.me, view.profile.id, "r")
    await profiles.update(world.control, world.me, view.profile.id, {"image": "base"})
    with pytest.raises(ConflictError, match="1 instance"):
        await images.remove(world.control, world.me, "app")
    await rooms.destroy(world.control, world.me, view.profile.id, "r")
    with world.control.image_users.using(image.id, "build of 'x'"), pytest.raises(ConflictError, match="build of 'x'"):
        await images.remove(world.control, world.me, "app")
    world.host.asked.clear()
    await images.remove(world.control, world.me, "app")
    (request,) = (request for request in world.host.asked if isinstance(request, CollectImages))
    assert "d1" not in request.keep
    with pytest.raises(ImageNotFoundError):
        await images.remove(world.control, world.me, "app")
    with pytest.raises(ConflictError, match="comes with the server"):
        await images.remove(world.control, world.me, "base")


async def test_an_image_gets_no_digest_while_a_host_removes_those_that_it_was_not_told_to_keep(world: World) -> None:
    """The maker's call would end then, and with it the host's reason to keep the file."""
    world.host.hold_collection.clear()
    collecting = asyncio.ensure_future(images.collect_everywhere(world.control))
    while not world.host.count(CollectImages):
        await asyncio.sleep(0)
    making = asyncio.ensure_future(make(world, "app", "d1"))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(making), 0.3)
    world.host.hold_collection.set()
    await asyncio.gather(collecting, making)
    await images.collect_everywhere(world.control)
    asked = [request.keep for request in world.host.asked if isinstance(request, CollectImages)]
    assert ["d1" in keep for keep in asked] == [False, True]


async def test_a_failed_attempt_leaves_what_was_there(world: World) -> None:
    first = await images.begin(world.control, world.me, "app", source=ImageSource.IMPORT, source_ref=None)
    failed = await images.fail(world.control, first, "x" * 5_000 + "end")
    assert (failed.status, failed.usable, len(failed.last_error or "")) == (ImageStatus.FAILED, False, 2_000)
    view = await profiles.create(world.control, world.me, {"name": "p", "image": "app"})
    with pytest.raises(UnavailableError, match="could not be built"):
        await rooms.get_or_create(world.control, world.me, view.profile.id, "r")
    await make(world, "app")
    second = await images.begin(world.control, world.me, "app", source=ImageSource.IMPORT, source_ref=None)
    assert second.usable
    failed = await images.fail(world.control, second, "no")
    assert (failed.status, failed.digest, failed.last_error) == (ImageStatus.READY, "d1", "no")


async def test_what_a_killed_server_was_making_is_said_to_have_failed(world: World) -> None:
    await images.begin(world.control, world.me, "app", source=ImageSource.IMPORT, source_ref=None)
    async with world.running() as again:
        found = await images.get(again, world.me, "app")
    assert (found.status, found.last_error) == (ImageStatus.FAILED, images.INTERRUPTED)


async def test_scopes_and_the_quota(world: World) -> None:
    powerless = dataclasses.replace(world.me, scopes=frozenset())
    with pytest.raises(ForbiddenError):
        await images.list_images(world.control, powerless)
    with pytest.raises(ForbiddenError):
        await images.begin(world.control, powerless, "app", source=ImageSource.IMPORT, source_ref=None)
    with pytest.raises(ForbiddenError):
        await images.collect(world.control, world.me)
    assert (await images.collect_everywhere(world.control)).freed_bytes == 7
    world.control.settings = world.control.settings.model_copy(update={"image_quota_mb": 0})
    with pytest.raises(RateLimitedError, match="remove one"):
        await images.begin(world.control, world.me, "app", source=ImageSource.IMPORT, source_ref=None)
