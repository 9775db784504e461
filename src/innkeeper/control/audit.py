"""The audit log: who did what to which object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from innkeeper.control import clock
from innkeeper.control.access import require
from innkeeper.core.event import AuditEvent, AuditFilter
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import InvalidRequestError, NotFoundError
from innkeeper.ids import uuid7
from innkeeper.store import audit_events

if TYPE_CHECKING:
    from innkeeper.control.context import Control

PAGE_MAX = 1_000


@dataclass(frozen=True, slots=True)
class AuditPage:
    """Events, newest first; `next_cursor` continues with older ones and is None at the end."""

    events: Sequence[AuditEvent]
    next_cursor: UUID | None


def event(
    principal: Principal, action: str, object_type: str, object_id: UUID | str, details: dict[str, str] | None = None
) -> AuditEvent:
    """An event of now, for a write that goes to the database with what it tells of. `details` never holds a secret."""
    return AuditEvent(
        id=uuid7(),
        organization_id=principal.organization_id,
        at=clock.now(),
        actor=principal.actor,
        action=action,
        object_type=object_type,
        object_id=str(object_id),
        details=details or {},
    )


async def list_events(
    control: Control,
    principal: Principal,
    *,
    cursor: UUID | None = None,
    limit: int = 100,
    which: AuditFilter | None = None,
) -> AuditPage:
    """A page of the organization's audit log. What commands did in the last seconds may be missing."""
    require(principal, Scope.AUDIT)
    if not 1 <= limit <= PAGE_MAX:
        raise InvalidRequestError(f"limit: must be between 1 and {PAGE_MAX}")
    events = await control.database.read(
        audit_events.page, principal.organization_id, before=cursor, limit=limit + 1, which=which
    )
    more = len(events) > limit
    return AuditPage(events[:limit], events[limit - 1].id if more else None)


async def get_event(control: Control, principal: Principal, event_id: UUID) -> AuditEvent:
    """One event of the organization. Raises NotFoundError."""
    require(principal, Scope.AUDIT)
    found = await control.database.read(audit_events.get, principal.organization_id, event_id)
    if found is None:
        raise NotFoundError("Event not found")
    return found
