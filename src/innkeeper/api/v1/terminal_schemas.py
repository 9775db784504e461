"""The wire models of terminals, as InstaVM's clients read and write them."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from innkeeper.core.terminal_verbs import COMMAND_BYTES_MAX, SIZE_RANGE

LOW, HIGH = SIZE_RANGE


class TerminalSize(BaseModel):
    """Body of POST …/pty/sessions/{pid}/resize."""

    model_config = ConfigDict(extra="forbid", strict=True)

    cols: int = Field(ge=LOW, le=HIGH, description="Columns.")
    rows: int = Field(ge=LOW, le=HIGH, description="Rows.")


class TerminalCreate(BaseModel):
    """Body of POST …/pty/sessions. Without `shell` and `command` it is a login shell: bash, or sh where there is none."""

    model_config = ConfigDict(extra="forbid", strict=True)

    cols: int = Field(80, ge=LOW, le=HIGH, description="Columns.")
    rows: int = Field(24, ge=LOW, le=HIGH, description="Rows.")
    shell: str | None = Field(
        None, max_length=4_096, description="A program; a shell is started as an interactive login shell."
    )
    command: str | None = Field(
        None, max_length=COMMAND_BYTES_MAX, description="A command line, run by `bash -lc`, or `sh -lc`."
    )
    id: str | None = Field(
        None, description="A name of one's own, of A-Z, a-z, 0-9, dot, colon, dash and underscore; default: a UUID."
    )


class TerminalAnswer(BaseModel):
    """A terminal."""

    session_id: str = Field(description="Its id, as InstaVM calls it.")
    id: str = Field(description="The same.")
    alive: bool = Field(description="Whether its program runs.")
    exit_code: int | None = Field(
        description="Of the program, 128+n after signal n; null while it runs, and where it was lost with its machine."
    )
    cols: int = Field(description="Columns.")
    rows: int = Field(description="Rows.")
    command: str = Field(description="What it was asked to run; empty for a login shell.")
    created_at: datetime = Field(description="When it was started.")
    viewers: int = Field(description="How many look at it now.")
    offset: int = Field(description="Bytes of output since its start.")
