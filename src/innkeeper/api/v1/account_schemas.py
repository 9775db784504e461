"""The wire models of accounts: people, keys, usage and events, as InstaVM's clients read them."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field


class UserAnswer(BaseModel):
    """Who the key stands for."""

    id: UUID
    email: str | None
    name: str = Field(description="The organization.")
    is_verified: bool


class UsageSums(BaseModel):
    """What was used. The cost is at the prices that the operator set, 0 without."""

    cost_dollars: float
    cpu_hours: float = Field(description="Processor time of the guests, their start included.")
    ram_gib_hours: float = Field(description="Memory that guests were given, times how long they had it.")


class UsageDay(UsageSums):
    """One day in UTC."""

    date: date


class UsageBreakdown(BaseModel):
    """Usage by day, oldest first."""

    period_start: date
    period_end: date
    total_days: int
    totals: UsageSums
    daily_breakdown: list[UsageDay]


class ApiKeyCreate(BaseModel):
    """Body of POST /v1/api-keys/."""

    model_config = ConfigDict(extra="forbid", strict=True)

    description: str | None = Field(None, max_length=100)


class ApiKeyUpdate(BaseModel):
    """Body of PATCH /v1/api-keys/{key_id}."""

    model_config = ConfigDict(extra="forbid", strict=True)

    description: str = Field(min_length=1, max_length=100)


class ApiKeyAnswer(BaseModel):
    """A key without its text."""

    id: int
    description: str
    prefix: str = Field(description="The first characters, so that people know which one it is.")
    is_active: bool
    created_at: datetime
    last_used_at: datetime | None


class ApiKeyCreated(ApiKeyAnswer):
    """A new key; the only answer that holds its text."""

    api_key: str


class SshKeyCreate(BaseModel):
    """Body of POST /v1/ssh-keys."""

    model_config = ConfigDict(extra="forbid", strict=True)

    public_key: str = Field(max_length=16_384, description="A line as in a .pub file.")


class SshKeyAnswer(BaseModel):
    """A public key."""

    id: int
    fingerprint: str = Field(description="`SHA256:` and base64, as ssh-keygen -l prints it.")
    comment: str
    public_key: str
    created_at: datetime


class SshKeyList(BaseModel):
    """The organization's keys."""

    keys: list[SshKeyAnswer]


class SshGatewayAnswer(BaseModel):
    """Where the SSH gateway is; all but `enabled` are null where there is none."""

    enabled: bool
    address: str | None = Field(description="Where it listens.")
    port: int | None
    host: str | None = Field(description="The host that clients are told, as `ssh_host` of VMs.")
    host_key: str | None = Field(description="Kind and base64, as in known_hosts.")
    fingerprint: str | None = Field(description="Of that key, as ssh shows it.")


class StatusAnswer(BaseModel):
    """That it was done."""

    status: str


class EventCatalog(BaseModel):
    """Every type of event by its group."""

    catalog: dict[str, list[str]]


class EventAnswer(BaseModel):
    """One event of the audit log."""

    id: UUID
    created_at: datetime
    status: str = Field(description="`success` or `failure`.")
    event_type: str
    vm_id: str | None
    session_id: str | None
    resource_id: str
    resource_type: str
    actor_id: str
    actor_type: str = Field(description="`token`, `ssh_key`, `operator` or `system`.")
    event_payload: dict[str, Any]
    error_message: str | None


class EventPage(BaseModel):
    """Events, newest first."""

    items: list[EventAnswer]
    next_cursor: str | None = Field(description="Continues with older ones; null at the end.")
