"""Snapshots under `/v1/snapshots`, and of a VM."""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from innkeeper.api import sse
from innkeeper.api.json_app import CurrentPrincipal
from innkeeper.api.v1.schemas import Nothing
from innkeeper.api.v1.snapshot_schemas import (
    CheckAnswer,
    SnapshotAnswer,
    SnapshotBuild,
    SnapshotChange,
    SnapshotCreate,
)
from innkeeper.control import snapshot_builds, snapshot_checks, snapshots
from innkeeper.control.context import Control
from innkeeper.control.snapshots import SnapshotView
from innkeeper.core.snapshot import SnapshotStatus
from innkeeper.core.vm import vm_id as id_of_vm
from innkeeper.errors import SnapshotNotFoundError
from innkeeper.ids import parse_uuid

_SHOWN = {
    SnapshotStatus.CREATING: "building",
    SnapshotStatus.READY: "ready",
    SnapshotStatus.FAILED: "failed",
    SnapshotStatus.DELETING: "deleted",
    SnapshotStatus.DAMAGED: "failed",
}


def add_snapshot_routes(router: APIRouter, control: Control) -> None:
    """Add the routes; each is one use case."""

    @router.post("/v1/vms/{vm_id}/snapshot")
    async def take_snapshot(
        principal: CurrentPrincipal, vm_id: str, body: SnapshotCreate, wait: bool = True
    ) -> SnapshotAnswer:
        """Keep the VM as it is at one moment; it goes on. 409 `checkpoint_failed` says why it cannot be. With `wait=false` at once, `building`."""
        name = vm_id if body.name is None else body.name
        taken = await snapshots.take(control, principal, vm_id, name=name, memory=body.memory, wait=wait)
        return _answer(SnapshotView(taken))

    @router.post("/v1/snapshots")
    async def build_snapshot(principal: CurrentPrincipal, body: SnapshotBuild) -> SnapshotAnswer:
        """Begin to make a snapshot of an OCI image, with what is to be installed on it; `building` at first. 400 or 422 names what cannot be asked for."""
        request = body.request(default_registry=control.settings.default_registry)
        return _answer(SnapshotView(await snapshot_builds.build(control, principal, request)))

    @router.get("/v1/snapshots")
    async def list_snapshots(
        principal: CurrentPrincipal, of_type: Annotated[Literal["user", "system"], Query(alias="type")] = "user"
    ) -> list[SnapshotAnswer]:
        """The organization's snapshots, newest first; of the type `system` there are none."""
        found = await snapshots.list_snapshots(control, principal)
        return [_answer(one) for one in found] if of_type == "user" else []

    @router.get("/v1/snapshots/{snapshot_id}")
    async def get_snapshot(principal: CurrentPrincipal, snapshot_id: str) -> SnapshotAnswer:
        """One snapshot, with those that came of it."""
        view = await snapshots.find(control, principal, parse_snapshot_id(snapshot_id))
        return _answer(view).model_copy(update={"children": [str(one) for one in view.children]})

    @router.get(
        "/v1/snapshots/{snapshot_id}/log",
        response_class=StreamingResponse,
        responses={200: {"content": sse.CONTENT}},
    )
    async def snapshot_log(
        principal: CurrentPrincipal,
        snapshot_id: str,
        after: Annotated[int, Query(ge=0, le=2**31 - 1, description="Number of the last event already seen.")] = 0,
    ) -> StreamingResponse:
        """What the build says, from its beginning, as server-sent events `step`, `output`, `note` and `end`; the stream ends with the build."""
        events = await snapshots.events(control, principal, parse_snapshot_id(snapshot_id), after=after)
        return sse.EventStream(sse.log_frames(events))

    @router.patch("/v1/snapshots/{snapshot_id}")
    async def rename_snapshot(principal: CurrentPrincipal, snapshot_id: str, body: SnapshotChange) -> SnapshotAnswer:
        """Call it something else."""
        return _answer(await snapshots.rename(control, principal, parse_snapshot_id(snapshot_id), body.name))

    @router.post("/v1/snapshots/{snapshot_id}/verify")
    async def verify_snapshot(principal: CurrentPrincipal, snapshot_id: str, body: Nothing) -> SnapshotAnswer:
        """Start it in a guest that goes afterwards, and tell whether it is what was taken. 409 `conflict` while it is not ready, or is being worked on."""
        return _answer(SnapshotView(await snapshot_checks.verify(control, principal, parse_snapshot_id(snapshot_id))))

    @router.delete("/v1/snapshots/{snapshot_id}")
    async def delete_snapshot(principal: CurrentPrincipal, snapshot_id: str) -> SnapshotAnswer:
        """Delete it; VMs that began with it keep what they have. 409 `conflict` names the VM that is still to begin with it."""
        return _answer(SnapshotView(await snapshots.delete(control, principal, parse_snapshot_id(snapshot_id))))


def parse_snapshot_id(text: str) -> UUID:
    """The id of a snapshot. Raises SnapshotNotFoundError for what is none."""
    value = parse_uuid(text)
    if value is None:
        raise SnapshotNotFoundError
    return value


def _answer(view: SnapshotView) -> SnapshotAnswer:
    one = view.snapshot
    size = None if one.disk_bytes is None else one.disk_bytes + (one.memory_bytes or 0)
    return SnapshotAnswer(
        id=str(one.id),
        snapshot_id=str(one.id),
        name=one.name,
        type="user",
        status=_SHOWN[one.status],
        created_at=one.created_at,
        vm_id=None if one.instance_id is None else id_of_vm(one.instance_id, 1),
        memory=one.memory,
        downtime_ms=one.downtime_ms,
        size_bytes=size,
        disk_bytes=one.disk_bytes,
        memory_bytes=one.memory_bytes,
        own_bytes=view.own_bytes,
        shared_bytes=None if size is None or view.own_bytes is None else max(0, size - view.own_bytes),
        vcpu_count=one.vcpu_count,
        memory_mb=one.memory_mb,
        disk_mb=one.disk_mb,
        driver=one.driver,
        image=one.image,
        image_digest=one.image_digest,
        parent_id=None if one.parent_id is None else str(one.parent_id),
        volumes=[str(volume) for volume in one.volumes],
        is_public=False,
        oci_image=one.oci_image,
        last_error=one.error,
        error=one.error,
        damaged=one.status is SnapshotStatus.DAMAGED,
        disk_digest=one.disk_digest,
        verified_at=one.verified_at,
        checks=[CheckAnswer(name=check.name, ok=check.ok, detail=check.detail) for check in one.checks],
    )
