"""Answers to requests that are to be carried out once, by the key that the client gave."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

import sqlalchemy as sa

from innkeeper.store.tables import idempotency_keys


@dataclass(frozen=True, slots=True)
class KeyedRequest:
    """A request by its key: a digest of what was asked, and the answer once there is one."""

    id: UUID
    organization_id: UUID
    key: str
    request_digest: bytes
    created_at: datetime
    status: int | None = None
    answer_sealed: bytes | None = field(default=None, repr=False)


def insert(connection: sa.Connection, request: KeyedRequest) -> None:
    """Store a request that begins. Raises IntegrityError when the organization used the key before."""
    connection.execute(
        sa.insert(idempotency_keys).values(
            id=request.id,
            organization_id=request.organization_id,
            key=request.key,
            request_digest=request.request_digest,
            created_at=request.created_at,
        )
    )


def get(connection: sa.Connection, organization_id: UUID, key: str) -> KeyedRequest | None:
    """The request of a key."""
    query = sa.select(idempotency_keys).where(
        idempotency_keys.c.organization_id == organization_id, idempotency_keys.c.key == key
    )
    row = connection.execute(query).one_or_none()
    return None if row is None else KeyedRequest(*row)


def answer(connection: sa.Connection, request_id: UUID, status: int, sealed: bytes) -> None:
    """Store the answer of a request."""
    connection.execute(
        sa.update(idempotency_keys)
        .where(idempotency_keys.c.id == request_id)
        .values(status=status, answer_sealed=sealed)
    )


def delete(connection: sa.Connection, request_id: UUID) -> None:
    """Forget a request that came to nothing."""
    connection.execute(sa.delete(idempotency_keys).where(idempotency_keys.c.id == request_id))


def delete_old(connection: sa.Connection, before: datetime, *, limit: int) -> int:
    """Forget requests that began before a time, at most `limit`; how many went."""
    old = sa.select(idempotency_keys.c.id).where(idempotency_keys.c.created_at < before).limit(limit)
    return connection.execute(sa.delete(idempotency_keys).where(idempotency_keys.c.id.in_(old))).rowcount
