"""Tokens: only the SHA-256 of each is here."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.token import Dialect, Scope, Token
from innkeeper.store.tables import tokens


def insert(connection: sa.Connection, token: Token, digest: bytes) -> Token:
    """Store a token with the digest of its text; the token with its number."""
    highest = sa.select(sa.func.coalesce(sa.func.max(tokens.c.number), 0)).where(
        tokens.c.organization_id == token.organization_id
    )
    number = int(connection.execute(highest).scalar_one()) + 1
    connection.execute(
        sa.insert(tokens).values(
            id=token.id,
            organization_id=token.organization_id,
            user_id=token.user_id,
            name=token.name,
            prefix=token.prefix,
            digest=digest,
            scopes=sorted(token.scopes),
            dialect=token.dialect.value,
            created_at=token.created_at,
            number=number,
        )
    )
    return replace(token, number=number)


def by_digest(connection: sa.Connection, digest: bytes) -> tuple[Token, bytes] | None:
    """The token of a digest, revoked or not, and the digest as it is stored."""
    row = connection.execute(sa.select(tokens).where(tokens.c.digest == digest)).one_or_none()
    return None if row is None else (_token(row), row.digest)


def of_organization(connection: sa.Connection, organization_id: UUID) -> list[Token]:
    """The tokens of an organization, revoked ones too, oldest first."""
    query = sa.select(tokens).where(tokens.c.organization_id == organization_id).order_by(tokens.c.id)
    return [_token(row) for row in connection.execute(query)]


def get(connection: sa.Connection, organization_id: UUID, token_id: UUID) -> Token | None:
    """One token of an organization."""
    query = sa.select(tokens).where(tokens.c.id == token_id, tokens.c.organization_id == organization_id)
    row = connection.execute(query).one_or_none()
    return None if row is None else _token(row)


def by_number(connection: sa.Connection, organization_id: UUID, number: int) -> Token | None:
    """One token of an organization, by its number."""
    query = sa.select(tokens).where(tokens.c.organization_id == organization_id, tokens.c.number == number)
    row = connection.execute(query).one_or_none()
    return None if row is None else _token(row)


def rename(connection: sa.Connection, token_id: UUID, name: str) -> None:
    """Give a token another name."""
    connection.execute(sa.update(tokens).where(tokens.c.id == token_id).values(name=name))


def revoke(connection: sa.Connection, token_id: UUID, at: datetime) -> bool:
    """Whether this call revoked the token."""
    done = connection.execute(
        sa.update(tokens).where(tokens.c.id == token_id, tokens.c.revoked_at.is_(None)).values(revoked_at=at)
    )
    return done.rowcount == 1


def set_last_used(connection: sa.Connection, used: dict[UUID, datetime]) -> None:
    """Note when tokens were last used."""
    if used:
        connection.execute(
            sa.update(tokens)
            .where(tokens.c.id == sa.bindparam("token_id"))
            .values(last_used_at=sa.bindparam("used_at")),
            [{"token_id": token_id, "used_at": at} for token_id, at in used.items()],
        )


def _token(row: Any) -> Token:
    return Token(
        id=row.id,
        organization_id=row.organization_id,
        user_id=row.user_id,
        name=row.name,
        prefix=row.prefix,
        scopes=frozenset(Scope(scope) for scope in row.scopes),
        dialect=Dialect(row.dialect),
        created_at=row.created_at,
        number=row.number,
        last_used_at=row.last_used_at,
        revoked_at=row.revoked_at,
    )
