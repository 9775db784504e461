"""Image builds: begin one, send its files, follow it, cancel it. A build goes on whoever goes away, and ends with the server."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import anyio
import sqlalchemy as sa
import structlog

from innkeeper.control import build_log, clock, images, placement
from innkeeper.control.access import require
from innkeeper.control.build_log import BuildLog
from innkeeper.control.build_run import BuildJob, BuildRun, Built, StepFailed
from innkeeper.core.build_plan import BuildPlan, plan_build
from innkeeper.core.dockerfile import DockerfileError, parse
from innkeeper.core.dockerfile_words import NAME
from innkeeper.core.egress_policy import MODES
from innkeeper.core.image import Image, ImageSource
from innkeeper.core.image_build import BuildStatus, ImageBuild
from innkeeper.core.image_config import ImageConfig
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import (
    ConflictError,
    InnkeeperError,
    InvalidRequestError,
    NotFoundError,
    PayloadTooLargeError,
    RateLimitedError,
)
from innkeeper.ids import uuid7
from innkeeper.store import image_builds as store

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

CONTEXT_SECONDS = 600.0
CANCEL_SECONDS = 90.0
KEPT_BUILDS = 50
ARGS_MAX = 100
ARGS_BYTES_MAX = 65_536
ERROR_CHARACTERS = 4_000
MIB = 1_048_576
INTERRUPTED = "The server ended during the build"


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """What is to be built. `context`: files will be sent; `egress_mode`: what RUN may reach."""

    name: str
    dockerfile: str
    build_args: Mapping[str, str] = field(default_factory=dict, repr=False)
    target: str | None = None
    use_cache: bool = True
    context: bool = True
    egress_mode: str = "internet"


class LiveBuild:
    """A build that has not ended. `ended` is set when nothing of it runs any more."""

    def __init__(self, build: ImageBuild, image: Image, directory: Path) -> None:
        self.build = build
        self.image = image
        self.directory = directory
        self.log = BuildLog(directory / "log")
        self.scope = anyio.CancelScope()
        self.users = ExitStack()
        self.context_asked = False
        self.context_there = asyncio.Event()
        self.ended = asyncio.Event()

    @property
    def context(self) -> Path:
        """The tar stream of its files."""
        return self.directory / "context.tar"


async def create(control: Control, principal: Principal, request: BuildRequest) -> ImageBuild:
    """A build that has begun, or waits for its files.

    Raises:
        InvalidRequestError, DockerfileError: nothing is begun.
        ConflictError: the image is being made already.
        RateLimitedError: the organization builds as much as it may, or has no space for images left.

    """
    require(principal, Scope.PROFILES)
    _validate(request)
    check_room(control, principal.organization_id)
    used: dict[str, Image] = {}
    plan = _plan(control, principal, request, used)
    image = await images.begin(control, principal, request.name, source=ImageSource.BUILD, source_ref=None)
    build = ImageBuild(uuid7(), principal.organization_id, request.name, BuildStatus.WAITING, clock.now())

    def insert(connection: sa.Connection) -> list[UUID]:
        store.insert(connection, build)
        return store.drop_old(connection, build.organization_id, keep=KEPT_BUILDS)

    try:
        for old in await control.database.write(insert):
            await asyncio.to_thread(shutil.rmtree, _directory(control, old), ignore_errors=True)
        live = LiveBuild(build, image, _directory(control, build.id))
        control.builds[build.id] = live
        for base in used.values():
            live.users.enter_context(control.image_users.using(base.id, f"build of {request.name!r}"))
        control.metrics.image_builds += 1
        control.tasks.spawn(_work(control, live, plan, request, used), name="image build")
    except BaseException:
        control.builds.pop(build.id, None)
        await images.fail(control, image, "The build could not be begun")
        raise
    return build


def check_room(control: Control, organization_id: UUID) -> None:
    """Raises RateLimitedError where the organization builds as many images and snapshots as it may."""
    live = [one.build.organization_id for one in control.builds.values()]
    live += [one.snapshot.organization_id for one in control.snapshot_builds.values()]
    count = live.count(organization_id)
    if count >= control.settings.max_builds:
        raise RateLimitedError(
            f"The organization builds {count} images already, as many as it may", retry_after_seconds=10
        )


def _validate(request: BuildRequest) -> None:
    if request.egress_mode not in MODES:
        raise InvalidRequestError(f"egress: one of {', '.join(MODES)}")
    size = sum(len(name) + len(value.encode("utf-8", "surrogatepass")) for name, value in request.build_args.items())
    if len(request.build_args) > ARGS_MAX or size > ARGS_BYTES_MAX:
        raise InvalidRequestError(f"build_args: at most {ARGS_MAX}, and {ARGS_BYTES_MAX} bytes of them")
    for name, value in request.build_args.items():
        if not NAME.fullmatch(name) or "\0" in value:
            raise InvalidRequestError(f"build_args: {name[:40]!r} is no argument that a Dockerfile could take")


def _plan(control: Control, principal: Principal, request: BuildRequest, used: dict[str, Image]) -> BuildPlan:
    def config_of(name: str, line: int) -> ImageConfig:
        image = control.images.resolve(principal.organization_id, name)
        if image is None or not image.usable:
            raise DockerfileError(line, f"there is no image {name[:200]!r} that is ready")
        used[name] = image
        return image.config

    return plan_build(parse(request.dockerfile), request.build_args, target=request.target, config_of=config_of)


async def put_context(control: Control, principal: Principal, build_id: UUID, pieces: AsyncIterable[bytes]) -> None:
    """Take the files of a build that waits for them: a tar stream.

    Raises:
        NotFoundError: there is no such build.
        ConflictError: it does not wait (any more).
        PayloadTooLargeError: more than a context may have; the build fails.

    """
    live = await _live(control, principal, build_id)
    if live.context_asked or live.context_there.is_set():
        raise ConflictError("The build has its files already")
    live.context_asked = True
    limit = control.settings.build_context_mb * MIB
    size = 0
    whole = False
    try:
        file = await asyncio.to_thread(live.context.open, "wb")
        try:
            async for piece in pieces:
                size += len(piece)
                if size > limit:
                    raise PayloadTooLargeError(f"The files may have at most {limit // MIB} MiB")
                await asyncio.to_thread(file.write, piece)
        finally:
            await asyncio.to_thread(file.close)
        whole = True
    finally:
        if whole:
            live.context_there.set()
        else:
            # The client may try again while the build waits.
            live.context_asked = False


async def cancel(control: Control, principal: Principal, build_id: UUID) -> ImageBuild:
    """Stop a build; answers when nothing of it runs. One that has ended stays as it is. Raises NotFoundError."""
    require(principal, Scope.PROFILES)
    live = control.builds.get(build_id)
    if live is not None and live.build.organization_id == principal.organization_id:
        live.scope.cancel()
        try:
            async with asyncio.timeout(CANCEL_SECONDS):
                await live.ended.wait()
        except TimeoutError:
            pass
    return await get(control, principal, build_id)


async def get(control: Control, principal: Principal, build_id: UUID) -> ImageBuild:
    """One build. Raises NotFoundError."""
    require(principal, Scope.PROFILES)
    live = control.builds.get(build_id)
    if live is not None and live.build.organization_id == principal.organization_id:
        return live.build
    build = await control.database.read(store.get, principal.organization_id, build_id)
    if build is None:
        raise NotFoundError("There is no such build")
    return build


async def list_builds(control: Control, principal: Principal, *, name: str | None, limit: int) -> list[ImageBuild]:
    """The organization's builds, newest first; with `name` those of one image."""
    require(principal, Scope.PROFILES)
    return await control.database.read(store.newest, principal.organization_id, name=name, limit=limit)


async def events(
    control: Control, principal: Principal, build_id: UUID, *, after: int = 0
) -> AsyncGenerator[dict[str, Any] | None, None]:
    """What a build said after event number `after`, as it goes on, until its end; None now and then while it is silent. Raises NotFoundError."""
    await get(control, principal, build_id)
    live = control.builds.get(build_id)
    return build_log.follow(_directory(control, build_id) / "log", None if live is None else live.log, after=after)


async def recover(control: Control) -> None:
    """At the start: what an earlier process was building has failed, and its files go; hosts destroy what is left of its guests."""
    interrupted = await control.database.write(store.end_interrupted, INTERRUPTED, clock.now())
    known = await control.database.read(store.ids)
    await asyncio.to_thread(_tidy, control.settings.api_dir / "builds", known, interrupted)
    if interrupted:
        log.warning("image builds were interrupted", count=len(interrupted))


def _tidy(directory: Path, known: set[UUID], interrupted: list[UUID]) -> None:
    names = {str(build_id) for build_id in known}
    for entry in directory.iterdir() if directory.exists() else ():
        if entry.name not in names:
            shutil.rmtree(entry, ignore_errors=True)
        else:
            (entry / "context.tar").unlink(missing_ok=True)
    for build_id in interrupted:
        build_log.append_end(directory / str(build_id) / "log", status=BuildStatus.FAILED.value, error=INTERRUPTED)


def _directory(control: Control, build_id: UUID) -> Path:
    return control.settings.api_dir / "builds" / str(build_id)


async def _live(control: Control, principal: Principal, build_id: UUID) -> LiveBuild:
    build = await get(control, principal, build_id)
    live = control.builds.get(build_id)
    if live is None or build.status.ended:
        raise ConflictError("The build has ended")
    return live


async def _work(
    control: Control, live: LiveBuild, plan: BuildPlan, request: BuildRequest, used: Mapping[str, Image]
) -> None:
    """A build from its beginning to its end, whatever that is."""
    status, error = BuildStatus.FAILED, INTERRUPTED
    try:
        status, error = await attempt(
            control, live.scope, live.build.id, lambda: _build(control, live, plan, request, used)
        )
    finally:
        await _end(control, live, status, error)


async def attempt(
    control: Control, scope: anyio.CancelScope, build_id: UUID, work: Callable[[], Awaitable[None]]
) -> tuple[BuildStatus, str]:
    """How a build ended that `work` carries out and `scope` cancels, and why it is not ready."""
    with scope:
        try:
            await work()
        except (StepFailed, InnkeeperError) as failure:
            return BuildStatus.FAILED, failure.message if isinstance(failure, InnkeeperError) else str(failure)
        except TimeoutError:
            return BuildStatus.FAILED, f"The build took longer than {control.settings.build_timeout_seconds} seconds"
        except OSError as failure:
            log.exception("an image build failed", build_id=str(build_id))
            return BuildStatus.FAILED, f"The server could not keep the build's files: {failure.strerror}"
        except Exception:
            log.exception("an image build failed", build_id=str(build_id))
            return BuildStatus.FAILED, "The server could not build the image"
    if scope.cancelled_caught:
        return BuildStatus.CANCELLED, "The build was cancelled"
    return BuildStatus.READY, ""


async def _build(
    control: Control, live: LiveBuild, plan: BuildPlan, request: BuildRequest, used: Mapping[str, Image]
) -> None:
    if request.context:
        try:
            async with asyncio.timeout(CONTEXT_SECONDS):
                await live.context_there.wait()
        except TimeoutError:
            raise InvalidRequestError("The build's files did not come") from None
    live.build = dataclasses.replace(live.build, status=BuildStatus.RUNNING)
    await control.database.write(store.update, live.build)
    job = BuildJob(
        build_id=live.build.id,
        organization_id=live.build.organization_id,
        plan=plan,
        digests={name: image.digest for name, image in used.items()},
        context=live.context if request.context else None,
        egress_mode=request.egress_mode,
        use_cache=request.use_cache,
    )

    async def register(built: Built) -> None:
        live.image = await images.complete(
            control,
            live.image,
            digest=built.digest,
            size_bytes=built.size_bytes,
            config=plan.stages[-1].config,
            source=ImageSource.BUILD,
            source_ref=str(live.build.id),
        )
        live.build = dataclasses.replace(live.build, digest=built.digest)

    async with asyncio.timeout(control.settings.build_timeout_seconds):
        host, offer = placement.choose_for_build(control)
        run = BuildRun(control, job, host=host, offer=offer, log=live.log)
        await run.run(register)


async def _end(control: Control, live: LiveBuild, status: BuildStatus, error: str) -> None:
    """Write down what became of a build. Not undone by whoever cancels."""
    if live.build.digest is not None:
        # Written down already: what went wrong after that concerns nobody.
        status, error = BuildStatus.READY, ""
    control.metrics.image_build_failures += status is BuildStatus.FAILED
    live.build = dataclasses.replace(
        live.build, status=status, error=error[-ERROR_CHARACTERS:] or None, ended_at=clock.now()
    )
    try:
        with anyio.CancelScope(shield=True):
            if status is not BuildStatus.READY:
                await images.fail(control, live.image, error)
            await control.database.write(store.update, live.build)
    finally:
        live.log.event("end", status=status.value, error=live.build.error, digest=live.build.digest)
        live.log.close()
        live.context.unlink(missing_ok=True)
        live.users.close()
        control.builds.pop(live.build.id, None)
        live.ended.set()
