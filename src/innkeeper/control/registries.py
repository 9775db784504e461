"""Credentials for registries: given once, used by imports, never shown again."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa

from innkeeper.control import audit, clock
from innkeeper.control.access import require
from innkeeper.core.registry import is_registry
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import InvalidRequestError, NotFoundError
from innkeeper.ids import uuid7
from innkeeper.store import audit_events
from innkeeper.store import registries as store
from innkeeper.store.registries import StoredCredential

if TYPE_CHECKING:
    from innkeeper.control.context import Control

CHARACTERS_MAX = 4_096


@dataclass(frozen=True, slots=True)
class RegistryView:
    """A registry that the organization has a credential for, without the password."""

    registry: str
    username: str
    updated_at: datetime


async def list_registries(control: Control, principal: Principal) -> list[RegistryView]:
    """The organization's registries, by name."""
    require(principal, Scope.PROFILES)
    found = await control.database.read(store.of_organization, principal.organization_id)
    return [RegistryView(one.registry, one.username, one.updated_at) for one in found]


async def log_in(control: Control, principal: Principal, registry: str, username: str, password: str) -> RegistryView:
    """Keep a credential for a registry, in place of an earlier one. Nobody is asked whether it is right before it is used.

    Raises:
        InvalidRequestError: naming the field.

    """
    require(principal, Scope.PROFILES)
    if not is_registry(registry):
        raise InvalidRequestError("registry: a host, with its port where it has one, like registry.example.com:5000")
    if not 0 < len(username) <= CHARACTERS_MAX or ":" in username or not username.isprintable():
        raise InvalidRequestError("username: 1-4096 printable characters without ':'")
    if not 0 < len(password) <= CHARACTERS_MAX or not password.isprintable():
        raise InvalidRequestError("password: 1-4096 printable characters")
    credential_id = uuid7()
    sealed = control.box.seal(password.encode(), organization_id=principal.organization_id, object_id=credential_id)
    credential = StoredCredential(
        credential_id,
        principal.organization_id,
        registry.lower(),
        username,
        clock.now(),
        password_sealed=sealed,
    )

    def write(connection: sa.Connection) -> None:
        store.put(connection, credential)
        audit_events.insert(
            connection, audit.event(principal, "registry.login", "registry", registry.lower(), {"username": username})
        )

    await control.database.write(write)
    return RegistryView(credential.registry, username, credential.updated_at)


async def log_out(control: Control, principal: Principal, registry: str) -> None:
    """Forget the credential. Raises NotFoundError."""
    require(principal, Scope.PROFILES)

    def write(connection: sa.Connection) -> None:
        if not store.delete(connection, principal.organization_id, registry.lower()):
            raise NotFoundError("There is no credential for this registry")
        audit_events.insert(connection, audit.event(principal, "registry.logout", "registry", registry.lower()))

    await control.database.write(write)


async def credential(control: Control, organization_id: UUID, registry: str) -> tuple[str, str] | None:
    """(username, password) of the organization for a registry, for its host alone."""
    found = await control.database.read(store.get, organization_id, registry.lower())
    if found is None:
        return None
    plain = control.box.open(found.password_sealed, organization_id=organization_id, object_id=found.id)
    return found.username, plain.decode()
