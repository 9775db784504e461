"""The wire models of volumes, field by field as InstaVM documents them, and our own fields beside."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class VolumeCreate(BaseModel):
    """Body of POST /v1/volumes."""

    model_config = ConfigDict(extra="forbid")

    name: str
    quota_bytes: int = Field(description="Rounded up to whole MiB.")


class VolumeChange(BaseModel):
    """Body of PATCH /v1/volumes/{volume_id}."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    quota_bytes: int | None = Field(None, description="Only more than it has, while nobody has it mounted.")


class CheckpointCreate(BaseModel):
    """Body of POST /v1/volumes/{volume_id}/checkpoints."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(None, description="Default: the time.")


class VMVolumeMountRequest(BaseModel):
    """A volume that a VM is to have."""

    model_config = ConfigDict(extra="forbid")

    volume_id: str
    mount_path: str = Field(description="Absolute; nothing or an empty directory is there.")
    mode: Literal["rw", "ro"] = Field("rw", description="`rw`, by one VM at a time, or `ro`.")
    checkpoint_id: str | None = Field(None, description="A checkpoint of it instead, or `latest`; `ro` then.")


class VolumeUser(BaseModel):
    """A VM that has a volume, or a checkpoint of it."""

    vm_id: str
    mount_path: str
    mode: str
    checkpoint_id: str | None


class VolumeAnswer(BaseModel):
    """A volume."""

    id: str
    volume_id: str = Field(description="The same as `id`.")
    name: str
    quota_bytes: int
    used_bytes: int | None = Field(
        description="Blocks that it takes, those that it shares with checkpoints included; null where its host cannot be asked."
    )
    own_bytes: int | None = Field(description="Those that it shares with nothing: what would be free without it.")
    status: str = Field(description="`creating`, `ready` or `failed`; `deleted` in the answer to its deletion.")
    created_at: datetime
    guest_written: bool | None = Field(
        description="Whether a virtual machine may have written it: then no guest of gVisor's gets it any more."
    )
    mounts: list[VolumeUser]
    error: str | None = Field(description="Why it is `failed`.")


class CheckpointAnswer(BaseModel):
    """A checkpoint of a volume."""

    id: str
    checkpoint_id: str = Field(description="The same as `id`.")
    volume_id: str
    name: str
    quota_bytes: int
    used_bytes: int | None
    own_bytes: int | None
    status: str
    created_at: datetime
    mounts: list[VolumeUser]
    error: str | None


class VmVolumeAnswer(BaseModel):
    """A volume that a VM has."""

    volume_id: str
    mount_path: str
    mode: str
    checkpoint_id: str | None
    status: str = Field(description="`attaching`, `attached` or `detaching`; `detached` in the answer to that.")
