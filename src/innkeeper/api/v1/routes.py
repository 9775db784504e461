"""Our own endpoints under `/v1`: organizations, tokens, rooms, hosts, the audit log; images have a file of their own."""

from __future__ import annotations

import dataclasses
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Response

from innkeeper.api.every_room import every_room
from innkeeper.api.json_app import CurrentPrincipal, PathUuid
from innkeeper.api.v1 import operator
from innkeeper.api.v1.account import add_account_routes
from innkeeper.api.v1.agents import add_agent_routes
from innkeeper.api.v1.audit_events import add_audit_routes
from innkeeper.api.v1.image_builds import add_build_routes
from innkeeper.api.v1.images import add_image_routes
from innkeeper.api.v1.logs import ROOM_LOGS, add_log_routes
from innkeeper.api.v1.operator import host_answer
from innkeeper.api.v1.schemas import (
    AuditEventAnswer,
    AuditPage,
    BootStepAnswer,
    HostAnswer,
    HostName,
    IsolationAnswer,
    OrganizationAnswer,
    OrganizationCreate,
    OrganizationLimits,
    RoomDetail,
    RoomRow,
    TokenAnswer,
    TokenCreate,
    TokenCreated,
)
from innkeeper.api.v1.terminals import ROOM_BASES, add_terminal_routes
from innkeeper.control import audit, hosts, organizations, rooms, tokens
from innkeeper.control.context import Control
from innkeeper.control.room_entry import RoomView
from innkeeper.core.token import DEFAULT_SCOPES, Dialect, Organization, Scope, Token
from innkeeper.errors import InvalidRequestError
from innkeeper.ids import parse_uuid


def build_router(control: Control) -> APIRouter:
    """The routes; each is one use case."""
    router = APIRouter(tags=["v1"])
    add_agent_routes(router, control)
    add_image_routes(router, control)
    add_build_routes(router, control)
    add_account_routes(router, control)
    add_audit_routes(router, control)
    add_terminal_routes(router, control, ROOM_BASES)
    add_log_routes(router, control, ROOM_LOGS)

    @router.get("/v1/organizations")
    async def list_organizations(principal: CurrentPrincipal) -> list[OrganizationAnswer]:
        """All organizations, oldest first. Scope `admin`."""
        return [_organization(found) for found in await organizations.list_organizations(control, principal)]

    @router.post("/v1/organizations", status_code=201)
    async def create_organization(principal: CurrentPrincipal, body: OrganizationCreate) -> OrganizationAnswer:
        """Make an organization with profiles of its own and no token. Scope `admin`. 409 `conflict` when the name is taken."""
        return _organization(await organizations.create(control, principal, **body.model_dump()))

    @router.patch("/v1/organizations/{name}")
    async def limit_organization(
        principal: CurrentPrincipal, name: str, body: OrganizationLimits
    ) -> OrganizationAnswer:
        """Change the limits that are present; what the organization has beyond them stays. Scope `admin`."""
        limits = body.model_dump(exclude_unset=True)
        return _organization(await organizations.set_limits(control, principal, name, limits))

    @router.get("/v1/tokens")
    async def list_tokens(principal: CurrentPrincipal, organization_id: PathUuid | None = None) -> list[TokenAnswer]:
        """The tokens of the organization, revoked ones too; of another one with `organization_id` and scope `admin`."""
        if organization_id is not None:
            principal = await organizations.operator_of(control, principal, organization_id)
        return [TokenAnswer(**_token(token)) for token in await tokens.list_tokens(control, principal)]

    @router.post("/v1/tokens", status_code=201)
    async def create_token(principal: CurrentPrincipal, body: TokenCreate) -> TokenCreated:
        """Make a token. Its text is in this answer and nowhere else."""
        if body.organization is not None:
            principal = await organizations.operator_of(control, principal, body.organization)
        scopes = DEFAULT_SCOPES if body.scopes is None else frozenset(Scope(scope) for scope in body.scopes)
        new = await tokens.create(
            control, principal, body.name, dialect=Dialect(body.dialect), test=body.test, scopes=scopes
        )
        return TokenCreated(**_token(new.token), token=new.text)

    @router.delete("/v1/tokens/{token_id}", status_code=204)
    async def revoke_token(
        principal: CurrentPrincipal, token_id: PathUuid, organization_id: PathUuid | None = None
    ) -> Response:
        """Revoke a token; it stops working at once. Safe to repeat. Another organization's with `organization_id` and scope `admin`."""
        if organization_id is not None:
            principal = await organizations.operator_of(control, principal, organization_id)
        await tokens.revoke(control, principal, token_id)
        return Response(status_code=204)

    @router.get("/v1/rooms")
    async def list_rooms(principal: CurrentPrincipal) -> list[RoomRow]:
        """All rooms of the organization."""
        return [_room(view) for view in await every_room(control, principal)]

    @router.get("/v1/rooms/{instance_id}")
    async def get_room(principal: CurrentPrincipal, instance_id: PathUuid) -> RoomDetail:
        """One room, with its boot trace."""
        view = await rooms.find_instance(control, principal, instance_id)
        trace = [BootStepAnswer(step=step.step, at_ms=step.at_ms) for step in view.instance.boot_trace]
        return RoomDetail(**_room(view).model_dump(), boot_trace=trace)

    @router.get("/v1/hosts")
    async def list_hosts(principal: CurrentPrincipal) -> list[HostAnswer]:
        """The hosts, with what each says of itself now."""
        return [host_answer(view) for view in await hosts.list_hosts(control, principal)]

    @router.get("/v1/audit")
    async def list_audit(
        principal: CurrentPrincipal,
        limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
        cursor: str | None = None,
    ) -> AuditPage:
        """Who did what, newest first."""
        before = None if cursor is None else _cursor(cursor)
        page = await audit.list_events(control, principal, cursor=before, limit=limit)
        return AuditPage(
            events=[
                AuditEventAnswer(
                    id=event.id,
                    at=event.at,
                    actor=event.actor,
                    action=event.action,
                    object_type=event.object_type,
                    object_id=event.object_id,
                    details=event.details,
                )
                for event in page.events
            ],
            next_cursor=None if page.next_cursor is None else str(page.next_cursor),
        )

    operator.add_routes(router, control)
    return router


def _cursor(text: str) -> UUID:
    value = parse_uuid(text)
    if value is None:
        raise InvalidRequestError("cursor: not one that an earlier page gave")
    return value


def _organization(organization: Organization) -> OrganizationAnswer:
    return OrganizationAnswer(
        id=organization.id,
        name=organization.name,
        max_instances=organization.max_instances,
        max_memory_mb=organization.max_memory_mb,
        created_at=organization.created_at,
    )


def _token(token: Token) -> dict[str, object]:
    return {
        "id": token.id,
        "name": token.name,
        "prefix": token.prefix,
        "dialect": str(token.dialect),
        "scopes": sorted(token.scopes),
        "created_at": token.created_at,
        "last_used_at": token.last_used_at,
        "revoked_at": token.revoked_at,
    }


def _room(view: RoomView) -> RoomRow:
    instance = view.instance
    isolation = instance.isolation
    return RoomRow(
        profile_id=instance.profile_id,
        profile_name=view.profile.name,
        room_id=view.room_id,
        instance_id=instance.public_id,
        status=str(instance.state),
        failure=instance.failure,
        isolation=None if isolation is None else IsolationAnswer(**dataclasses.asdict(isolation)),
        created_at=instance.created_at,
        last_active_at=instance.last_active_at,
        host=None if view.host is None else HostName(id=view.host.id, name=view.host.name),
    )
