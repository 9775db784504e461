"""Images under `/v1/images`."""

from __future__ import annotations

from fastapi import APIRouter, Response

from innkeeper.api.json_app import CurrentPrincipal
from innkeeper.api.v1.schemas import ImageAnswer, ImagesCollect, ImagesCollected
from innkeeper.control import images
from innkeeper.control.context import Control
from innkeeper.core.image import Image


def add_image_routes(router: APIRouter, control: Control) -> None:
    """Add the routes; each is one use case."""

    @router.get("/v1/images")
    async def list_images(principal: CurrentPrincipal) -> list[ImageAnswer]:
        """The organization's images and the shipped ones, by name."""
        return [image_answer(image) for image in await images.list_images(control, principal)]

    @router.post("/v1/image-gc")
    async def collect_images(principal: CurrentPrincipal, body: ImagesCollect) -> ImagesCollected:
        """Remove the files of images that nobody has and nothing uses any more, and kept build steps beyond their limit. Scope `admin`."""
        done = await images.collect(control, principal, build_cache=body.build_cache)
        return ImagesCollected(
            digests=list(done.digests),
            freed_bytes=done.freed_bytes,
            build_steps=done.build_steps,
            build_cache_bytes=done.build_cache_bytes,
        )

    @router.get("/v1/images/{name}")
    async def get_image(principal: CurrentPrincipal, name: str) -> ImageAnswer:
        """One image."""
        return image_answer(await images.get(control, principal, name))

    @router.delete("/v1/images/{name}", status_code=204)
    async def remove_image(principal: CurrentPrincipal, name: str) -> Response:
        """Remove an image of the organization. 409 `conflict` while something uses it, saying what."""
        await images.remove(control, principal, name)
        return Response(status_code=204)


def image_answer(image: Image) -> ImageAnswer:
    """An image on the wire."""
    config = image.config
    return ImageAnswer(
        id=image.id,
        name=image.name,
        source=str(image.source),
        source_ref=image.source_ref,
        status=str(image.status),
        digest=image.digest,
        size_bytes=image.size_bytes,
        user=config.user,
        workdir=config.workdir,
        env=config.env,
        entrypoint=list(config.entrypoint),
        cmd=list(config.cmd),
        exposed_ports=list(config.exposed_ports),
        labels=config.labels,
        tools=list(image.tools),
        created_at=image.created_at,
        updated_at=image.updated_at,
        last_error=image.last_error,
    )
