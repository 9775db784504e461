"""Importing images: from a registry by reference, or from an archive that the caller sends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

import structlog

from innkeeper.bus.contract import Call, Message
from innkeeper.control import build_log, images, registries
from innkeeper.control.access import require, require_any
from innkeeper.control.build_log import BuildLog
from innkeeper.control.build_run import Built
from innkeeper.core.host_verbs import ImportImage, to_wire
from innkeeper.core.image import Image, ImageSource, ImageStatus
from innkeeper.core.image_config import ImageConfig, config_from_json
from innkeeper.core.registry import parse_reference
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import ConflictError, ImageNotFoundError, InnkeeperError, InvalidRequestError, NoHostError

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

ARCHIVES = ("oci-archive", "docker-archive")
PIECES_AHEAD = 8
CANCELLED = "The import was cancelled"


@dataclass(slots=True)
class Import:
    """One import that goes on in this process."""

    image: Image
    log: BuildLog
    # Pieces of the archive; an empty one is its end.
    pieces: asyncio.Queue[bytes] = field(default_factory=lambda: asyncio.Queue(PIECES_AHEAD))
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    error: InnkeeperError | None = None


class Imports:
    """The imports of this process, by their image."""

    def __init__(self) -> None:
        self._running: dict[UUID, Import] = {}

    def of(self, image_id: UUID) -> Import | None:
        """The import that makes an image now."""
        return self._running.get(image_id)

    def add(self, one: Import) -> None:
        """Take note of an import."""
        self._running[one.image.id] = one

    def remove(self, one: Import) -> None:
        """It is over."""
        self._running.pop(one.image.id, None)


async def import_reference(control: Control, principal: Principal, name: str, reference: str) -> Image:
    """Begin to import an image from a registry; the image as it is now. How it goes on is in its log.

    Raises:
        InvalidRequestError: not a name, or not a reference to a registry. Files and other transports never are.
        ConflictError: the image is being made already.
        NoHostError: no host is reachable.

    """
    require(principal, Scope.PROFILES)
    parsed = parse_reference(reference, default_registry=control.settings.default_registry)
    known = await registries.credential(control, principal.organization_id, parsed.registry)
    username, password = known if known is not None else (None, None)
    request = ImportImage("registry", str(parsed), username, password)
    return (await _begin(control, principal, name, request, str(parsed))).image


async def import_archive(
    control: Control, principal: Principal, name: str, kind: str, content: AsyncIterator[bytes]
) -> Image:
    """Import an image from an archive, whose bytes are `content`; returns when all of them are with the host, which goes on.

    Raises:
        InvalidRequestError: not a name or not a kind; or the import refused what came so far.
        As `import_reference`; whatever `content` raises, which cancels the import.

    """
    require(principal, Scope.PROFILES)
    if kind not in ARCHIVES:
        raise InvalidRequestError(f"format: one of {', '.join(ARCHIVES)}")
    one = await _begin(control, principal, name, ImportImage(kind), kind)
    try:
        async for piece in content:
            if piece and not await _put(one, piece):
                break
        else:
            await _put(one, b"")
    except BaseException:
        one.cancelled.set()
        raise
    if one.error is not None:
        raise one.error
    return control.images.own(principal.organization_id, name) or one.image


async def _put(one: Import, piece: bytes) -> bool:
    """Hand a piece over; False when the import ended meanwhile."""
    putting = asyncio.ensure_future(one.pieces.put(piece))
    ending = asyncio.ensure_future(one.ended.wait())
    try:
        await asyncio.wait({putting, ending}, return_when=asyncio.FIRST_COMPLETED)
        return putting.done() and not one.ended.is_set()
    finally:
        putting.cancel()
        ending.cancel()


async def _begin(control: Control, principal: Principal, name: str, request: ImportImage, source_ref: str) -> Import:
    host_id = _host(control)
    image = await images.begin(control, principal, name, source=ImageSource.IMPORT, source_ref=source_ref)
    path = images.log_path(control, image.id)
    await asyncio.to_thread(path.unlink, missing_ok=True)
    one = Import(image, BuildLog(path))
    control.imports.add(one)
    control.tasks.spawn(_run(control, one, host_id, request, source_ref), name="image import")
    return one


def _host(control: Control) -> UUID:
    reachable = set(control.bus.hosts())
    for entry in control.hosts:
        if entry.host.id in reachable and not entry.host.draining:
            return entry.host.id
    raise NoHostError("No host is there that could import an image")


async def _run(control: Control, one: Import, host_id: UUID, request: ImportImage, source_ref: str) -> None:
    """From the first step to the end, which is written down whatever it is."""
    working = asyncio.ensure_future(_work(control, one, host_id, request, source_ref))
    stopping = asyncio.ensure_future(one.cancelled.wait())
    error: str | None = None
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            one.error = ConflictError(CANCELLED)
        else:
            working.result()
    except InnkeeperError as refusal:
        one.error = refusal
    except Exception:
        log.exception("an import of an image failed", image_id=str(one.image.id))
        one.error = InnkeeperError("The server could not import the image")
    finally:
        for task in (working, stopping):
            task.cancel()
        # The host's half is cancelled with ours; nothing is acknowledged before that is done.
        await asyncio.wait({working, stopping})
        if one.error is not None:
            error = one.error.message
            with contextlib.suppress(InnkeeperError):
                await images.fail(control, one.image, error)
        one.log.event("end", error=error)
        one.log.close()
        one.ended.set()
        control.imports.remove(one)


async def _work(control: Control, one: Import, host_id: UUID, request: ImportImage, source_ref: str) -> None:
    async def complete(made: Built, config: ImageConfig) -> None:
        await images.complete(
            control,
            one.image,
            digest=made.digest,
            size_bytes=made.size_bytes,
            config=config,
            source=ImageSource.IMPORT,
            source_ref=source_ref,
        )

    feed = None if request.reference is not None else one
    await fetch(control, host_id, request, log=one.log, register=complete, feed=feed)


async def fetch(
    control: Control,
    host_id: UUID,
    request: ImportImage,
    *,
    log: BuildLog,
    register: Callable[[Built, ImageConfig], Awaitable[None]],
    feed: Import | None = None,
) -> None:
    """Have a host make the file of an image, of a reference or of what `feed` is given, and `register` write it down while the host still holds it.

    Raises InnkeeperError: why there is none.
    """
    async with control.bus.open(host_id, ImportImage.verb, to_wire(request)) as call:
        feeding = None if feed is None else asyncio.ensure_future(_feed(feed, call))
        try:
            async for event in call.events():
                if isinstance(event, Message):
                    await _follow(call, event.body, log, register)
            await call.result()
        finally:
            if feeding is not None:
                feeding.cancel()
                await asyncio.wait({feeding})


async def _feed(one: Import, call: Call) -> None:
    while piece := await one.pieces.get():
        await call.send_data(piece)
    await call.send_message({"sent": True})


async def _follow(
    call: Call, body: dict[str, Any], log: BuildLog, register: Callable[[Built, ImageConfig], Awaitable[None]]
) -> None:
    if "step" in body:
        log.event("step", text=str(body["step"]))
    elif "line" in body:
        log.event("output", data=str(body["line"]) + "\n")
    elif "made" in body:
        made = body["made"]
        built = Built(str(made["digest"]), int(made["size_bytes"]), int(made.get("files", 0)))
        await register(built, config_from_json(made["config"]))
        # It is written down: the host need not hold it any more.
        await call.send_end()


async def cancel(control: Control, principal: Principal, name: str) -> None:
    """Give up making an image; returns when nothing of it is left. Safe to repeat.

    Raises:
        ImageNotFoundError: the organization has none of that name.

    """
    require(principal, Scope.PROFILES)
    image = control.images.own(principal.organization_id, name)
    if image is None:
        raise ImageNotFoundError
    one = control.imports.of(image.id)
    if one is not None:
        one.cancelled.set()
        await one.ended.wait()


async def follow_log(
    control: Control, principal: Principal, name: str, *, after: int = 0
) -> AsyncGenerator[dict[str, Any] | None, None]:
    """What the newest import of an image said, and goes on saying: `step`, `output` and at last `end`, each with its number; None in times of silence.

    Raises:
        ImageNotFoundError: the organization has none of that name.

    """
    require_any(principal, Scope.PROFILES, Scope.ROOMS)
    image = control.images.own(principal.organization_id, name)
    if image is None:
        raise ImageNotFoundError
    one = control.imports.of(image.id)
    live = one.log if one is not None and image.status is ImageStatus.BUILDING else None
    return build_log.follow(images.log_path(control, image.id), live, after=after)
