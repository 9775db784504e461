"""The wire models of snapshots, field by field as InstaVM documents them, and our own fields beside."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from innkeeper.core.registry import REFERENCE_MAX
from innkeeper.core.snapshot_build import DISK_GB_RANGE, MEMORY_MB_RANGE, VCPU_RANGE, SnapshotBuildRequest


class SnapshotCreate(BaseModel):
    """Body of POST /v1/vms/{vm_id}/snapshot."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(None, description="Default: the VM's id.")
    memory: bool = Field(True, description="With what runs in it; false: the disk alone.")


class SnapshotBuildArgs(BaseModel):
    """What is installed on the image, in this order."""

    model_config = ConfigDict(extra="forbid")

    extra_apt_packages: str | None = Field(None, description="Names, with versions where wanted; separated by spaces.")
    extra_pip_packages: str | None = Field(None, description="Likewise, for the image's python3.")
    extra_npm_packages: str | None = Field(None, description="Likewise, installed globally.")
    git_clone_url: str | None = Field(None, description="An https address; becomes /app/repo.")
    git_clone_branch: str | None = Field(None, description="A branch or a tag; default: the repository's own.")
    disk_size_gb: int | None = Field(
        None,
        ge=DISK_GB_RANGE[0],
        le=DISK_GB_RANGE[1],
        description="What its VMs can write, in GiB; default: as for other VMs.",
    )
    envs: dict[str, str] = Field({}, description="Variables of the build, and of all that runs in its VMs.")
    post_build_cmd: str | None = Field(None, description="Run last, by /bin/sh, in /app/repo where there is one.")


class SnapshotBuild(BaseModel):
    """Body of POST /v1/snapshots."""

    model_config = ConfigDict(extra="forbid")

    oci_image: str = Field(
        max_length=REFERENCE_MAX,
        description="registry/path[:tag][@sha256:…]; without a registry it is in the server's default one, where there is one.",
    )
    name: str | None = Field(None, description="Default: the image.")
    vcpu_count: int = Field(2, ge=VCPU_RANGE[0], le=VCPU_RANGE[1])
    memory_mb: int = Field(512, ge=MEMORY_MB_RANGE[0], le=MEMORY_MB_RANGE[1])
    type: Literal["user"] = Field("user", description="This server has no others.")
    build_args: SnapshotBuildArgs | None = None

    def request(self, *, default_registry: str) -> SnapshotBuildRequest:
        """What is asked for. Raises InvalidRequestError."""
        args = self.build_args or SnapshotBuildArgs()
        return SnapshotBuildRequest(
            oci_image=self.oci_image,
            name=self.name,
            vcpu_count=self.vcpu_count,
            memory_mb=self.memory_mb,
            disk_gb=args.disk_size_gb,
            apt=args.extra_apt_packages or "",
            pip=args.extra_pip_packages or "",
            npm=args.extra_npm_packages or "",
            git_url=args.git_clone_url,
            git_branch=args.git_clone_branch,
            envs=args.envs,
            command=args.post_build_cmd,
            default_registry=default_registry,
        )


class SnapshotChange(BaseModel):
    """Body of PATCH /v1/snapshots/{snapshot_id}."""

    model_config = ConfigDict(extra="forbid")

    name: str


class CheckAnswer(BaseModel):
    """One result of a verification."""

    name: str = Field(description="`disk`, `memory`, `agent`, `clock`, `entropy`, `identity`, `sentinel`.")
    ok: bool | None = Field(description="null: it could not be told.")
    detail: str


class SnapshotAnswer(BaseModel):
    """A snapshot."""

    id: str
    snapshot_id: str = Field(description="The same as `id`.")
    name: str
    type: str = Field(description="`user`.")
    status: str = Field(
        description="`building` while it is taken or built, then `ready` or `failed`; `deleted` in the answer to its deletion."
    )
    created_at: datetime
    vm_id: str | None = Field(description="Of which VM it was taken, by its first id; null: it is an image.")
    memory: bool = Field(description="Whether what ran is part of it.")
    downtime_ms: float | None = Field(
        description="How long the VM did not answer, at most; null where that is not known."
    )
    size_bytes: int | None = Field(
        description="Of disk and memory together, blocks that it shares with others included."
    )
    disk_bytes: int | None
    memory_bytes: int | None
    own_bytes: int | None = Field(description="What would be free without it now; null where its host cannot be asked.")
    shared_bytes: int | None = Field(description="The rest of `size_bytes`.")
    vcpu_count: int
    memory_mb: int
    disk_mb: int
    driver: str | None = Field(description="null: its VMs may have any.")
    image: str
    image_digest: str = Field(description="Empty where there is none yet.")
    parent_id: str | None = Field(description="The snapshot that its VM began with, which may be gone.")
    children: list[str] | None = Field(
        None, description="Those of VMs that began with it; only where one is asked for."
    )
    volumes: list[str] = Field(description="Volumes that were mounted, which are no part of it.")
    is_public: bool = Field(description="false.")
    oci_image: str | None = Field(description="What it was made of; null: of a VM.")
    last_error: str | None
    error: str | None = Field(description="The same: why it is `failed`.")
    damaged: bool = Field(description="Whether it is `failed` because it is not what was taken any more.")
    disk_digest: str | None = Field(description="Checksum of its disk; null until that has been read.")
    verified_at: datetime | None
    checks: list[CheckAnswer] = Field(description="What its last verification found; empty where there was none.")
