"""Images under `/v1/images`."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from innkeeper.api import sse
from innkeeper.api.body import stream_body
from innkeeper.api.json_app import CurrentPrincipal
from innkeeper.api.v1.schemas import (
    ImageAnswer,
    ImageImport,
    ImagesCollect,
    ImagesCollected,
    RegistryAnswer,
    RegistryLogin,
)
from innkeeper.control import image_imports, images, registries
from innkeeper.control.context import Control
from innkeeper.control.registries import RegistryView
from innkeeper.core.image import Image

MIB = 1_048_576
# What JsonGate must leave unread: archives.
ARCHIVE_PATH = r"/v1/images/[^/]+/archive"


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

    @router.post("/v1/images", status_code=202)
    async def import_image(principal: CurrentPrincipal, body: ImageImport) -> ImageAnswer:
        """Begin to import an image from a registry. 409 `conflict` while an image of that name is being made."""
        return image_answer(await image_imports.import_reference(control, principal, body.name, body.reference))

    @router.put(
        "/v1/images/{name}/archive",
        status_code=202,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            }
        },
    )
    async def import_archive(
        principal: CurrentPrincipal,
        name: str,
        request: Request,
        kind: Annotated[Literal["oci-archive", "docker-archive"], Query(alias="format")] = "oci-archive",
    ) -> ImageAnswer:
        """Import an image from an archive, which is the body; answers when all of it has arrived, and the import goes on."""
        pieces = stream_body(request.scope, request.receive, max_bytes=control.settings.import_max_mb * MIB)
        return image_answer(await image_imports.import_archive(control, principal, name, kind, pieces))

    @router.get(
        "/v1/images/{name}/import/events",
        response_class=StreamingResponse,
        responses={200: {"content": sse.CONTENT}},
    )
    async def import_events(
        principal: CurrentPrincipal,
        name: str,
        after: Annotated[int, Query(ge=0, le=2**31 - 1, description="Number of the last event already seen.")] = 0,
    ) -> StreamingResponse:
        """What the newest import of an image says, from its beginning, as server-sent events `step`, `output` and `end`; the stream ends with the import."""
        events = await image_imports.follow_log(control, principal, name, after=after)
        return sse.EventStream(sse.log_frames(events))

    @router.delete("/v1/images/{name}/import", status_code=204)
    async def cancel_import(principal: CurrentPrincipal, name: str) -> Response:
        """Give up an import; the answer comes when nothing of it is left. Safe to repeat."""
        await image_imports.cancel(control, principal, name)
        return Response(status_code=204)

    @router.get("/v1/registries")
    async def list_registries(principal: CurrentPrincipal) -> list[RegistryAnswer]:
        """The registries that the organization has a credential for."""
        return [registry_answer(one) for one in await registries.list_registries(control, principal)]

    @router.put("/v1/registries/{registry}")
    async def log_in(principal: CurrentPrincipal, registry: str, body: RegistryLogin) -> RegistryAnswer:
        """Keep a credential for a registry, in place of an earlier one; imports use it from now on."""
        return registry_answer(await registries.log_in(control, principal, registry, body.username, body.password))

    @router.delete("/v1/registries/{registry}", status_code=204)
    async def log_out(principal: CurrentPrincipal, registry: str) -> Response:
        """Forget the credential for a registry."""
        await registries.log_out(control, principal, registry)
        return Response(status_code=204)

    @router.get("/v1/images/{name}")
    async def get_image(principal: CurrentPrincipal, name: str) -> ImageAnswer:
        """One image."""
        return image_answer(await images.get(control, principal, name))

    @router.delete("/v1/images/{name}", status_code=204)
    async def remove_image(principal: CurrentPrincipal, name: str) -> Response:
        """Remove an image of the organization. 409 `conflict` while something uses it, saying what."""
        await images.remove(control, principal, name)
        return Response(status_code=204)


def registry_answer(view: RegistryView) -> RegistryAnswer:
    """A registry on the wire."""
    return RegistryAnswer(registry=view.registry, username=view.username, updated_at=view.updated_at)


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
