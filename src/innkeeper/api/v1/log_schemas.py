"""The wire models of instances' logs."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field


class LogLineAnswer(BaseModel):
    """One line of a log."""

    sequence: int = Field(description="Counts the instance's lines from 1; as `after`, the cursor behind this line.")
    at: datetime
    source: Literal["stdout", "stderr", "lifecycle", "platform"]
    level: Literal["info", "warning", "error"]
    message: str


class LogAnswer(BaseModel):
    """Lines of a log, oldest first."""

    lines: list[LogLineAnswer]
    first: int = Field(description="The sequence of the oldest line that is kept; `last` + 1 where there is none.")
    last: int = Field(description="The sequence of the newest line; 0 of a log without any.")
