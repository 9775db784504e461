"""The wire models of VMs and sessions, field by field as InstaVM documents them, and our own fields beside."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, field_validator

from innkeeper.api.v1.share_schemas import ShareAnswer, ShareRequest
from innkeeper.api.v1.volume_schemas import VMVolumeMountRequest


class FieldProblem(BaseModel):
    """What is wrong with one field."""

    loc: list[str | int] = Field(description="Where: `body`, `query` or `path`, then the names inside.")
    msg: str
    type: str


class FieldProblems(BaseModel):
    """A request that is not valid."""

    detail: list[FieldProblem]


class _NotInForce(BaseModel):
    """Fields that clients know and this server does not do: refused by name, never accepted and ignored."""

    model_config = ConfigDict(extra="forbid")

    vault_ids: Annotated[list[str], Field(max_length=0)] | None = Field(None, description="Only `[]`.")
    auto_suspend: bool | None = Field(
        None, description="Suspend it where it would end for its lifetime or for being idle; default: false."
    )
    auto_resume: bool | None = Field(None, description="Wake it when it is used while suspended; default: true.")

    @field_validator("vault_ids", mode="wrap")
    @classmethod
    def _say_why(cls, value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValueError:
            raise ValueError("is not supported by this server") from None


class VmShape(BaseModel):
    """What VM and session requests have in common."""

    vm_lifetime_seconds: int | None = Field(None, description="From the creation of the VM on; default: the server's.")
    memory_mb: int | None = Field(None, description="MiB; default: the server's.")
    vcpu_count: int | None = Field(None, description="Default: the server's.")
    metadata: dict[str, Any] | None = Field(None, description="Yours; at most 16 KiB.")
    env: dict[str, str] | None = Field(
        None, repr=False, description="Variables of everything that runs in it. They are never shown again."
    )


class VMCreateRequest(_NotInForce, VmShape):
    """Body of POST /v1/vms."""

    session_id: str | None = Field(None, description="Attach to this session's VM, or make its next one.")
    image_variant: str | None = Field(None, max_length=255, description="`standard`, or the name of an image.")
    idle_seconds: int | None = Field(None, description="End the VM when it was idle this long; null: never.")
    egress_policy: dict[str, Any] | None = Field(None, description="What it may connect to; null: the internet.")
    driver: str | None = Field(None, description="`auto`, `gvisor` or `qemu`; null: `auto`.")
    min_isolation: str | None = Field(
        None, description="Weakest isolation that is acceptable: `none`, `gvisor` or `microvm`; null: `gvisor`."
    )
    share: ShareRequest | None = Field(None, description="A port to publish at once.")
    snapshot_id: UUID | None = Field(None, description="The snapshot that it begins with.")
    snapshot_on_terminate: bool | None = Field(None, description="Take a snapshot before it ends.")
    snapshot_name: str | None = Field(None, description="What that is called; default: the VM's id.")
    custom_domain: None = Field(None, description="Only null.")
    volumes: list[VMVolumeMountRequest] | None = Field(
        None, description="What it is to have, from its first moment on."
    )

    @field_validator("custom_domain", mode="wrap")
    @classmethod
    def _refuse(cls, value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValueError:
            raise ValueError("is not supported by this server") from None


class VMCreateResponse(BaseModel):
    """A VM that was asked for."""

    vm_id: str | None
    session_id: str
    status: str
    share: ShareAnswer | None = None
    custom_domain: dict[str, Any] | None = None
    env_status: str = Field("none", description="`none`, `applied` or `failed`.")
    env_error: str | None = None


class VmClone(BaseModel):
    """Body of POST /v1/vms/{vm_id}/clone."""

    model_config = ConfigDict(extra="forbid")

    snapshot_name: str | None = Field(None, description="Keep the moment as a snapshot of this name; null: not.")


class VmFork(VmClone):
    """Body of POST /v1/vms/{vm_id}/fork."""

    count: int = Field(1, description="How many, 1 to 100.")


class VmClonedAnswer(BaseModel):
    """A clone."""

    vm_id: str
    session_id: str
    status: str
    snapshot_id: str | None = Field(description="The moment, where it is kept.")
    volumes: list[str] = Field(description="Volumes that its original has mounted, which it has not.")


class VmForkedAnswer(BaseModel):
    """One VM of a fork, or why there is none."""

    vm_id: str | None
    session_id: str | None
    status: str
    error: str | None


class VmForksAnswer(BaseModel):
    """What came of a fork."""

    vms: list[VmForkedAnswer]
    snapshot_id: str | None = Field(description="The moment, where it is kept.")
    volumes: list[str] = Field(description="Volumes that their original has mounted, which they have not.")


class VmIsolation(BaseModel):
    """What separates the VM from its host."""

    level: str = Field(description="`none`, `gvisor` or `microvm`.")
    driver: str
    platform: str
    accelerator: str | None = Field(description="`kvm` or `tcg`; null with gVisor.")
    reason: str


class VmBootStep(BaseModel):
    """One step of the last start, `at_ms` after its beginning."""

    step: str
    at_ms: float


class VmHost(BaseModel):
    """Where the VM is."""

    id: str
    name: str


class VmRecord(BaseModel):
    """A VM, living or ended."""

    vm_id: str
    session_id: str
    status: str = Field(description="`creating`, `active`, `suspending`, `suspended`, `error` or `killed`.")
    created_at: datetime
    expires_at: datetime
    last_active_at: datetime | None
    ended_at: datetime | None
    end_reason: str | None = Field(description="`deleted`, `killed`, `expired`, `idle` or `lost`.")
    error: str | None = Field(description="Why it is in `error`.")
    vm_lifetime_seconds: int
    memory_mb: int = Field(description="Of its machine; `next_memory_mb` is what its next start gets.")
    next_memory_mb: int
    vcpu_count: int
    disk_mb: int
    metadata: dict[str, Any]
    image: str
    image_variant: str | None
    image_digest: str
    idle_seconds: int | None
    egress_policy: dict[str, Any] | None
    driver: str
    min_isolation: str
    hold_until: datetime | None
    hold_reason: str | None
    auto_suspend: bool
    auto_resume: bool
    suspend_reason: str | None = Field(description="Why it is suspended: `asked`, `expired` or `idle`.")
    woken_by: str | None = Field(description="Whose use woke it last.")
    env_status: str
    env_error: str | None
    snapshot_id: str | None = Field(description="What it began with.")
    restored: str | None = Field(description="How it did: `memory` where what ran goes on, or `disk`.")
    snapshot_on_terminate: bool
    snapshot_name: str | None
    isolation: VmIsolation | None
    boot_trace: list[VmBootStep]
    host: VmHost | None
    ssh_host: str | None = Field(
        description="Host of the SSH gateway; null where there is none, or where it has the API's name."
    )


class VmUpdate(_NotInForce):
    """Body of PATCH /v1/vms/{vm_id}: what is absent stays."""

    memory_mb: int | None = Field(None, description="From the next start on.")
    metadata: dict[str, Any] | None = None
    vm_lifetime_seconds: int | None = Field(None, description="From now on.")
    idle_seconds: int | None = Field(None, description="null: never.")
    snapshot_on_terminate: bool | None = None
    snapshot_name: str | None = None


class VmHold(BaseModel):
    """Body of POST /v1/vms/{vm_id}/hold."""

    model_config = ConfigDict(extra="forbid")

    seconds: int = Field(description="0 gives the lease back; the lifetime that it added stays.")
    reason: str = ""


class StagedVariable(BaseModel):
    """One variable."""

    model_config = ConfigDict(extra="forbid")

    env_name: str
    value: str = Field(repr=False)


class StageEnv(BaseModel):
    """Body of POST /v1/vms/{vm_id}/stage-env."""

    model_config = ConfigDict(extra="forbid")

    entries: list[StagedVariable] = Field(max_length=1_000)


class Staged(BaseModel):
    """The names that were staged."""

    status: str
    staged: list[str]


class VmEventAnswer(BaseModel):
    """Something that happened to a VM, or is going to."""

    id: str
    at: datetime
    type: str = Field(
        description="`created`, `restored`, `ready`, `stopped`, `failed`, `snapshot`, `held`, `released`, "
        "`suspended`, `suspend_failed`, `resumed`, `expiring` or `ending`."
    )
    reason: str
    details: dict[str, str]


class SessionCreate(VmShape):
    """Body of POST /v1/sessions/session, which may carry the key in the place of a header."""

    model_config = ConfigDict(extra="forbid")

    api_key: str | None = Field(None, repr=False)


class SessionAnswer(BaseModel):
    """A session."""

    session_id: str
    created_at: datetime
    vm_id: str | None
    status: str | None = Field(description="Of its last VM.")


class SessionStatus(BaseModel):
    """A session and its last VM."""

    session_id: str
    exists: bool
    vm_assigned: bool
    vm_alive: bool
    vm_status: str | None
    vm_id: str | None
    uptime_seconds: float | None
    expires_in_seconds: float | None
    created_at: datetime


class SessionUsage(BaseModel):
    """What the session's living VM is made of and for how long it lives; zeros where none does."""

    session_id: str
    vm_id: str | None
    vcpu_count: int
    memory_mb: int
    disk_mb: int
    uptime_seconds: float


class SessionKill(BaseModel):
    """Body of POST /kill."""

    model_config = ConfigDict(extra="forbid")

    session_id: str


class Killed(BaseModel):
    """The VM that was ended."""

    status: str
    session_id: str
    vm_id: str | None
