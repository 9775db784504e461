"""Executions of VMs and sessions, as far as they are rows: what makes an id findable without its VM."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID


@dataclass(frozen=True, slots=True)
class ExecutionRow:
    """An execution that was begun. `kind` is `python`, `bash`, `node` or `exec`. Its output and its end are the host's."""

    id: UUID
    organization_id: UUID
    instance_id: UUID
    kind: str
    created_at: datetime
