"""Shares: published ports of instances, their names, and the signatures of links to private ones. Pure."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

# 26 characters of base32: 128 bits that nobody guesses, in one label of a host name.
NAME = re.compile(r"[a-z2-7]{26}")
LINK_SECONDS_DEFAULT = 3_600
LINK_SECONDS_MAX = 7 * 86_400
_MAC_BYTES = 16
_SIGNATURE = re.compile(r"([1-9][0-9]{0,11})\.([A-Za-z0-9_-]{22})")


@dataclass(frozen=True, slots=True)
class Share:
    """A port of an instance under a name of its own. A private one opens to its organization's tokens and to signed links."""

    id: UUID
    organization_id: UUID
    instance_id: UUID
    name: str
    port: int
    is_public: bool
    created_at: datetime


@dataclass(frozen=True, slots=True)
class ShareRequest:
    """A port to publish. Asked for again under the same id, it is the same share."""

    id: UUID
    port: int
    is_public: bool


def new_name() -> str:
    """A name that nobody guesses, fit for DNS."""
    return base64.b32encode(secrets.token_bytes(16)).decode().rstrip("=").lower()


def sign(key: bytes, subject: str, expires_at: int) -> str:
    """What lets its bearer see the subject until `expires_at` (Unix seconds); safe in URLs, paths and cookies."""
    return f"{expires_at}.{_mac(key, subject, expires_at)}"


def signed_until(key: bytes, subject: str, text: str, *, now: float) -> int | None:
    """When the signature ends, or None for one that has ended, is another subject's, or is none."""
    match = _SIGNATURE.fullmatch(text)
    if match is None or int(match[1]) <= now:
        return None
    expires_at = int(match[1])
    return expires_at if hmac.compare_digest(_mac(key, subject, expires_at), match[2]) else None


def _mac(key: bytes, subject: str, expires_at: int) -> str:
    digest = hmac.digest(key, f"{subject}\0{expires_at}".encode(), hashlib.sha256)[:_MAC_BYTES]
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")
