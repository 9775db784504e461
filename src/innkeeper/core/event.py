"""Audit events: who did what to which object."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One line of the audit log. `details` never holds a secret."""

    id: UUID
    organization_id: UUID
    at: datetime
    actor: str
    action: str
    object_type: str
    object_id: str
    details: dict[str, str] = field(default_factory=dict)
