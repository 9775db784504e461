"""The wire models of the Gentility dialect: what it documents, and our documented extras. Unknown fields are refused, types are strict."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from innkeeper.core.instance import ASLEEP, PROVISIONING, InstanceState

Status = Literal["active", "network_allocated", "ftap_created", "image_generated", "vm_started", "vm_booted", "ready"]
assert Status.__args__ == tuple(str(state) for state in PROVISIONING)  # type: ignore[attr-defined]  # noqa: S101


def error_shape(code: str, message: str) -> dict[str, Any]:
    """The dialect's errors."""
    return {"error": code, "message": message}


def show_state(state: InstanceState) -> str:
    """How a state is shown: a room that sleeps is `ready`, because it wakes on use."""
    return "ready" if state in ASLEEP else str(state)


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain NUL")
    return value


Text = Annotated[str, AfterValidator(_no_nul)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorAnswer(BaseModel):
    """Every error of this dialect."""

    error: str = Field(description="A stable code.", examples=["instance_not_ready"])
    message: str = Field(description="A sentence for people.")


class RoomRequest(_Request):
    """Body of the room endpoint; may be absent."""

    host_id: UUID | None = Field(
        None, description="The host the room must be on. 409 `host_mismatch` when it lives on another."
    )


class Named(BaseModel):
    """An object's id and name."""

    id: UUID
    name: str


class RoomAnswer(BaseModel):
    """A room and its instance."""

    instance_id: UUID = Field(description="Random; the key to the instance's public files.")
    profile_id: UUID
    room_id: str
    status: Status
    host: Named | None = None
    profile: Named


class CommandRequest(_Request):
    """Body of the command endpoint. Only `command` is Gentility's; the others are ours."""

    command: Annotated[
        Text, Field(min_length=1, description="A shell line, run by `bash -c` with the user's login environment.")
    ]
    timeout: Annotated[
        int | None,
        Field(
            ge=1,
            le=3600,
            description="Seconds; then the process group is killed and the exit code is 124. Default: the profile's `command_timeout_seconds`.",
        ),
    ] = None
    cwd: Annotated[
        Text | None, Field(min_length=1, max_length=4096, description="Working directory. Default: the profile's.")
    ] = None
    env: Annotated[
        dict[Text, Text] | None, Field(description="Variables added to the environment of this command.")
    ] = None
    stdin: Annotated[str | None, Field(description="Text for the standard input; /dev/null without it.")] = None


class FileChange(BaseModel):
    """One file that a command changed."""

    path: str = Field(
        description="Absolute. Bytes that are not UTF-8 are shown as U+FFFD; `public_url` has them exactly."
    )
    status: Literal["created", "modified", "deleted"]
    size: int = Field(description="Bytes; 0 when deleted.")
    mime_type: str | None = Field(description="null when deleted.")
    public_url: str | None = Field(description="Relative to the server's address, no token needed; null when deleted.")


class CommandResult(BaseModel):
    """What a command did. Fields after `files_changed` are ours."""

    output: str = Field(
        description="stdout and stderr in order, without one trailing newline; invalid UTF-8 replaced; at most 1 MiB."
    )
    exit_code: int = Field(description="128 + n after signal n, 124 after the timeout.")
    files_changed: list[FileChange] = Field(description="At most 1,000 rows.")
    execution_id: UUID = Field(description="Names the kept output and the whole list of changes.")
    output_truncated: bool
    files_changed_total: int
    files_changed_truncated: bool


class CommandAnswer(BaseModel):
    """The answer of the command endpoint."""

    instance_id: UUID
    command: str
    result: CommandResult
    status: Literal["success", "error"] = Field(description="`error` when the exit code is not 0.")


class OutputGap(BaseModel):
    """Bytes that were not kept: the middle of a long output."""

    model_config = ConfigDict(populate_by_name=True)

    start: int = Field(alias="from")
    end: int = Field(alias="to")


class OutputPiece(BaseModel):
    """A piece of a command's kept output."""

    execution_id: UUID
    offset: int = Field(description="Where this piece begins: what was asked for, or the end of the gap it fell into.")
    output: str = Field(description="Text; a character at the end is never cut in two.")
    next_offset: int
    total_bytes: int
    gap: OutputGap | None
    ended: bool
    exit_code: int | None


class FilesChangedPage(BaseModel):
    """A page of a command's file changes."""

    files_changed: list[FileChange]
    files_changed_total: int
    next_cursor: str | None


class FileAnswer(BaseModel):
    """A file's content."""

    file_path: str
    content: str
    instance_id: UUID
    encoding: Literal["utf-8", "base64"]


class FileWritten(BaseModel):
    """What PUT wrote."""

    file_path: str
    instance_id: UUID
    size: int
    created: bool


class DirectoryEntry(BaseModel):
    """One name in a directory."""

    name: str = Field(description="Bytes that are not UTF-8 are shown as U+FFFD.")
    path: str = Field(description="Percent-encoded absolute path, exact for any name: append it to `.../file`.")
    type: Literal["file", "dir", "symlink", "other"]
    size: int
    mode: str = Field(description="Permission bits in octal.", examples=["0644"])
    modified_at: datetime


class DirectoryListing(BaseModel):
    """A page of a directory."""

    file_path: str
    instance_id: UUID
    entries: list[DirectoryEntry]
    next_cursor: str | None


class Tool(BaseModel):
    """A function tool; `parameters` is a JSON Schema."""

    name: str
    description: str
    parameters: dict[str, Any]


class ToolsAnswer(BaseModel):
    """The tools of a room."""

    profile_id: UUID
    room_id: str
    instance_id: UUID
    instance_status: str
    tools: list[Tool]


class RoomSummary(BaseModel):
    """A room in a list."""

    room_id: str
    instance_id: UUID
    profile_id: UUID
    status: str = Field(description="One of the seven of the room endpoint, or `failed`.")
    created_at: datetime
    last_active_at: datetime | None


class _ProfileFields(_Request):
    vcpu_count: int | None = Field(None, description="1-64.")
    memory_mb: int | None = Field(None, description="128-262144.")
    disk_mb: int | None = Field(None, description="64-1048576.")
    env: dict[str, str | None] | None = Field(
        None,
        description="Encrypted at rest; values are never listed. In a PATCH null removes a variable, and `env: null` all.",
    )
    user: str | None = Field(None, description="null: the image's.")
    workdir: str | None = Field(None, description="Absolute; null: the image's.")
    egress_policy: dict[str, Any] | None = Field(None, description='`{"mode": "internet"}` or `{"mode": "none"}`.')
    driver: str | None = Field(None, description="`auto`, `gvisor` or `qemu`.")
    min_isolation: str | None = Field(None, description="`none`, `gvisor` or `microvm`.")
    warm_pool_size: int | None = Field(None, description="Ready guests kept for new rooms, 0-1000.")
    idle_seconds: int | None = Field(None, description="A room that was idle this long is destroyed; null: never.")
    command_timeout_seconds: int | None = Field(None, description="1-3600.")
    public_files: str | None = Field(None, description="`reported`, `all` or `off`.")


class ProfileCreate(_ProfileFields):
    """Body of POST /api/profiles. Only `name` and `image` are required; a field that is absent keeps its default."""

    name: str
    image: str


class ProfileUpdate(_ProfileFields):
    """Body of PATCH /api/profile/{profile_id}: only the fields that are present change."""

    name: str | None = None
    image: str | None = None


class ProfileAnswer(BaseModel):
    """A profile. `env` lists names only."""

    id: UUID
    name: str
    image: str
    vcpu_count: int
    memory_mb: int
    disk_mb: int
    env: list[str] = Field(description="Names of the variables; values are never shown.")
    user: str | None
    workdir: str | None
    egress_policy: dict[str, Any]
    driver: str
    min_isolation: str
    warm_pool_size: int
    idle_seconds: int | None
    command_timeout_seconds: int
    public_files: str
    created_at: datetime
