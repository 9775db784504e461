"""Organizations, users and tokens: the tenant, its people, and the bearers of scopes."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID


class Scope(StrEnum):
    """What a token may do. `admin` is the operator's: organizations, hosts, everything of every organization's own endpoints."""

    ROOMS = "rooms"
    PROFILES = "profiles"
    TOKENS = "tokens"
    AUDIT = "audit"
    ADMIN = "admin"


DEFAULT_SCOPES = frozenset({Scope.ROOMS, Scope.PROFILES, Scope.TOKENS, Scope.AUDIT})


class Dialect(StrEnum):
    """Whose form a token is printed in. One kind of row; only the rendering differs."""

    GENTILITY = "gentility"
    INSTAVM = "instavm"
    GENTITY = "gentity"
    STARPOD = "starpod"


_PREFIX = {
    Dialect.GENTILITY: "rk_live_",
    Dialect.INSTAVM: "instavm_sk_",
    Dialect.GENTITY: "gn_live_",
    Dialect.STARPOD: "sp_live_",
}


# Every text that `render_token` makes, wherever it stands.
TOKEN_PATTERN = (
    r"rk_(?:live|test)_[0-9a-f]{32}|(?:"
    + "|".join(_PREFIX[dialect] for dialect in (Dialect.INSTAVM, Dialect.GENTITY, Dialect.STARPOD))
    + r")[A-Za-z0-9_-]{43}"
)


@dataclass(frozen=True, slots=True)
class Organization:
    """The tenant and its limits. None is no limit."""

    id: UUID
    name: str
    created_at: datetime
    max_instances: int | None = None
    max_memory_mb: int | None = None


@dataclass(frozen=True, slots=True)
class User:
    """A person of an organization."""

    id: UUID
    organization_id: UUID
    email: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Token:
    """A stored token: only the SHA-256 of its text is kept; `prefix` (the first 16 characters) tells people which one it is."""

    id: UUID
    organization_id: UUID
    user_id: UUID | None
    name: str
    prefix: str
    scopes: frozenset[Scope]
    dialect: Dialect
    created_at: datetime
    # Counted within the organization from 1, when it is stored.
    number: int = 0
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: every use case takes one and checks its organization and scopes."""

    organization_id: UUID
    token_id: UUID | None
    scopes: frozenset[Scope]
    actor: str

    def allows(self, scope: Scope) -> bool:
        """Whether the principal holds the scope (admin holds all)."""
        return scope in self.scopes or Scope.ADMIN in self.scopes


def render_token(dialect: Dialect, *, test: bool = False) -> str:
    """A fresh random token text in a product's form: 128 bits for Gentility (its form fixes 32 hex digits), 256 bits elsewhere."""
    if dialect is Dialect.GENTILITY:
        return ("rk_test_" if test else _PREFIX[dialect]) + secrets.token_hex(16)
    return _PREFIX[dialect] + secrets.token_urlsafe(32)


def token_digest(text: str) -> bytes:
    """SHA-256 of a token. Tokens are random, so no slow hash is needed."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
