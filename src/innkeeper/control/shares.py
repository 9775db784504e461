"""Shares: ports of instances published under names of their own, for everybody or for those who hold a token or a signed link."""

from __future__ import annotations

import base64
import re
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa

from innkeeper.control import audit, clock
from innkeeper.control.access import require
from innkeeper.control.live_table import Entry
from innkeeper.core.event import AuditEvent
from innkeeper.core.instance import Instance
from innkeeper.core.share import LINK_SECONDS_MAX, Share, ShareRequest, new_name, sign, signed_until
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import InvalidRequestError, RateLimitedError, ShareNotFoundError
from innkeeper.ids import uuid7
from innkeeper.store import audit_events
from innkeeper.store import shares as store

if TYPE_CHECKING:
    from innkeeper.control.context import Control

SHARES_PER_INSTANCE = 100
SCOPE = Scope.ROOMS
_OWN_NAME = re.compile(r"([a-z2-7]{26})-([1-9][0-9]{0,4})")


@dataclass(frozen=True, slots=True)
class Target:
    """A published port that exists now. `subject` is what signatures for it are made of."""

    entry: Entry
    port: int
    is_public: bool
    subject: str


@dataclass(frozen=True, slots=True)
class Link:
    """A signature that opens a private share until `expires_at` (Unix seconds)."""

    share: Share
    signature: str = field(repr=False)
    expires_at: int


async def create(control: Control, principal: Principal, entry: Entry, port: int, *, is_public: bool) -> Share:
    """Publish a port of an instance under a new name, until the share is revoked or the instance is destroyed.

    Raises:
        InvalidRequestError: no port.
        RateLimitedError: the instance has too many shares.

    """
    return await ensure(control, principal, entry, ShareRequest(uuid7(), port, is_public))


async def ensure(control: Control, principal: Principal, entry: Entry, wanted: ShareRequest) -> Share:
    """The share of an instance that was asked for, as it is where it is there already. Raises as `create`."""
    require(principal, SCOPE)
    known = control.shares.get(wanted.id)
    if known is not None and known.instance_id == entry.instance.id:
        return known
    share = plan(entry.instance, wanted)

    def write(connection: sa.Connection) -> None:
        # Here, where whoever asks at the same moment is before or after.
        if store.count(connection, share.instance_id) >= SHARES_PER_INSTANCE:
            raise RateLimitedError(f"The {entry.kind} has {SHARES_PER_INSTANCE} shares, which is the limit.")
        insert(connection, principal, share, entry.marks)

    await control.database.write(write)
    if _entry(control, share) is None:
        raise ShareNotFoundError(f"The {entry.kind} was removed meanwhile")
    control.shares.put(share)
    return share


def plan(instance: Instance, wanted: ShareRequest) -> Share:
    """A share that is to be; nothing is stored yet. Raises InvalidRequestError."""
    if not 1 <= wanted.port <= 65_535:
        raise InvalidRequestError("port: must be between 1 and 65535")
    return Share(
        wanted.id, instance.organization_id, instance.id, new_name(), wanted.port, wanted.is_public, clock.now()
    )


def insert(connection: sa.Connection, principal: Principal, share: Share, marks: dict[str, str]) -> None:
    """Store a new share, and that it was made; `marks` are its entry's."""
    store.insert(connection, share)
    event = _event(principal, "share.create", share, marks, port=str(share.port), is_public=_word(share.is_public))
    audit_events.insert(connection, event)


async def list_shares(control: Control, principal: Principal, entry: Entry | None = None) -> list[Share]:
    """The organization's shares, or those of one instance, oldest first."""
    require(principal, SCOPE)
    return [
        share
        for share in control.shares
        if share.organization_id == principal.organization_id
        and (entry is None or share.instance_id == entry.instance.id)
        and _entry(control, share) is not None
    ]


async def get(control: Control, principal: Principal, share_id: UUID) -> Share:
    """One share. Raises ShareNotFoundError, also for another organization's."""
    require(principal, SCOPE)
    share = control.shares.get(share_id)
    if share is None or share.organization_id != principal.organization_id or _entry(control, share) is None:
        raise ShareNotFoundError
    return share


async def set_public(control: Control, principal: Principal, share_id: UUID, *, is_public: bool) -> Share:
    """The share, open to everybody or not. Raises ShareNotFoundError."""
    share = replace(await get(control, principal, share_id), is_public=is_public)
    event = _event(principal, "share.change", share, _marks(control, share), is_public=_word(is_public))

    def write(connection: sa.Connection) -> None:
        if not store.set_public(connection, share_id, is_public=is_public):
            raise ShareNotFoundError
        audit_events.insert(connection, event)

    await control.database.write(write)
    # Not one that was revoked while this was written: its name would lead somewhere again.
    if control.shares.get(share_id) is None:
        raise ShareNotFoundError
    control.shares.put(share)
    return share


async def revoke(control: Control, principal: Principal, share_id: UUID) -> Share:
    """Take a share away: its name leads nowhere from now on, and its links are void. Raises ShareNotFoundError."""
    share = await get(control, principal, share_id)
    event = _event(principal, "share.revoke", share, _marks(control, share))

    def write(connection: sa.Connection) -> None:
        store.delete(connection, share_id)
        audit_events.insert(connection, event)

    # First: what has been revoked must not open again, whatever becomes of the write.
    control.shares.remove(share)
    try:
        await control.database.write(write)
    except BaseException:
        control.shares.put(share)
        raise
    return share


async def make_link(control: Control, principal: Principal, share_id: UUID, *, seconds: int) -> Link:
    """A signature that opens the share to whoever has it, for so long. Raises ShareNotFoundError, InvalidRequestError."""
    share = await get(control, principal, share_id)
    if not 1 <= seconds <= LINK_SECONDS_MAX:
        raise InvalidRequestError(f"expires_in_seconds: must be between 1 and {LINK_SECONDS_MAX}")
    expires_at = int(time.time()) + seconds
    event = _event(principal, "share.link", share, _marks(control, share), seconds=str(seconds))
    await control.database.write(audit_events.insert, event)
    return Link(share, sign(control.box.link_key, _subject(share), expires_at), expires_at)


def resolve(control: Control, name: str) -> Target | None:
    """The published port of a name, or None where there is none (any more). A name of `own_name` leads to a private one without a share."""
    share = control.shares.find(name)
    if share is not None:
        entry = _entry(control, share)
        return None if entry is None else Target(entry, share.port, share.is_public, _subject(share))
    match = _OWN_NAME.fullmatch(name)
    if match is None or int(match[2]) > 65_535:
        return None
    entry = control.live.by_instance(UUID(bytes=_from_base32(match[1])))
    return None if entry is None or entry.doomed else own_target(entry, int(match[2]))


def own_name(entry: Entry, port: int) -> str:
    """The name under which a port of an instance is found without a share, by who may use the instance."""
    return f"{_base32(entry.instance.id.bytes)}-{port}"


def own_target(entry: Entry, port: int) -> Target:
    """A port of an instance without a share: always private."""
    return Target(entry, port, is_public=False, subject=f"port {entry.instance.id} {port}")


def sign_target(control: Control, target: Target, *, seconds: int) -> str:
    """A signature that opens a target for so long. The caller has seen to it that whoever gets it may."""
    return sign(control.box.link_key, target.subject, int(time.time()) + seconds)


def visit_signature(control: Control, target: Target, *, expires_at: int) -> str:
    """What a visitor who came by a link keeps."""
    return sign(control.box.link_key, f"visit {target.subject}", expires_at)


def link_opens(control: Control, target: Target, signature: str) -> int | None:
    """Until when a link's signature opens the target (Unix seconds), or None when it does not."""
    return signed_until(control.box.link_key, target.subject, signature, now=time.time())


def visit_opens(control: Control, target: Target, signature: str) -> bool:
    """Whether what a visitor kept still opens the target."""
    return signed_until(control.box.link_key, f"visit {target.subject}", signature, now=time.time()) is not None


def admits(target: Target, principal: Principal) -> bool:
    """Whether a token's bearer may see a private share: one of its organization that may use instances."""
    return principal.organization_id == target.entry.instance.organization_id and principal.allows(SCOPE)


def visitor(target: Target) -> Principal:
    """Whoever has come through: may reach this port and nothing else."""
    return Principal(target.entry.instance.organization_id, None, frozenset({SCOPE}), "share")


def share_host(control: Control, name: str) -> str:
    """The host of a share's URL, with its port where that is not the usual one."""
    settings = control.settings
    if ":" in settings.share_domain or not (settings.share_domain == "localhost" or settings.insecure):
        return f"{name}.{settings.share_domain}"
    return f"{name}.{settings.share_domain}:{settings.port}"


def share_url(control: Control, name: str) -> str:
    """The URL of a share: https, which a front speaks, unless it is this machine's own or the server was told to do without."""
    settings = control.settings
    plain = settings.insecure or settings.share_domain.partition(":")[0] == "localhost"
    return f"{'http' if plain else 'https'}://{share_host(control, name)}/"


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()


def _from_base32(text: str) -> bytes:
    return base64.b32decode(text.upper() + "======")


def _entry(control: Control, share: Share) -> Entry | None:
    entry = control.live.by_instance(share.instance_id)
    return None if entry is None or entry.doomed else entry


def _marks(control: Control, share: Share) -> dict[str, str]:
    entry = _entry(control, share)
    return {} if entry is None else entry.marks


def _event(principal: Principal, action: str, share: Share, marks: dict[str, str], **details: str) -> AuditEvent:
    about = {"instance_id": str(share.instance_id), **marks, **details}
    return audit.event(principal, action, "share", share.id, about)


def _subject(share: Share) -> str:
    return f"share {share.id}"


def _word(value: bool) -> str:
    return "true" if value else "false"
