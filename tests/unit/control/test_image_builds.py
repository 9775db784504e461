"""Builds over a scripted host: what is asked of it, what is kept, and how builds end."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import tarfile
from collections.abc import AsyncIterator
from typing import Any

import pytest

from innkeeper.control import image_builds, images, organizations
from innkeeper.control.image_builds import BuildRequest
from innkeeper.core.build_verbs import ScratchImage, UnpackFiles
from innkeeper.core.dockerfile import DockerfileError
from innkeeper.core.host_verbs import DestroyMachine, EnsureMachine, Execute
from innkeeper.core.image import ImageStatus
from innkeeper.core.image_build import BuildStatus, ImageBuild
from innkeeper.errors import (
    ConflictError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    PayloadTooLargeError,
    RateLimitedError,
)
from scripted_host import World

pytestmark = pytest.mark.anyio


def tar(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def ended(world: World, build: ImageBuild) -> ImageBuild:
    async with asyncio.timeout(20):
        while not (found := await image_builds.get(world.control, world.me, build.id)).status.ended or (
            build.id in world.control.builds
        ):
            await asyncio.sleep(0.01)
    return found


async def build(world: World, text: str, files: bytes | None = None, **fields: Any) -> ImageBuild:
    request = BuildRequest("app", text, context=files is not None, **fields)
    begun = await image_builds.create(world.control, world.me, request)
    if files is not None:
        await image_builds.put_context(world.control, world.me, begun.id, pieces(files[:100], files[100:]))
    return await ended(world, begun)


async def said(world: World, build: ImageBuild) -> list[dict[str, Any]]:
    events = await image_builds.events(world.control, world.me, build.id)
    return [event async for event in events if event is not None]


TEXT = 'FROM base\nENV A=1\nRUN make\nCOPY f /srv/\nCMD ["x"]\n'


async def test_a_build_runs_its_steps_in_one_guest_and_leaves_no_row(world: World) -> None:
    done = await build(world, TEXT, tar(f=b"1"))
    assert (done.status, done.error) == (BuildStatus.READY, None)
    (ensured,) = [asked for asked in world.host.asked if isinstance(asked, EnsureMachine)]
    assert (ensured.bare, ensured.step_key, ensured.shape.image_digest, ensured.user) == (True, None, "d-base", "root")
    (ran,) = [asked for asked in world.host.asked if isinstance(asked, Execute)]
    assert (ran.argv, ran.user, ran.cwd) == (("/bin/sh", "-c", "make"), "user", "/")
    assert {"A": "1", "LANG": "C"}.items() <= ran.env.items()
    ((verb, stream),) = world.host.builds.unpacked
    assert (verb.destination, verb.as_file) == ("/srv", False)
    with tarfile.open(fileobj=io.BytesIO(stream)) as archive:
        assert archive.getnames() == ["f"]
    image = await images.get(world.control, world.me, "app")
    assert (image.status, image.digest, image.config.cmd) == (ImageStatus.READY, done.digest, ("x",))
    assert image.digest == world.host.builds.kept[-1]
    assert world.host.count(DestroyMachine) == 1 and world.host.machines == {}
    names = [(event["event"], event.get("text")) for event in await said(world, done)]
    assert names[0] == ("step", "ENV A=1") and names[-1] == ("end", None)
    assert ("output", None) in names


async def test_kept_steps_are_not_run_again_and_a_change_runs_what_follows(world: World) -> None:
    await build(world, TEXT, tar(f=b"1"))
    world.host.asked.clear()
    again = await build(world, "# moved\n" + TEXT.replace("CMD", "LABEL a=b\nCMD"), tar(f=b"1"))
    assert again.status is BuildStatus.READY and world.host.count(EnsureMachine) == 0
    assert [event["kept"] for event in await said(world, again) if event["event"] == "step"].count(True) == 2
    changed = await build(world, TEXT, tar(f=b"2"))
    assert changed.status is BuildStatus.READY and changed.digest != again.digest
    (ensured,) = [asked for asked in world.host.asked if isinstance(asked, EnsureMachine)]
    assert ensured.step_key == world.host.builds.kept[0] and world.host.count(Execute) == 0
    anew = await build(world, TEXT, tar(f=b"2"), use_cache=False)
    assert anew.status is BuildStatus.READY and world.host.count(Execute) == 1


async def test_another_organization_shares_no_kept_step(world: World) -> None:
    await build(world, "FROM base\nRUN a\n")
    other = await organizations.create(world.control, world.operator, "other")
    principal = dataclasses.replace(world.me, organization_id=other.id)
    begun = await image_builds.create(
        world.control, principal, BuildRequest("app", "FROM base\nRUN a\n", context=False)
    )
    with pytest.raises(NotFoundError):
        await image_builds.get(world.control, world.me, begun.id)
    with pytest.raises(NotFoundError):
        await image_builds.cancel(world.control, world.me, begun.id)
    while begun.id in world.control.builds:
        await asyncio.sleep(0.01)
    assert len(set(world.host.builds.kept)) == 2


async def test_a_dockerfile_that_changes_no_file_gives_the_same_file_other_defaults(world: World) -> None:
    done = await build(world, "FROM base\nENV A=1\n")
    assert done.digest == "d-base" and world.host.count(EnsureMachine) == 0
    (exported,) = world.host.builds.exported
    assert (exported.key, exported.image_digest) == (None, "d-base")


async def test_stages_that_are_not_needed_are_not_built(world: World) -> None:
    text = "FROM base AS one\nRUN one\nFROM base AS two\nRUN two\nFROM scratch\nCOPY --from=one /a /b\n"
    done = await build(world, text)
    assert done.status is BuildStatus.READY, done
    assert [asked.argv[-1] for asked in world.host.asked if isinstance(asked, Execute)] == ["one"]
    ((verb, stream),) = world.host.builds.unpacked
    assert (verb.destination, verb.as_file, verb.owners, stream) == ("/b", True, True, b"packed")
    assert world.host.count(ScratchImage) == 1
    world.host.asked.clear()
    assert (await build(world, text)).status is BuildStatus.READY
    assert world.host.count(EnsureMachine) == 0


async def test_a_failed_step_ends_the_build_with_its_line(world: World) -> None:
    world.host.result = {"exit_code": 3}
    world.host.output = [b"one\ntw", b"o\n"]
    done = await build(world, "FROM base\n\nRUN make\nRUN never\n")
    assert done.status is BuildStatus.FAILED
    assert done.error == "Dockerfile line 3: RUN make: exit code 3\none\ntwo"
    image = await images.get(world.control, world.me, "app")
    assert image.status is ImageStatus.FAILED and image.last_error == done.error
    assert world.host.machines == {} and world.host.count(Execute) == 1


async def test_a_missing_file_names_its_line_and_no_guest_starts(world: World) -> None:
    done = await build(world, "FROM base\nRUN a\nCOPY nothing /\n", tar(f=b""))
    assert done.error is not None and "line 3: nothing: no such file" in done.error
    assert world.host.count(EnsureMachine) == 0


async def test_a_build_can_be_cancelled_in_a_step_and_while_it_waits(world: World) -> None:
    world.host.hold_execute.clear()
    begun = await image_builds.create(world.control, world.me, BuildRequest("app", "FROM base\nRUN a\n", context=False))
    while not world.host.count(Execute):
        await asyncio.sleep(0.01)
    with pytest.raises(ConflictError):
        await images.remove(world.control, world.me, "app")
    assert (await image_builds.cancel(world.control, world.me, begun.id)).status is BuildStatus.CANCELLED
    assert world.host.machines == {} and world.control.builds == {}
    waiting = await image_builds.create(world.control, world.me, BuildRequest("app", TEXT))
    assert (await image_builds.cancel(world.control, world.me, waiting.id)).status is BuildStatus.CANCELLED
    assert (await image_builds.cancel(world.control, world.me, waiting.id)).status is BuildStatus.CANCELLED
    with pytest.raises(ConflictError, match="has ended"):
        await image_builds.put_context(world.control, world.me, waiting.id, pieces(b""))


async def test_limits(world: World) -> None:
    control, me = world.control, world.me
    with pytest.raises(ForbiddenError):
        await image_builds.create(control, dataclasses.replace(me, scopes=frozenset()), BuildRequest("app", TEXT))
    for bad in (
        BuildRequest("App", TEXT),
        BuildRequest("app", TEXT, build_args={"1": "x"}),
        BuildRequest("app", TEXT, build_args={"A": "\0"}),
        BuildRequest("app", TEXT, build_args={"A": "x" * 70_000}),
        BuildRequest("app", TEXT, egress_mode="all"),
        BuildRequest("app", "FROM base\nVOLUME /x\n"),
        BuildRequest("app", "FROM nothing\n"),
    ):
        with pytest.raises(InvalidRequestError):
            await image_builds.create(control, me, bad)
    assert control.images.own(me.organization_id, "app") is None
    with pytest.raises(DockerfileError, match="line 1"):
        await image_builds.create(control, me, BuildRequest("app", "FROM nothing\n"))
    first = await image_builds.create(control, me, BuildRequest("one", TEXT))
    second = await image_builds.create(control, me, BuildRequest("two", TEXT))
    with pytest.raises(RateLimitedError, match="builds 2 images"):
        await image_builds.create(control, me, BuildRequest("three", TEXT))
    world.control.settings = world.control.settings.model_copy(update={"build_context_mb": 1})
    with pytest.raises(PayloadTooLargeError):
        await image_builds.put_context(control, me, first.id, pieces(b"x" * 2_000_000))
    for begun in (first, second):
        await image_builds.cancel(control, me, begun.id)
    with pytest.raises(NotFoundError):
        await image_builds.events(control, me, world.me.organization_id)


async def test_a_build_that_a_dead_server_left_has_failed_and_its_guest_is_an_orphan(world: World) -> None:
    world.host.hold_execute.clear()
    begun = await image_builds.create(world.control, world.me, BuildRequest("app", "FROM base\nRUN a\n", context=False))
    while not world.host.count(Execute):
        await asyncio.sleep(0.01)
    (left,) = world.host.machines
    # As after kill -9: the rows are there, and whoever knew of them is not.
    await image_builds.recover(world.control)
    found = await world.control.database.read(image_builds.store.get, world.me.organization_id, begun.id)
    assert found is not None and (found.status, found.error) == (BuildStatus.FAILED, image_builds.INTERRUPTED)
    world.control.reconcile_hint.set()
    while left in world.host.machines:
        await asyncio.sleep(0.01)
    world.host.hold_execute.set()
    await ended(world, begun)


async def test_unpack_options_follow_the_instruction(world: World) -> None:
    files = tar(**{"a": b"1", "p.tar": tar(x=b"1")})
    text = "FROM base\nCOPY --chown=1:2 --chmod=600 a /to\nADD p.tar a /d/\nCOPY <<E /e\nhi\nE\nWORKDIR /w\n"
    done = await build(world, text, files)
    assert done.status is BuildStatus.READY, done
    verbs = [dataclasses.replace(verb, instance_id=world.me.organization_id) for verb, _ in world.host.builds.unpacked]
    any_id = world.me.organization_id
    assert verbs == [
        UnpackFiles(any_id, "/to", as_file=True, chown="1:2", mode=0o600),
        UnpackFiles(any_id, "/d"),
        UnpackFiles(any_id, "/d", archive=True, owners=True),
        UnpackFiles(any_id, "/e", as_file=True),
        UnpackFiles(any_id, "/w"),
    ]
