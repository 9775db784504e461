"""Imports as the control side leads them: names, credentials, logs, ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from innkeeper.control import image_imports, images, registries
from innkeeper.core.host_verbs import ImportImage
from innkeeper.core.image import ImageSource, ImageStatus
from innkeeper.errors import ConflictError, ImageNotFoundError, InvalidRequestError, NotFoundError
from scripted_host import World

pytestmark = pytest.mark.anyio

SECRET = "hunter2-registry"


async def ended(world: World, name: str) -> list[dict[str, Any]]:
    """The log of an import, once it is over."""
    events = await image_imports.follow_log(world.control, world.me, name)
    async with asyncio.timeout(10):
        found = [event async for event in events if event is not None]
    await world.until(lambda: world.control.images.own(world.me.organization_id, name).status is not ImageStatus.BUILDING)  # type: ignore[union-attr]  # fmt: skip
    return found


async def pieces(*content: bytes) -> AsyncIterator[bytes]:
    for piece in content:
        yield piece


async def test_from_a_registry(world: World) -> None:
    begun = await image_imports.import_reference(world.control, world.me, "app:1", "r.example/team/app")
    assert (begun.status, begun.source, begun.source_ref) == (ImageStatus.BUILDING, ImageSource.IMPORT, "r.example/team/app:latest")  # fmt: skip
    events = await ended(world, "app:1")
    assert [event["event"] for event in events] == ["step", "output", "end"]
    assert (events[-1]["error"], [event["number"] for event in events]) == (None, [1, 2, 3])
    made = await images.get(world.control, world.me, "app:1")
    assert (made.status, made.digest, made.config.user, made.config.cmd) == (ImageStatus.READY, "e" * 64, "app", ("x",))
    # The host was told only after it was written down.
    await world.until(lambda: world.host.acknowledged == 1)
    (request,) = (request for request in world.host.asked if isinstance(request, ImportImage))
    assert (request.kind, request.reference, request.username) == ("registry", "r.example/team/app:latest", None)
    later = await image_imports.follow_log(world.control, world.me, "app:1", after=2)
    assert [event["event"] async for event in later if event is not None] == ["end"]


async def test_files_and_other_transports_are_no_references(world: World) -> None:
    for reference in ("/etc/passwd", "dir:/etc", "docker://r.example/a/b", "oci-archive:/a.tar", "../a", ""):
        with pytest.raises(InvalidRequestError, match="not an image in a registry"):
            await image_imports.import_reference(world.control, world.me, "app", reference)
    assert world.control.images.own(world.me.organization_id, "app") is None
    assert world.host.count(ImportImage) == 0


async def test_from_an_archive(world: World) -> None:
    made = await image_imports.import_archive(world.control, world.me, "app", "oci-archive", pieces(b"a", b"", b"bc"))
    assert made.name == "app"
    await ended(world, "app")
    assert world.host.imported == [b"abc"]
    with pytest.raises(InvalidRequestError, match="format"):
        await image_imports.import_archive(world.control, world.me, "app", "dir", pieces())


async def test_a_client_that_goes_away_cancels(world: World) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"a"
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        await image_imports.import_archive(world.control, world.me, "app", "oci-archive", broken())
    events = await ended(world, "app")
    assert events[-1]["error"] == image_imports.CANCELLED
    assert world.host.imported == []


async def test_what_the_host_refuses_is_the_image_s_last_error(world: World) -> None:
    world.host.import_error = InvalidRequestError("it is a bomb")
    await image_imports.import_reference(world.control, world.me, "app", "r.example/a/b")
    assert (await ended(world, "app"))[-1]["error"] == "it is a bomb"
    image = await images.get(world.control, world.me, "app")
    assert (image.status, image.last_error, image.usable) == (ImageStatus.FAILED, "it is a bomb", False)
    world.host.import_error = None
    await image_imports.import_reference(world.control, world.me, "app", "r.example/a/b")
    assert (await ended(world, "app"))[-1]["error"] is None


async def test_one_at_a_time_and_cancel(world: World) -> None:
    world.host.hold.clear()
    await image_imports.import_reference(world.control, world.me, "app", "r.example/a/b")
    with pytest.raises(ConflictError, match="being made"):
        await image_imports.import_reference(world.control, world.me, "app", "r.example/a/b")
    with pytest.raises(ConflictError, match="cancel"):
        await images.remove(world.control, world.me, "app")
    other = await world.stranger()
    for who in (other,):
        with pytest.raises(ImageNotFoundError):
            await image_imports.cancel(world.control, who, "app")
        with pytest.raises(ImageNotFoundError):
            await image_imports.follow_log(world.control, who, "app")
    await image_imports.cancel(world.control, world.me, "app")
    await image_imports.cancel(world.control, world.me, "app")
    image = await images.get(world.control, world.me, "app")
    assert (image.status, image.last_error) == (ImageStatus.FAILED, image_imports.CANCELLED)
    await images.remove(world.control, world.me, "app")
    assert list((world.control.settings.api_dir / "image-logs").iterdir()) == []


async def test_credentials_are_the_organization_s_and_sealed(world: World, tmp_path: Path) -> None:
    await registries.log_in(world.control, world.me, "R.example:5000", "robot", "old")
    view = await registries.log_in(world.control, world.me, "r.example:5000", "robot", SECRET)
    assert SECRET not in repr(view)
    assert [one.registry for one in await registries.list_registries(world.control, world.me)] == ["r.example:5000"]
    await image_imports.import_reference(world.control, world.me, "app", "r.example:5000/a")
    await ended(world, "app")
    stranger = await world.stranger()
    await image_imports.import_reference(world.control, stranger, "app", "r.example:5000/a")
    await world.until(lambda: world.host.count(ImportImage) == 2)
    first, second = (request for request in world.host.asked if isinstance(request, ImportImage))
    assert (first.username, first.password) == ("robot", SECRET)
    assert (second.username, second.password) == (None, None)
    assert SECRET not in repr(first)
    await world.control.close()
    for path in tmp_path.rglob("*"):  # noqa: ASYNC240
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("registry", "username", "password"),
    [("", "u", "p"), ("http://r", "u", "p"), ("r/x", "u", "p"), ("r", "", "p"), ("r", "u:v", "p"),
     ("r", "u\n", "p"), ("r", "u", ""), ("r", "u", "p\n"), ("r", "u", "p" * 5_000)],
)  # fmt: skip
async def test_credentials_that_are_none(world: World, registry: str, username: str, password: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        await registries.log_in(world.control, world.me, registry, username, password)
    assert len(refused.value.message) < 200


async def test_logging_out(world: World) -> None:
    await registries.log_in(world.control, world.me, "r.example", "robot", SECRET)
    with pytest.raises(NotFoundError):
        await registries.log_out(world.control, await world.stranger(), "r.example")
    await registries.log_out(world.control, world.me, "r.example")
    with pytest.raises(NotFoundError):
        await registries.log_out(world.control, world.me, "r.example")
