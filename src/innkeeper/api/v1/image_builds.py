"""Builds of images under `/v1/image-builds`: begin one, send its files, follow and cancel it."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from innkeeper.api import sse
from innkeeper.api.body import stream_body
from innkeeper.api.json_app import CurrentPrincipal, PathUuid
from innkeeper.api.v1.schemas import ImageBuildAnswer, Nothing
from innkeeper.control import image_builds
from innkeeper.control.context import Control
from innkeeper.control.image_builds import BuildRequest
from innkeeper.core.dockerfile import MAX_BYTES
from innkeeper.core.image_build import ImageBuild

MIB = 1_048_576
# What JsonGate must leave unread: the files of a build.
CONTEXT_PATH = r"/v1/image-builds/[^/]+/context"


class ImageBuildCreate(BaseModel):
    """Body of POST /v1/image-builds."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=192, description="Of the image: `name` or `name:tag`.")
    dockerfile: str = Field(max_length=MAX_BYTES, description="The text of the Dockerfile.")
    build_args: dict[str, str] = Field({}, description="Values for its ARGs.")
    target: str | None = Field(None, max_length=200, description="The stage to build; default: the last one.")
    cache: bool = Field(True, description="Use steps that are kept from earlier builds.")
    context: bool = Field(
        True, description="Files will be sent with PUT /v1/image-builds/{id}/context; the build waits."
    )
    egress: Literal["internet", "none"] = Field("internet", description="What RUN may reach.")


def add_build_routes(router: APIRouter, control: Control) -> None:
    """Add the routes; each is one use case."""

    @router.post("/v1/image-builds", status_code=201)
    async def create_build(principal: CurrentPrincipal, body: ImageBuildCreate) -> ImageBuildAnswer:
        """Begin to build an image of a Dockerfile. 400 `invalid_request` names the line that cannot be built; 409 `conflict` while the image is being made."""
        request = BuildRequest(
            name=body.name,
            dockerfile=body.dockerfile,
            build_args=body.build_args,
            target=body.target,
            use_cache=body.cache,
            context=body.context,
            egress_mode=body.egress,
        )
        return _answer(await image_builds.create(control, principal, request))

    @router.put(
        "/v1/image-builds/{build_id}/context",
        status_code=204,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            }
        },
    )
    async def put_context(principal: CurrentPrincipal, build_id: PathUuid, request: Request) -> Response:
        """Send the files of a build as one tar stream of regular files, directories and symlinks; the build then goes on."""
        pieces = stream_body(request.scope, request.receive, max_bytes=control.settings.build_context_mb * MIB)
        await image_builds.put_context(control, principal, build_id, pieces)
        return Response(status_code=204)

    @router.get("/v1/image-builds")
    async def list_builds(
        principal: CurrentPrincipal,
        name: Annotated[str | None, Query(max_length=192)] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> list[ImageBuildAnswer]:
        """The organization's builds, newest first; with `name` those of one image. The newest 50 are kept."""
        return [_answer(one) for one in await image_builds.list_builds(control, principal, name=name, limit=limit)]

    @router.get("/v1/image-builds/{build_id}")
    async def get_build(principal: CurrentPrincipal, build_id: PathUuid) -> ImageBuildAnswer:
        """One build."""
        return _answer(await image_builds.get(control, principal, build_id))

    @router.post("/v1/image-builds/{build_id}/cancel")
    async def cancel_build(principal: CurrentPrincipal, build_id: PathUuid, body: Nothing) -> ImageBuildAnswer:
        """Stop a build. The body is `{}`; the answer comes when nothing of it runs. Safe to repeat; a build that has ended stays as it is."""
        return _answer(await image_builds.cancel(control, principal, build_id))

    @router.get(
        "/v1/image-builds/{build_id}/events",
        response_class=StreamingResponse,
        responses={200: {"content": sse.CONTENT}},
    )
    async def build_events(
        principal: CurrentPrincipal,
        build_id: PathUuid,
        after: Annotated[int, Query(ge=0, le=2**31 - 1, description="Number of the last event already seen.")] = 0,
    ) -> StreamingResponse:
        """What a build says, from its beginning, as server-sent events `step`, `output`, `note` and `end`; the stream ends with the build."""
        events = await image_builds.events(control, principal, build_id, after=after)
        return sse.EventStream(sse.log_frames(events))


def _answer(build: ImageBuild) -> ImageBuildAnswer:
    return ImageBuildAnswer(
        id=build.id,
        name=build.name,
        status=str(build.status),
        error=build.error,
        digest=build.digest,
        created_at=build.created_at,
        ended_at=build.ended_at,
    )
