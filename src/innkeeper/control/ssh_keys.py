"""SSH keys of an organization's people."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import sqlalchemy as sa

from innkeeper.control import audit, clock
from innkeeper.control.access import require
from innkeeper.core.ssh_key import SshKey, parse_ssh_key
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import NotFoundError, RateLimitedError
from innkeeper.store import audit_events
from innkeeper.store import ssh_keys as store

if TYPE_CHECKING:
    from innkeeper.control.context import Control

KEYS_MAX = 1_000
NUMBER_MAX = 2**31 - 1


async def add(control: Control, principal: Principal, line: str) -> SshKey:
    """Keep a key; the one that is there already where it is.

    Raises:
        InvalidRequestError: no key, or one too weak.
        RateLimitedError: the organization has KEYS_MAX keys.

    """
    require(principal, Scope.ROOMS)
    parsed = parse_ssh_key(line, number=0, created_at=clock.now())

    def write(connection: sa.Connection) -> SshKey:
        known = store.by_fingerprint(connection, principal.organization_id, parsed.fingerprint)
        if known is not None:
            return known
        if len(store.of_organization(connection, principal.organization_id)) >= KEYS_MAX:
            raise RateLimitedError(f"The organization's limit of {KEYS_MAX} SSH keys is reached")
        key = replace(parsed, number=store.next_number(connection, principal.organization_id))
        store.insert(connection, principal.organization_id, key)
        details = {"fingerprint": key.fingerprint}
        audit_events.insert(connection, audit.event(principal, "ssh_key.create", "ssh_key", str(key.number), details))
        return key

    return await control.database.write(write)


async def list_keys(control: Control, principal: Principal) -> list[SshKey]:
    """The organization's keys, oldest first."""
    require(principal, Scope.ROOMS)
    return await control.database.read(store.of_organization, principal.organization_id)


async def remove(control: Control, principal: Principal, number: int) -> None:
    """Forget a key; SSH connections that stand on it end. Raises NotFoundError."""
    require(principal, Scope.ROOMS)

    def write(connection: sa.Connection) -> None:
        if not 0 < number <= NUMBER_MAX or not store.remove(connection, principal.organization_id, number, clock.now()):
            raise NotFoundError("SSH key not found")
        audit_events.insert(connection, audit.event(principal, "ssh_key.delete", "ssh_key", str(number)))

    await control.database.write(write)
    control.ssh_keys_in_use.forget(principal.organization_id, number)
