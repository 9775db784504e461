"""The wire models of the operator's endpoints under `/v1`."""

from __future__ import annotations

from typing import Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field


class DiagnosisAsk(BaseModel):
    """Body of POST /v1/diagnosis."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["stacks", "tasks", "memory", "guest"] = Field(description="What is looked at.")
    seconds: float = Field(5.0, ge=0, le=60, description="How long `stacks` and `memory` look.")
    host_id: UUID | None = Field(None, description="The daemon of this host; null: the API process.")
    instance_id: UUID | None = Field(None, description="With `guest`: the instance whose agent is asked.")


class DrainChange(BaseModel):
    """Body of POST /v1/hosts/{host_id}/drain."""

    model_config = ConfigDict(extra="forbid", strict=True)

    draining: bool = Field(description="True: it takes no new instances; false: it does again.")
    deadline_seconds: float | None = Field(
        None,
        ge=0,
        le=31_536_000,
        description="From now until its rooms take nothing more either; null: no end. Only with `draining`.",
    )


class LogLevelChange(BaseModel):
    """Body of PUT /v1/log-level."""

    model_config = ConfigDict(extra="forbid")

    level: Literal["debug", "info", "warning", "error"]


class LevelAnswer(BaseModel):
    """From which level on a process logs."""

    process: str = Field(description="`api` or `host`.")
    host_id: UUID | None
    level: str


class ProfileRoomAnswer(BaseModel):
    """How many more rooms of a profile would be taken now."""

    profile_id: UUID
    profile_name: str
    organization: str
    memory_mb: int
    more: int = Field(description="Rooms that would be taken, were no other profile's made.")
    bound_by: str = Field(description="`memory`, `disk`, `slots`, `organization` or `draining`.")


class CapacityAnswer(BaseModel):
    """What a host has room for, in MiB."""

    host_id: UUID
    name: str
    draining: bool
    memory_mb: int
    memory_reserve_mb: int
    memory_overcommit: float
    memory_limit_mb: int = Field(description="What guests may be promised: (memory - reserve) x overcommit.")
    memory_committed_mb: int = Field(description="What they are promised; frozen ones count a quarter.")
    memory_warm_mb: int = Field(description="Of these, what warm guests would give up for an instance.")
    disk_free_mb: int
    disk_reserve_mb: int
    disk_pool_mb: int
    slots: int = Field(description="Places on the network.")
    slots_used: int
    starts_waiting: int
    executions_waiting: int
    instances: dict[str, int] = Field(description="By state.")
    profiles: list[ProfileRoomAnswer]


class DiskItem(BaseModel):
    """What all things of a kind of an organization take."""

    organization: str | None = Field(description="Its name; null for the server's own.")
    kind: str
    count: int
    size_bytes: int = Field(description="With blocks that are shared with others.")
    own_bytes: int = Field(description="Without them.")


class DiskAnswer(BaseModel):
    """What takes the space of the state directory, the most first."""

    items: list[DiskItem]
    total_bytes: int = Field(description="The sum of `own_bytes`: what the state directory takes.")


class GarbageAsk(BaseModel):
    """Body of POST /v1/hosts/{host_id}/gc."""

    model_config = ConfigDict(extra="forbid", strict=True)

    remove: bool = Field(False, description="Remove it; else it is only listed.")
    remove_volumes: bool = Field(False, description="With `remove`: volumes too, which are users' data.")


class GarbageItem(BaseModel):
    """A thing that nothing needs."""

    kind: str = Field(
        description="`image`, `temporary`, `trash`, `agent`, `disk`, `checkpoint`, `volume`, `kernel`, `template`, `baseline` or `journals`."
    )
    name: str
    size_bytes: int


class GarbageAnswer(BaseModel):
    """What could go, or went."""

    removed: bool
    items: list[GarbageItem]
    total_bytes: int
