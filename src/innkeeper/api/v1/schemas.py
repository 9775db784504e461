"""The wire models of our own endpoints under `/v1`, which the command line speaks."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field


def error_shape(code: str, message: str) -> dict[str, Any]:
    """The errors of `/v1`: `detail` is what the dialect's clients read, `code` is stable."""
    return {"detail": message, "code": code}


class DetailError(BaseModel):
    """Every error under `/v1`."""

    detail: str = Field(description="A sentence for people.")
    code: str = Field(description="A stable code.")


class TokenCreate(BaseModel):
    """Body of POST /v1/tokens."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=100)
    dialect: Literal["gentility", "instavm", "gentity", "starpod"] = Field(
        "gentility", description="Whose form the token is printed in; every form works everywhere."
    )
    test: bool = Field(False, description="Gentility's form only: `rk_test_` in place of `rk_live_`.")
    organization: str | None = Field(
        None,
        max_length=63,
        description="Name of the organization it is for; default: one's own. Only the operator may.",
    )
    scopes: list[Literal["rooms", "profiles", "tokens", "audit", "admin"]] | None = Field(
        None, description="Default: rooms, profiles, tokens, audit. Nobody can give a scope they lack."
    )


Limit = Annotated[int, Field(ge=0, le=2**31 - 1)] | None


class OrganizationLimits(BaseModel):
    """Body of PATCH /v1/organizations/{name}: fields that are absent stay."""

    model_config = ConfigDict(extra="forbid", strict=True)

    max_instances: Limit = Field(None, description="Rooms that may exist at one time; null: no limit.")
    max_memory_mb: Limit = Field(None, description="MiB that its instances may have together; null: no limit.")


class OrganizationCreate(OrganizationLimits):
    """Body of POST /v1/organizations."""

    name: str = Field(min_length=1, max_length=63, description="Of a-z, 0-9 and `-`; a letter or digit at both ends.")


class OrganizationAnswer(BaseModel):
    """A tenant and its limits; null is no limit."""

    id: UUID
    name: str
    max_instances: int | None
    max_memory_mb: int | None
    created_at: datetime


class TokenAnswer(BaseModel):
    """A token without its text."""

    id: UUID
    name: str
    prefix: str = Field(description="The first characters, so that people know which one it is.")
    dialect: str
    scopes: list[str]
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None


class TokenCreated(TokenAnswer):
    """A new token; the only answer that holds its text."""

    token: str


class ImageAnswer(BaseModel):
    """An image that the organization can use: its own, or one that comes with the server."""

    id: UUID
    name: str
    source: str = Field(description="`shipped`, `build` or `import`.")
    source_ref: str | None = Field(description="What it was made of: a recipe, a folder, an archive or a reference.")
    status: str = Field(description="`missing`, `building`, `ready` or `failed`.")
    digest: str = Field(description="SHA-256 of its file system; empty while nothing can be made of it.")
    size_bytes: int
    user: str
    workdir: str
    env: dict[str, str]
    entrypoint: list[str]
    cmd: list[str]
    exposed_ports: list[str]
    labels: dict[str, str]
    tools: list[str]
    created_at: datetime
    updated_at: datetime
    last_error: str | None = Field(description="Why the last attempt to make it failed.")


class AgentModelAnswer(BaseModel):
    """A model that an agent can use."""

    provider: str
    name: str
    label: str


class AgentAnswer(BaseModel):
    """An agent that comes with the server."""

    id: str
    name: str
    description: str
    available: bool
    reason: str | None = Field(description="Why it cannot be run now; null when it can.")
    image_digest: str = Field(description="What its instances are made of; empty while there is nothing.")
    cpus: int
    memory_mb: int
    volume_gb: int
    volume_mount: str
    port: int | None = Field(description="Where its page is served in the guest; null where it has none.")
    models: list[AgentModelAnswer]


class ImageBuildAnswer(BaseModel):
    """A build of an image."""

    id: UUID
    name: str = Field(description="Of the image.")
    status: str = Field(
        description="`waiting` (for its files), `running`, `ready`, `failed` or `cancelled`; the last three are ends."
    )
    error: str | None = Field(
        description="Why it failed: for a step its line, how it ended, and the end of its output."
    )
    digest: str | None = Field(description="SHA-256 of the image's file, once it is ready.")
    created_at: datetime
    ended_at: datetime | None


class Nothing(BaseModel):
    """A body without fields, for what takes no parameters."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ImageImport(BaseModel):
    """Body of POST /v1/images."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=192, description="Of the image: `name` or `name:tag`.")
    reference: str = Field(
        min_length=1,
        max_length=512,
        description="An image in a registry: `registry/path[:tag][@sha256:…]`; without both it is `latest`. Never a file.",
    )


class RegistryLogin(BaseModel):
    """Body of PUT /v1/registries/{registry}."""

    model_config = ConfigDict(extra="forbid", strict=True)

    username: str = Field(min_length=1, max_length=4_096)
    password: str = Field(min_length=1, max_length=4_096, description="Or an access token. It is never shown again.")


class RegistryAnswer(BaseModel):
    """A registry that the organization has a credential for."""

    registry: str
    username: str
    updated_at: datetime


class ImagesCollect(BaseModel):
    """Body of POST /v1/image-gc."""

    model_config = ConfigDict(extra="forbid", strict=True)

    build_cache: bool = Field(False, description="Remove all kept steps of image builds too.")


class ImagesCollected(BaseModel):
    """What a collection removed."""

    digests: list[str]
    freed_bytes: int
    build_steps: int = Field(description="Kept steps of image builds that were removed.")
    build_cache_bytes: int = Field(description="What the kept steps that are left take on the hosts.")


class IsolationAnswer(BaseModel):
    """What separates a guest from its host."""

    level: str = Field(description="`none`, `gvisor` or `microvm`.")
    driver: str
    platform: str
    accelerator: str | None = Field(None, description="`kvm` or `tcg` of a VM; null with gVisor.")
    reason: str


class HostName(BaseModel):
    """A host's id and name."""

    id: UUID
    name: str


class RoomRow(BaseModel):
    """A room of the organization."""

    profile_id: UUID
    profile_name: str
    room_id: str
    instance_id: UUID
    status: str
    failure: str | None
    isolation: IsolationAnswer | None
    created_at: datetime
    last_active_at: datetime | None
    host: HostName | None


class BootStepAnswer(BaseModel):
    """One provisioning step."""

    step: str
    at_ms: float = Field(description="Milliseconds since the provisioning began.")


class RoomDetail(RoomRow):
    """A room with where its start time went."""

    boot_trace: list[BootStepAnswer]


class PoolAnswer(BaseModel):
    """A warm pool of a host."""

    pool_key: str
    size: int
    ready: int


class LeakAnswer(BaseModel):
    """Something that a host has and nobody uses."""

    kind: str
    name: str
    owner: str = Field(
        description="Whom it belonged to: `machine <id>`, `instance <id>`, `disk <name>`, `slot <number>` or `server`."
    )


class DriverAnswer(BaseModel):
    """A driver of a host; `isolation` is null where it cannot run there, and `reason` says why."""

    driver: str
    isolation: IsolationAnswer | None
    reason: str
    capabilities: list[str] = Field(description="What it can do beyond running guests.")


class HostAnswer(BaseModel):
    """A host; the fields after `reachable` are null when it is not."""

    id: UUID
    name: str
    draining: bool = Field(description="It takes no new instances.")
    drain_deadline: datetime | None = Field(
        None, description="When its rooms take nothing more; null: they go on as long as they like."
    )
    rooms: int = Field(0, description="Rooms that lie on it.")
    open_calls: int = Field(0, description="Requests that are going on in their guests.")
    reachable: bool
    driver: str | None = Field(None, description="What guests get that do not ask for another.")
    platform: str | None = None
    isolation_level: str | None = None
    reason: str | None = None
    drivers: list[DriverAnswer] | None = Field(None, description="All of them.")
    cpus: int | None = None
    memory_mb: int | None = None
    memory_committed_mb: int | None = None
    disk_free_mb: int | None = None
    machines: int | None = None
    frozen: int | None = None
    pools: list[PoolAnswer] | None = None
    leaked: int | None = Field(None, description="Resources that belong to no instance; must be 0.")
    leaks: list[LeakAnswer] | None = Field(None, description="The first 1,000 of them.")
    version: str | None = None


class AuditEventAnswer(BaseModel):
    """Who did what to which object."""

    id: UUID
    at: datetime
    actor: str
    action: str
    object_type: str
    object_id: str
    details: dict[str, str]


class AuditPage(BaseModel):
    """Events, newest first."""

    events: list[AuditEventAnswer]
    next_cursor: str | None
