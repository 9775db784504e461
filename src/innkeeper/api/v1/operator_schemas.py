"""The wire models of the operator's endpoints under `/v1`."""

from __future__ import annotations

from typing import Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field


class DiagnosisAsk(BaseModel):
    """Body of POST /v1/diagnosis."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["stacks", "tasks", "memory"] = Field(description="What is looked at.")
    seconds: float = Field(5.0, ge=0, le=60, description="How long `stacks` and `memory` look.")
    host_id: UUID | None = Field(None, description="The daemon of this host; null: the API process.")


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
