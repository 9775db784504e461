"""Organizations: the tenants, each with profiles of its own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import sqlalchemy as sa

from innkeeper.control import audit, clock
from innkeeper.control.access import require
from innkeeper.control.tokens import make_token
from innkeeper.core.profile import Profile
from innkeeper.core.token import DEFAULT_SCOPES, Dialect, Organization, Principal, Scope, User, token_digest
from innkeeper.errors import ConflictError, InvalidRequestError, NotFoundError
from innkeeper.ids import uuid7
from innkeeper.store import audit_events, server
from innkeeper.store import organizations as store
from innkeeper.store import profiles as profile_store
from innkeeper.store import tokens as token_store
from innkeeper.store.profiles import StoredProfile

if TYPE_CHECKING:
    from innkeeper.control.context import Control

DEFAULT_NAME = "default"
FIRST_EMAIL = "operator@localhost"
FIRST_PROFILES = ("base", "python-data-science", "node")
SERVER_UUID = "server_uuid"
LIMIT_MAX = 2**31 - 1
NAME_PATTERN = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


async def bootstrap(control: Control) -> str | None:
    """Make the organization `default` with its profiles, a user and a first token; that token's text, or None where they exist.

    To be called before `Control.start`, at every start.
    """
    organization = Organization(uuid7(), DEFAULT_NAME, clock.now())
    user = User(uuid7(), organization.id, FIRST_EMAIL, clock.now())
    principal = Principal(organization.id, None, frozenset({Scope.ADMIN}), "server")
    first = make_token(organization.id, user_id=user.id, name="first", scopes=DEFAULT_SCOPES, dialect=Dialect.GENTILITY)

    def make(connection: sa.Connection) -> UUID:
        found = store.by_name(connection, DEFAULT_NAME)
        if found is not None:
            return found.id
        server.put(connection, SERVER_UUID, str(uuid4()))
        _insert(connection, organization, principal)
        store.insert_user(connection, user)
        token_store.insert(connection, first.token, token_digest(first.text))
        return organization.id

    control.default_organization_id = await control.database.write(make)
    return first.text if control.default_organization_id == organization.id else None


async def create(
    control: Control,
    principal: Principal,
    name: str,
    *,
    max_instances: int | None = None,
    max_memory_mb: int | None = None,
) -> Organization:
    """A new organization with profiles of its own. Only the operator may.

    Raises:
        ConflictError: the name is taken.

    """
    require(principal, Scope.ADMIN)
    if not NAME_PATTERN.fullmatch(name):
        raise InvalidRequestError(
            "name: 1-63 characters of a-z, 0-9 and '-', beginning and ending with a letter or digit"
        )
    _check_limit("max_instances", max_instances)
    _check_limit("max_memory_mb", max_memory_mb)
    organization = Organization(uuid7(), name, clock.now(), max_instances=max_instances, max_memory_mb=max_memory_mb)
    try:
        made = await control.database.write(_insert, organization, principal)
    except sa.exc.IntegrityError as error:
        raise ConflictError(f"There is an organization named {name!r} already") from error
    control.organizations[organization.id] = organization
    control.profiles.update({stored.profile.id: stored for stored in made})
    control.pools_hint.set()
    return organization


async def list_organizations(control: Control, principal: Principal) -> list[Organization]:
    """All organizations, oldest first. Only the operator may."""
    require(principal, Scope.ADMIN)
    return await control.database.read(store.every)


async def set_limits(
    control: Control,
    principal: Principal,
    name: str,
    limits: Mapping[str, int | None],
) -> Organization:
    """The organization with `limits` (max_instances, max_memory_mb; None: no limit) changed; what it has beyond them stays. Only the operator may.

    Raises:
        NotFoundError: there is no organization of that name.

    """
    require(principal, Scope.ADMIN)
    for limit, value in limits.items():
        _check_limit(limit, value)

    def change(connection: sa.Connection) -> Organization:
        found = store.by_name(connection, name)
        if found is None:
            raise NotFoundError("Organization not found")
        organization = dataclasses.replace(
            found,
            max_instances=limits.get("max_instances", found.max_instances),
            max_memory_mb=limits.get("max_memory_mb", found.max_memory_mb),
        )
        now = {"max_instances": organization.max_instances, "max_memory_mb": organization.max_memory_mb}
        store.set_limits(connection, organization.id, **now)
        details = {limit: str(value) for limit, value in now.items()}
        audit_events.insert(
            connection, audit.event(principal, "organization.limits", "organization", organization.id, details)
        )
        return organization

    organization = await control.database.write(change)
    control.organizations[organization.id] = organization
    return organization


async def operator_of(control: Control, principal: Principal, name_or_id: str | UUID) -> Principal:
    """The operator acting within another organization: its first token is made, and its tokens are looked at and ended so. Only the operator may."""
    require(principal, Scope.ADMIN)
    if isinstance(name_or_id, UUID):
        organization = await control.database.read(store.get, name_or_id)
    else:
        organization = await control.database.read(store.by_name, name_or_id)
    if organization is None:
        raise NotFoundError("Organization not found")
    return Principal(organization.id, principal.token_id, principal.scopes, principal.actor)


def _check_limit(name: str, value: int | None) -> None:
    if value is not None and not 0 <= value <= LIMIT_MAX:
        raise InvalidRequestError(f"{name}: must be null (no limit) or a number from 0 to {LIMIT_MAX}")


def _insert(connection: sa.Connection, organization: Organization, principal: Principal) -> list[StoredProfile]:
    store.insert(connection, organization)
    made = [
        StoredProfile(Profile(uuid7(), organization.id, name, name, organization.created_at)) for name in FIRST_PROFILES
    ]
    for stored in made:
        profile_store.insert(connection, stored)
    audit_events.insert(
        connection,
        audit.event(principal, "organization.create", "organization", organization.id, {"name": organization.name}),
    )
    return made
