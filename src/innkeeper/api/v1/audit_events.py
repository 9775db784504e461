"""The audit log under `/v1/audit`, in the form of InstaVM's clients."""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Query

from innkeeper.api.json_app import CurrentPrincipal, PathUuid
from innkeeper.api.v1.account_schemas import EventAnswer, EventCatalog, EventPage
from innkeeper.control import audit
from innkeeper.control.context import Control
from innkeeper.core.event import CATALOG, FAILURES, AuditEvent, AuditFilter
from innkeeper.core.vm import parse_vm_id
from innkeeper.core.vm import vm_id as vm_id_of
from innkeeper.errors import InvalidRequestError
from innkeeper.ids import parse_uuid

Text = Annotated[str | None, Query(max_length=200)]


def add_audit_routes(router: APIRouter, control: Control) -> None:
    """The routes; each is one use case."""

    @router.get("/v1/audit/catalog")
    async def get_catalog(_: CurrentPrincipal) -> EventCatalog:
        """Every type of event that is ever written, by its group."""
        return EventCatalog(catalog={group: list(actions) for group, actions in CATALOG.items()})

    @router.get("/v1/audit/events")
    async def list_events(
        principal: CurrentPrincipal,
        event_group: Text = None,
        event_type: Text = None,
        status: Literal["success", "failure"] | None = None,
        user_id: Text = None,
        vm_id: Text = None,
        session_id: Text = None,
        cursor: Text = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> EventPage:
        """Events, newest first. `user_id` is an `actor_id`."""
        which = AuditFilter(
            group=event_group,
            action=event_type,
            actor=user_id,
            failed=None if status is None else status == "failure",
            instance_id=None if vm_id is None else _instance_id(vm_id),
            session_id=session_id,
        )
        page = await audit.list_events(control, principal, cursor=_cursor(cursor), limit=limit, which=which)
        return EventPage(
            items=[_event(event) for event in page.events],
            next_cursor=None if page.next_cursor is None else str(page.next_cursor),
        )

    @router.get("/v1/audit/events/{event_id}")
    async def get_event(principal: CurrentPrincipal, event_id: PathUuid) -> EventAnswer:
        """One event."""
        return _event(await audit.get_event(control, principal, event_id))


def _cursor(text: str | None) -> UUID | None:
    value = None if text is None else parse_uuid(text)
    if text is not None and value is None:
        raise InvalidRequestError("cursor: not one that an earlier page gave")
    return value


def _instance_id(text: str) -> str:
    """The instance of a VM's id; what is none is nobody's."""
    found = parse_vm_id(text)
    return "" if found is None else str(found[0])


def _vm_id(event: AuditEvent) -> str | None:
    told = event.object_id if event.object_type == "instance" else event.details.get("instance_id")
    instance_id = None if told is None else parse_uuid(told)
    return None if instance_id is None else vm_id_of(instance_id, 1)


def _event(event: AuditEvent) -> EventAnswer:
    failed = event.action in FAILURES
    return EventAnswer(
        id=event.id,
        created_at=event.at,
        status="failure" if failed else "success",
        event_type=event.action,
        vm_id=_vm_id(event),
        session_id=event.object_id if event.object_type == "session" else event.details.get("session_id"),
        resource_id=event.object_id,
        resource_type=event.object_type,
        actor_id=event.actor,
        actor_type=event.actor.partition(":")[0],
        event_payload=dict(event.details),
        error_message=event.details.get("reason") if failed else None,
    )
