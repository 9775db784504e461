"""The wire models of executions: InstaVM's fields, and ours beside."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Language = Literal["python", "bash", "node"]
_OTHER_NAMES = {"python3": "python", "py": "python", "sh": "bash", "shell": "bash", "javascript": "node", "js": "node"}


class ExecuteRequest(BaseModel):
    """Body of POST /execute and /execute_async."""

    model_config = ConfigDict(extra="forbid")

    command: str | None = Field(None, description="The code to run.")
    code: str | None = Field(None, description="Another name of `command`; one of them is needed.")
    session_id: str | None = Field(None, description="The session that it runs in; a new one by default.")
    vm_id: str | None = Field(None, description="A VM in place of a session: that VM's session.")
    language: Language = Field(
        "python", description="`python` keeps its state from call to call; `bash` and `node` start anew each time."
    )
    timeout: float = Field(60, ge=1, le=600, description="Seconds; shortly before their end it is stopped.")
    api_key: str | None = Field(None, repr=False, description="Ignored: the header counts.")
    vault_ids: Annotated[list[str], Field(max_length=0)] | None = Field(None, description="Only `[]`.")

    @field_validator("language", mode="before")
    @classmethod
    def _known_by_other_names(cls, value: object) -> object:
        if value is None:
            return "python"
        return _OTHER_NAMES.get(value, value) if isinstance(value, str) else value

    @field_validator("vault_ids", mode="wrap")
    @classmethod
    def _say_why(cls, value: object, handler: object) -> object:
        if value:
            raise ValueError("is not supported by this server")
        return None

    @model_validator(mode="after")
    def _one_text(self) -> ExecuteRequest:
        if (self.command is None) == (self.code is None):
            raise ValueError("either command or code is needed")
        if self.session_id is not None and self.vm_id is not None:
            raise ValueError("either session_id or vm_id")
        return self


class ExecRequest(BaseModel):
    """Body of POST /v1/vms/{vm_id}/exec."""

    model_config = ConfigDict(extra="forbid")

    argv: list[str] | None = Field(
        None, min_length=1, max_length=10_000, description="A program and its arguments; no shell comes between."
    )
    command: str | None = Field(None, description="A shell line in its place.")
    user: str | None = Field(None, description="`user` or `user:group` of the guest; the VM's by default.")
    cwd: str | None = Field(None, description="Absolute path; the VM's working directory by default.")
    env: dict[str, str] | None = Field(None, repr=False, description="Variables beside the VM's.")
    stdin: str | None = Field(None, repr=False, description="Its input; without it there is none.")
    timeout: float = Field(60, gt=0, le=3_600, description="Seconds after which its process group is killed.")
    merge: bool = Field(False, description="One output: what it writes to stderr comes as stdout.")
    background: bool = Field(False, description="Answer as soon as it has begun.")

    @model_validator(mode="after")
    def _one_program(self) -> ExecRequest:
        if (self.argv is None) == (self.command is None):
            raise ValueError("either argv or command is needed")
        return self


class SignalRequest(BaseModel):
    """Body of POST /v1/executions/{id}/signal."""

    model_config = ConfigDict(extra="forbid")

    signal: int | str = Field(description="A number from 1 to 64, or a name such as `SIGTERM` or `TERM`.")


class KernelAnswer(BaseModel):
    """The Python interpreter of the session."""

    fresh: bool = Field(description="It began with this cell: names of earlier ones are not there.")
    lost: bool = Field(description="It ended with this cell, and its state is gone; the next cell gets a new one.")


class DisplayedAnswer(BaseModel):
    """Something that a cell displayed."""

    kind: Literal["result", "display"] = Field(description="`result`: the value of the cell's last expression.")
    data: dict[str, str] = Field(
        description="By media type: text as it is, images in base64, JSON as its text. The guest says so: treat it as untrusted."
    )
    omitted: dict[str, int] = Field(description="Bytes of forms that did not fit.")


class ChangedFile(BaseModel):
    """A file that changed."""

    path: str
    status: Literal["created", "modified", "deleted"]
    size: int
    mime_type: str | None


class Ran(BaseModel):
    """What is said of every execution."""

    execution_id: str
    vm_id: str
    session_id: str
    created_at: datetime
    exit_code: int | None = Field(
        description="128+n after signal n, 124 after its time limit; null until it has ended."
    )
    signal: int | None = None
    timed_out: bool = False
    execution_time: float | None = Field(None, description="Seconds.")
    cpu_time: float | None = Field(None, description="Seconds of processor time, with those of what it waited for.")
    stdout_truncated: bool = Field(False, description="Only the first mebibyte is here; see `/output`.")
    stderr_truncated: bool = False
    results: list[DisplayedAnswer] = Field(default_factory=list)
    results_truncated: bool = False
    kernel: KernelAnswer | None = Field(None, description="Of cells.")


class Executed(Ran):
    """The answer of /execute, and of an exec that was waited for."""

    stdout: str
    stderr: str
    output: str = Field(description="`stdout` again.")
    files_changed: list[ChangedFile]
    files_changed_total: int
    files_changed_truncated: bool


class TaskStarted(BaseModel):
    """The answer of /execute_async, and of an exec in the background."""

    task_id: str = Field(description="The same as `execution_id`.")
    execution_id: str
    vm_id: str
    session_id: str
    status: Literal["running"]
    created_at: datetime


class TaskAnswer(Ran):
    """An execution as far as it has come."""

    task_id: str
    language: str = Field(description="`python`, `bash`, `node`, or `exec`.")
    is_complete: bool
    status: Literal["running", "completed", "lost"]
    error: str | None = Field(description="Why a lost one has no result.")
    serialized_stdout: str
    serialized_stderr: str


class ExecutionRowAnswer(BaseModel):
    """An execution in a list."""

    execution_id: str
    vm_id: str
    language: str
    created_at: datetime


class OutputAnswer(BaseModel):
    """A piece of the kept output, both outputs in the order in which they came."""

    execution_id: str
    offset: int
    output: str
    next_offset: int
    total_bytes: int
    gap: dict[str, int] | None = Field(description="The dropped middle, `from` and `to`.")
    ended: bool
    exit_code: int | None


class FilesChangedAnswer(BaseModel):
    """A page of an execution's file changes."""

    files_changed: list[ChangedFile]
    files_changed_total: int
    next_cursor: str | None


class Signalled(BaseModel):
    """A signal was sent."""

    status: Literal["ok"]
