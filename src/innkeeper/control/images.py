"""Images: the shipped ones as hosts report them, and those that organizations make."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa
import structlog

from innkeeper.control import audit, clock
from innkeeper.control.access import require, require_any
from innkeeper.core.build_verbs import CollectSteps
from innkeeper.core.host_verbs import CollectImages, ListImages, to_wire
from innkeeper.core.image import Image, ImageSource, ImageStatus, ShippedImage, validate_image_name
from innkeeper.core.image_config import ImageConfig
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import ConflictError, ImageNotFoundError, InnkeeperError, RateLimitedError
from innkeeper.ids import uuid7
from innkeeper.store import audit_events, snapshots
from innkeeper.store import images as store

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

HOST_SECONDS = 30.0
COLLECT_SECONDS = 120.0
ERROR_CHARACTERS = 2_000
MIB = 1_048_576
INTERRUPTED = "The server ended while the image was being made"


@dataclasses.dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed from the hosts."""

    digests: tuple[str, ...]
    freed_bytes: int
    build_steps: int
    build_cache_bytes: int


async def list_images(control: Control, principal: Principal) -> list[Image]:
    """The organization's images and the shipped ones that none of them hides, by name."""
    require_any(principal, Scope.PROFILES, Scope.ROOMS)
    names = {image.name for image in control.images if image.organization_id in (None, principal.organization_id)}
    found = (control.images.resolve(principal.organization_id, name) for name in sorted(names))
    return [image for image in found if image is not None]


async def get(control: Control, principal: Principal, name: str) -> Image:
    """One image. Raises ImageNotFoundError."""
    require_any(principal, Scope.PROFILES, Scope.ROOMS)
    image = control.images.resolve(principal.organization_id, name)
    if image is None:
        raise ImageNotFoundError
    return image


async def begin(
    control: Control, principal: Principal, name: str, *, source: ImageSource, source_ref: str | None
) -> Image:
    """The organization's image `name`, marked as being made; `complete` or `fail` ends that. One that exists stays usable meanwhile.

    Raises:
        InvalidRequestError: not a name.
        ConflictError: it is being made already.
        RateLimitedError: the organization's images have all the space that they may have.

    """
    require(principal, Scope.PROFILES)
    validate_image_name(name)
    await check_quota(control, principal.organization_id)
    before = control.images.own(principal.organization_id, name)
    if before is not None and before.status is ImageStatus.BUILDING:
        raise ConflictError(f"The image {name!r} is being made already")
    now = clock.now()
    if before is None:
        image = Image(
            uuid7(), principal.organization_id, name, source, ImageStatus.BUILDING, now, now, source_ref=source_ref
        )
    else:
        image = dataclasses.replace(before, status=ImageStatus.BUILDING, updated_at=now, last_error=None)

    def write(connection: sa.Connection) -> None:
        if not store.update(connection, image):
            store.insert(connection, image)
        details = {"name": name, "source": source.value} | ({"from": source_ref} if source_ref else {})
        audit_events.insert(connection, audit.event(principal, "image.make", "image", image.id, details))

    # Before anything is awaited: the next one who asks finds it being made.
    control.images.put(image)
    try:
        await control.database.write(write)
    except BaseException as error:
        control.images.remove(image)
        if before is not None:
            control.images.put(before)
        if isinstance(error, sa.exc.IntegrityError):
            raise ConflictError(f"The image {name!r} is being made already") from error
        raise
    return image


async def check_quota(control: Control, organization_id: UUID) -> None:
    """Raises RateLimitedError where the organization's images and those of its snapshots have all the space that they may have."""
    limit_mb = control.settings.image_quota_mb
    used = await control.database.read(snapshots.image_bytes, organization_id)
    used += sum(image.size_bytes for image in control.images if image.organization_id == organization_id)
    if used >= limit_mb * MIB:
        raise RateLimitedError(
            f"The organization's images have {used // MIB} of {limit_mb} MiB; remove one first", retry_after_seconds=60
        )


async def complete(
    control: Control,
    image: Image,
    *,
    digest: str,
    size_bytes: int,
    config: ImageConfig,
    source: ImageSource,
    source_ref: str | None,
) -> Image:
    """The image, ready: from now on new rooms are made of this. Raises ImageNotFoundError when it was removed meanwhile."""
    made = dataclasses.replace(
        image,
        status=ImageStatus.READY,
        digest=digest,
        size_bytes=size_bytes,
        config=config,
        source=source,
        source_ref=source_ref,
        last_error=None,
        tools=(),
        updated_at=clock.now(),
    )
    async with control.images.naming:
        written = await control.database.write(store.update, made)
    if not written:
        control.images.remove(image)
        raise ImageNotFoundError
    control.images.put(made)
    control.pools_hint.set()
    return made


async def fail(control: Control, image: Image, error: str) -> Image:
    """The image after an attempt that failed: as it was before, with the reason."""
    failed = _failed(image, error)
    if await control.database.write(store.update, failed):
        control.images.put(failed)
    return failed


def _failed(image: Image, error: str) -> Image:
    return dataclasses.replace(
        image,
        status=ImageStatus.READY if image.usable else ImageStatus.FAILED,
        last_error=error[-ERROR_CHARACTERS:],
        updated_at=clock.now(),
    )


async def fail_interrupted(control: Control) -> None:
    """At the start: what an earlier process was making, nobody makes any more."""
    for image in control.images:
        if image.organization_id is not None and image.status is ImageStatus.BUILDING:
            await fail(control, image, INTERRUPTED)


async def remove(control: Control, principal: Principal, name: str) -> None:
    """Remove an image of the organization. Its file goes as soon as nothing on a host stands on it.

    Raises:
        ImageNotFoundError: the organization has none of that name.
        ConflictError: it is shipped, being made, or in use; saying by what.

    """
    require(principal, Scope.PROFILES)
    image = control.images.own(principal.organization_id, name)
    if image is None:
        if control.images.own(None, name) is not None:
            raise ConflictError(f"The image {name!r} comes with the server and cannot be removed")
        raise ImageNotFoundError
    if image.status is ImageStatus.BUILDING:
        raise ConflictError(f"The image {name!r} is being made; cancel that first")
    if users := control.image_users.of(image.id):
        raise ConflictError(f"The image {name!r} is used by {_listed(sorted(users))}, which is being made")

    def delete(connection: sa.Connection) -> None:
        if named := store.profiles_of(connection, principal.organization_id, name):
            raise ConflictError(f"The image {name!r} is used by the profile {_listed([repr(one) for one in named])}")
        if count := store.count_instances(connection, principal.organization_id, name, image.digest):
            raise ConflictError(f"The image {name!r} is used by {count} instance{'s' if count > 1 else ''}")
        if store.delete(connection, image.id):
            audit_events.insert(connection, audit.event(principal, "image.remove", "image", image.id, {"name": name}))

    await control.database.write(delete)
    control.images.remove(image)
    await asyncio.to_thread(log_path(control, image.id).unlink, missing_ok=True)
    await collect_everywhere(control)


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def log_path(control: Control, image_id: UUID) -> Path:
    """Where the log of an image's newest import is kept."""
    return control.settings.api_dir / "image-logs" / f"{image_id}.log"


async def collect(control: Control, principal: Principal, *, build_cache: bool = False) -> Collected:
    """Remove from the hosts what no image of any organization stands for and nothing uses, and kept build steps that are of no use; with `build_cache`
    all of these. Only the operator may.
    """
    require(principal, Scope.ADMIN)
    return await collect_everywhere(control, build_cache=build_cache)


async def collect_everywhere(control: Control, *, build_cache: bool = False) -> Collected:
    """As `collect`, for the server itself; a host that does not answer is left for the next time."""
    digests: set[str] = set()
    freed = steps = cache_bytes = 0
    for host in control.hosts:
        if host.host.id not in control.bus.hosts():
            continue
        try:
            answer = await _collect_on(control, host.host.id)
            kept = await _collect_steps_on(control, host.host.id, everything=build_cache)
        except InnkeeperError as error:
            log.warning("a host could not collect images", host_id=str(host.host.id), reason=error.message)
            continue
        digests |= set(map(str, answer["removed"]))
        freed += int(answer["freed_bytes"]) + int(kept["freed_bytes"])
        steps += int(kept["removed"])
        cache_bytes += int(kept["cache_bytes"])
    return Collected(tuple(sorted(digests)), freed, steps, cache_bytes)


async def _collect_steps_on(control: Control, host_id: UUID, *, everything: bool) -> dict[str, Any]:
    request = CollectSteps(everything=everything)
    return await control.bus.request(host_id, CollectSteps.verb, to_wire(request), timeout_seconds=COLLECT_SECONDS)


async def _collect_on(control: Control, host_id: UUID) -> dict[str, Any]:
    async with control.images.naming:
        keep = await control.database.read(store.digests)
        # Names of shipped images are the host's own knowledge; they do no harm here.
        request = CollectImages(tuple(sorted(keep)))
        return await control.bus.request(host_id, CollectImages.verb, to_wire(request), timeout_seconds=COLLECT_SECONDS)


async def refresh(control: Control, host_id: UUID) -> str:
    """Ask a host for its shipped images and its agents, and keep what it says; the version of its guest agent."""
    answer = await control.bus.request(host_id, ListImages.verb, to_wire(ListImages()), timeout_seconds=HOST_SECONDS)
    control.agents.take(host_id, answer["agents"])
    changed = []
    for report in answer["images"]:
        try:
            shipped = _shipped_of(report)
        except (ValueError, TypeError):
            log.warning("a host reported an image that makes no sense", host_id=str(host_id))
            continue
        before = control.images.own(None, shipped.name)
        image = _image_of(shipped, before)
        if image != before:
            changed.append(image)

    def write(connection: sa.Connection) -> None:
        for image in changed:
            if not store.update(connection, image):
                store.insert(connection, image)

    if changed:
        for image in changed:
            control.images.put(image)
        await control.database.write(write)
        control.pools_hint.set()
    return str(answer["agent_version"])


def _shipped_of(report: dict[str, object]) -> ShippedImage:
    """The image of a report; what a newer host adds is ignored. Raises ValueError: it has no name, or a status that nobody knows."""
    known = {f.name for f in dataclasses.fields(ShippedImage)}
    values = {key: value for key, value in report.items() if key in known}
    if not values.get("name"):
        raise ValueError("an image without a name")
    values["status"] = ImageStatus(str(values.get("status")))
    tools = values.get("tools")
    values["tools"] = tuple(str(tool) for tool in tools) if isinstance(tools, (list, tuple)) else ()
    return ShippedImage(**values)  # type: ignore[arg-type]


def _image_of(shipped: ShippedImage, before: Image | None) -> Image:
    now = clock.now()
    image = Image(
        id=uuid7() if before is None else before.id,
        organization_id=None,
        name=shipped.name,
        source=ImageSource.SHIPPED,
        status=shipped.status,
        created_at=now if before is None else before.created_at,
        updated_at=now if before is None else before.updated_at,
        digest=shipped.digest,
        size_bytes=shipped.size_bytes,
        source_ref=shipped.name,
        last_error=shipped.message,
        config=ImageConfig(user=shipped.user, workdir=shipped.workdir, env=shipped.env),
        tools=shipped.tools,
    )
    return image if image == before else dataclasses.replace(image, updated_at=now)
