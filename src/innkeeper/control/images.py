"""Images: what the hosts say they have."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from innkeeper.control import clock
from innkeeper.control.access import require_any
from innkeeper.core.host_verbs import ListImages, to_wire
from innkeeper.core.image import Image
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import ImageNotFoundError
from innkeeper.store import images as store

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

HOST_SECONDS = 30.0


async def list_images(control: Control, principal: Principal) -> list[Image]:
    """All images, by name."""
    require_any(principal, Scope.PROFILES, Scope.ROOMS)
    return sorted(control.images.values(), key=lambda image: image.name)


async def get(control: Control, principal: Principal, name: str) -> Image:
    """One image. Raises ImageNotFoundError."""
    require_any(principal, Scope.PROFILES, Scope.ROOMS)
    image = control.images.get(name)
    if image is None:
        raise ImageNotFoundError
    return image


async def refresh(control: Control, host_id: UUID) -> str:
    """Ask a host for its images and keep what it says; the version of its agent."""
    answer = await control.bus.request(host_id, ListImages.verb, to_wire(ListImages()), timeout_seconds=HOST_SECONDS)
    reported = []
    for report in answer["images"]:
        try:
            reported.append(store.image_of(report))
        except ValueError:
            log.warning("a host reported an image that makes no sense", host_id=str(host_id))
    changed = [image for image in reported if control.images.get(image.name) != image]
    if changed:
        control.images.update({image.name: image for image in changed})
        await control.database.write(store.report, changed, clock.now())
        control.pools_hint.set()
    return str(answer["agent_version"])
