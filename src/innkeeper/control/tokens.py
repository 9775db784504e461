"""Tokens: who is asking, and the life of what they ask with."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa

from innkeeper.control import audit, clock
from innkeeper.control.access import require
from innkeeper.core.token import (
    DEFAULT_SCOPES,
    Dialect,
    Principal,
    Scope,
    Token,
    render_token,
    token_digest,
)
from innkeeper.errors import ForbiddenError, InvalidRequestError, NotFoundError, UnauthorizedError
from innkeeper.ids import uuid7
from innkeeper.store import audit_events
from innkeeper.store import tokens as store

if TYPE_CHECKING:
    from innkeeper.control.context import Control

NAME_MAX = 100
TEXT_MAX = 256
NUMBER_MAX = 2**31 - 1
PREFIX_CHARACTERS = 16


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that was just made. `text` is shown this once; only its digest is kept."""

    token: Token
    text: str = field(repr=False)


async def authenticate(control: Control, text: str) -> Principal:
    """The principal that a token's text stands for, as of this moment: nothing is awaited between its look-up and the return.

    Raises:
        UnauthorizedError: unknown or revoked. A revocation by another process is seen within 30 seconds.

    """
    if not text or len(text) > TEXT_MAX:
        raise UnauthorizedError
    digest = token_digest(text)
    principal = control.tokens.get(digest)
    while principal is None:
        generation = control.tokens.generation
        found = await control.database.read(store.by_digest, digest)
        if generation != control.tokens.generation:
            # It may have been revoked since.
            continue
        # The index compares digests of what was sent, so its timing tells nothing of a token; this makes that certain.
        if found is None or not hmac.compare_digest(found[1], digest) or found[0].revoked_at is not None:
            raise UnauthorizedError
        token = found[0]
        principal = Principal(token.organization_id, token.id, token.scopes, f"token:{token.prefix}")
        control.tokens.put(digest, principal, generation=generation)
        control.later.token_used(token.id, clock.now())
    return principal


def operator_principal(control: Control) -> Principal:
    """The operator, who comes through the unix socket: the default organization, with every scope."""
    if control.default_organization_id is None:
        raise UnauthorizedError("The server has no organization yet")
    return Principal(control.default_organization_id, None, frozenset({Scope.ADMIN}), "operator")


def make_token(
    organization_id: UUID,
    *,
    user_id: UUID | None,
    name: str,
    scopes: frozenset[Scope],
    dialect: Dialect,
    test: bool = False,
) -> NewToken:
    """A fresh token, not stored yet."""
    text = render_token(dialect, test=test)
    token = Token(
        id=uuid7(),
        organization_id=organization_id,
        user_id=user_id,
        name=name,
        prefix=text[:PREFIX_CHARACTERS],
        scopes=scopes,
        dialect=dialect,
        created_at=clock.now(),
    )
    return NewToken(token, text)


async def create(
    control: Control,
    principal: Principal,
    name: str,
    *,
    dialect: Dialect = Dialect.GENTILITY,
    scopes: frozenset[Scope] = DEFAULT_SCOPES,
    test: bool = False,
) -> NewToken:
    """A new token of the principal's organization.

    Raises:
        ForbiddenError: a scope that the principal does not hold.
        InvalidRequestError: a name that is empty or too long, or no scope.

    """
    require(principal, Scope.TOKENS)
    _check_name(name)
    if not scopes:
        raise InvalidRequestError("scopes: at least one is needed")
    beyond = sorted(scope for scope in scopes if not principal.allows(scope))
    if beyond:
        raise ForbiddenError(f"The token lacks the scope '{beyond[0]}', so it cannot give it")
    new = make_token(principal.organization_id, user_id=None, name=name, scopes=scopes, dialect=dialect, test=test)

    def insert(connection: sa.Connection) -> Token:
        token = store.insert(connection, new.token, token_digest(new.text))
        audit_events.insert(
            connection,
            audit.event(principal, "token.create", "token", token.id, {"name": name, "prefix": token.prefix}),
        )
        return token

    return NewToken(await control.database.write(insert), new.text)


def check_may_create(principal: Principal) -> None:
    """Raise ForbiddenError where the principal may not make tokens."""
    require(principal, Scope.TOKENS)


async def list_tokens(control: Control, principal: Principal) -> list[Token]:
    """The organization's tokens, revoked ones too, oldest first."""
    require(principal, Scope.TOKENS)
    return await control.database.read(store.of_organization, principal.organization_id)


async def by_number(control: Control, principal: Principal, number: int) -> Token:
    """A token of the organization that is not revoked, by its number. Raises NotFoundError."""
    require(principal, Scope.TOKENS)
    # A number that the database could not hold is nobody's.
    found = None
    if 0 < number <= NUMBER_MAX:
        found = await control.database.read(store.by_number, principal.organization_id, number)
    if found is None or found.revoked_at is not None:
        raise NotFoundError("API key not found")
    return found


async def rename(control: Control, principal: Principal, number: int, name: str) -> Token:
    """The token under its new name. Raises NotFoundError, InvalidRequestError."""
    token = await by_number(control, principal, number)
    _check_name(name)

    def write(connection: sa.Connection) -> None:
        store.rename(connection, token.id, name)
        audit_events.insert(connection, audit.event(principal, "token.rename", "token", token.id, {"name": name}))

    await control.database.write(write)
    return replace(token, name=name)


async def revoke(control: Control, principal: Principal, token_id: UUID) -> Token:
    """End a token; the token as it is then. Revoking again changes nothing.

    Raises:
        NotFoundError: the organization has no such token.

    """
    require(principal, Scope.TOKENS)

    def change(connection: sa.Connection) -> Token:
        token = store.get(connection, principal.organization_id, token_id)
        if token is None:
            raise NotFoundError("Token not found")
        if store.revoke(connection, token_id, clock.now()):
            audit_events.insert(connection, audit.event(principal, "token.revoke", "token", token_id))
        return store.get(connection, principal.organization_id, token_id) or token

    token = await control.database.write(change)
    control.tokens.forget(token_id)
    return token


def _check_name(name: str) -> None:
    if not 1 <= len(name) <= NAME_MAX or not name.isprintable():
        raise InvalidRequestError(f"name: must be 1 to {NAME_MAX} printable characters")
