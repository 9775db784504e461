"""Volumes under `/v1/volumes`, and those of a VM."""

from __future__ import annotations

from fastapi import APIRouter

from innkeeper.api.json_app import CurrentPrincipal
from innkeeper.api.once import OnceId
from innkeeper.api.v1.volume_schemas import (
    CheckpointAnswer,
    CheckpointCreate,
    VmVolumeAnswer,
    VMVolumeMountRequest,
    VolumeAnswer,
    VolumeChange,
    VolumeCreate,
    VolumeUser,
)
from innkeeper.control import mount_work, mounts, vms, volumes
from innkeeper.control.context import Control
from innkeeper.control.volumes import VolumeView, parse_volume_id
from innkeeper.core.volume import Mount, MountRequest, VolumeStatus
from innkeeper.errors import CheckpointNotFoundError
from innkeeper.ids import parse_uuid


def add_volume_routes(router: APIRouter, control: Control) -> None:
    """Add the routes; each is one use case."""

    @router.post("/v1/volumes")
    async def create_volume(principal: CurrentPrincipal, body: VolumeCreate, once: OnceId) -> VolumeAnswer:
        """Make an empty volume."""
        made = await volumes.create(control, principal, name=body.name, quota_bytes=body.quota_bytes, volume_id=once)
        return _volume(made)

    @router.get("/v1/volumes")
    async def list_volumes(principal: CurrentPrincipal, refresh_usage: bool = False) -> list[VolumeAnswer]:
        """The organization's volumes, newest first. What they use is always as it is now."""
        return [_volume(one) for one in await volumes.list_volumes(control, principal)]

    @router.get("/v1/volumes/{volume_id}")
    async def get_volume(principal: CurrentPrincipal, volume_id: str, refresh_usage: bool = False) -> VolumeAnswer:
        """One volume."""
        return _volume(await volumes.find(control, principal, parse_volume_id(volume_id)))

    @router.patch("/v1/volumes/{volume_id}")
    async def change_volume(principal: CurrentPrincipal, volume_id: str, body: VolumeChange) -> VolumeAnswer:
        """Call it something else, or give it a larger quota."""
        changed = await volumes.change(
            control, principal, parse_volume_id(volume_id), name=body.name, quota_bytes=body.quota_bytes
        )
        return _volume(changed)

    @router.delete("/v1/volumes/{volume_id}")
    async def delete_volume(principal: CurrentPrincipal, volume_id: str) -> VolumeAnswer:
        """Delete it, with what is in it. 409 `volume_in_use` names the VMs that have it, 409 `conflict` a checkpoint."""
        return _volume(VolumeView(await volumes.delete(control, principal, parse_volume_id(volume_id))))

    @router.post("/v1/volumes/{volume_id}/checkpoints")
    async def create_checkpoint(
        principal: CurrentPrincipal, volume_id: str, body: CheckpointCreate, once: OnceId
    ) -> CheckpointAnswer:
        """Keep the volume as it is now; nobody can ever write that."""
        made = await volumes.create_checkpoint(
            control, principal, parse_volume_id(volume_id), name=body.name, checkpoint_id=once
        )
        return _checkpoint(made)

    @router.get("/v1/volumes/{volume_id}/checkpoints")
    async def list_checkpoints(principal: CurrentPrincipal, volume_id: str) -> list[CheckpointAnswer]:
        """The volume's checkpoints, newest first."""
        found = await volumes.list_checkpoints(control, principal, parse_volume_id(volume_id))
        return [_checkpoint(one) for one in found]

    @router.delete("/v1/volumes/{volume_id}/checkpoints/{checkpoint_id}")
    async def delete_checkpoint(principal: CurrentPrincipal, volume_id: str, checkpoint_id: str) -> CheckpointAnswer:
        """Delete it. 409 `volume_in_use` names the VMs that have it."""
        wanted = parse_uuid(checkpoint_id)
        if wanted is None:
            raise CheckpointNotFoundError
        gone = await volumes.delete_checkpoint(control, principal, parse_volume_id(volume_id), wanted)
        return _checkpoint(VolumeView(gone))

    @router.post("/v1/vms/{vm_id}/volumes")
    async def attach_volume(
        principal: CurrentPrincipal, vm_id: str, body: VMVolumeMountRequest, wait: bool = True
    ) -> VmVolumeAnswer:
        """Mount a volume in a VM that runs; answers when it is there, whatever `wait` says."""
        return _mount(await mounts.attach(control, principal, vm_id, mount_request(body)))

    @router.get("/v1/vms/{vm_id}/volumes")
    async def list_vm_volumes(principal: CurrentPrincipal, vm_id: str) -> list[VmVolumeAnswer]:
        """What the VM has."""
        entry = await vms.existing_entry(control, principal, vm_id)
        return [_mount(one) for one in mount_work.list_mounts(entry)]

    @router.delete("/v1/vms/{vm_id}/volumes/{volume_id}")
    async def detach_volume(
        principal: CurrentPrincipal, vm_id: str, volume_id: str, mount_path: str | None = None, wait: bool = True
    ) -> VmVolumeAnswer:
        """Take a volume from a VM; everything that was written is on it then. 409 `volume_in_use` names programs that have it open."""
        gone = await mounts.detach(control, principal, vm_id, parse_volume_id(volume_id), path=mount_path)
        return _mount(gone).model_copy(update={"status": "detached"})


def mount_request(body: VMVolumeMountRequest) -> MountRequest:
    """The use case's form of a body. Raises InvalidRequestError, VolumeNotFoundError."""
    return MountRequest(parse_volume_id(body.volume_id), body.mount_path, body.mode == "ro", body.checkpoint_id)


def _status(status: VolumeStatus) -> str:
    return "deleted" if status is VolumeStatus.DELETING else status.value


def _users(view: VolumeView) -> list[VolumeUser]:
    return [
        VolumeUser(
            vm_id=vm_id,
            mount_path=one.path,
            mode=one.mode,
            checkpoint_id=str(one.checkpoint_id) if one.checkpoint_id else None,
        )
        for vm_id, one in view.mounts
    ]


def _volume(view: VolumeView) -> VolumeAnswer:
    one = view.volume
    return VolumeAnswer(
        id=str(one.id),
        volume_id=str(one.id),
        name=one.name,
        quota_bytes=one.quota_bytes,
        used_bytes=view.used_bytes,
        own_bytes=view.own_bytes,
        status=_status(one.status),
        created_at=one.created_at,
        guest_written=view.guest_written,
        mounts=_users(view),
        error=one.error,
    )


def _checkpoint(view: VolumeView) -> CheckpointAnswer:
    one = view.volume
    return CheckpointAnswer(
        id=str(one.id),
        checkpoint_id=str(one.id),
        volume_id=str(one.checkpoint_of),
        name=one.name,
        quota_bytes=one.quota_bytes,
        used_bytes=view.used_bytes,
        own_bytes=view.own_bytes,
        status=_status(one.status),
        created_at=one.created_at,
        mounts=_users(view),
        error=one.error,
    )


def _mount(one: Mount) -> VmVolumeAnswer:
    return VmVolumeAnswer(
        volume_id=str(one.volume_id),
        mount_path=one.path,
        mode=one.mode,
        checkpoint_id=str(one.checkpoint_id) if one.checkpoint_id else None,
        status=one.state.value,
    )
