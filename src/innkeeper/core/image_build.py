"""The image build: what is kept of one after it ended, and what it says while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID


class BuildStatus(StrEnum):
    """Where a build is. The last three are ends."""

    WAITING = "waiting"
    RUNNING = "running"
    READY = "ready"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing happens any more."""
        return self not in (BuildStatus.WAITING, BuildStatus.RUNNING)


@dataclass(frozen=True, slots=True)
class ImageBuild:
    """One attempt to make the image `name` of a Dockerfile. `waiting` is for the files that it needs; `digest` is set once it is ready."""

    id: UUID
    organization_id: UUID
    name: str
    status: BuildStatus
    created_at: datetime
    ended_at: datetime | None = None
    error: str | None = None
    digest: str | None = None
