"""The wire models of retention: what of an organization goes by itself. All of it is ours."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from innkeeper.core.retention_policy import KEEP_LAST_MAX, MAX_AGE_DAYS_MAX, MAX_BYTES_MAX


class Rule(BaseModel):
    """What stays of one kind; null: without that limit."""

    model_config = ConfigDict(extra="forbid")

    keep_last: int | None = Field(None, ge=1, le=KEEP_LAST_MAX, description="So many of each VM or volume, the newest.")
    max_age_days: int | None = Field(None, ge=1, le=MAX_AGE_DAYS_MAX, description="Those that are no older.")
    max_bytes: int | None = Field(
        None, ge=1, le=MAX_BYTES_MAX, description="The newest that take no more together; the newest of each stays."
    )


class Policy(BaseModel):
    """The rules of an organization."""

    model_config = ConfigDict(extra="forbid")

    snapshots: Rule = Field(default_factory=Rule)
    volume_checkpoints: Rule = Field(default_factory=Rule)


class Apply(BaseModel):
    """Body of POST /v1/retention/apply."""

    model_config = ConfigDict(extra="forbid")

    remove: bool = Field(False, description="False: only tell what would go.")
    policy: Policy | None = Field(
        None, description="One to think about, in the place of the organization's; never with `remove`."
    )


class ExcessItem(BaseModel):
    """One that goes."""

    kind: str = Field(description="`snapshots` or `volume_checkpoints`.")
    id: str
    of: str = Field(description="Id of the VM that the snapshot is of, or of the volume.")
    name: str
    created_at: datetime
    size_bytes: int = Field(description="What is free without it.")
    reason: str = Field(description="The limit by which it goes.")
    stays: str | None = Field(description="Why it is still there.")


class Applied(BaseModel):
    """What goes, or went."""

    items: list[ExcessItem]
    removed: bool
    total_bytes: int = Field(description="Of those that do not stay.")
