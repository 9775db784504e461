"""Retention: which of the moments that an organization keeps go by themselves, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from uuid import UUID

from innkeeper.errors import InvalidRequestError

KEEP_LAST_MAX = 100_000
MAX_AGE_DAYS_MAX = 36_500
MAX_BYTES_MAX = 1 << 60


class KeptKind(StrEnum):
    """What a rule is for."""

    SNAPSHOTS = "snapshots"
    CHECKPOINTS = "volume_checkpoints"


class Reason(StrEnum):
    """The rule by which one goes."""

    KEEP_LAST = "keep_last"
    MAX_AGE = "max_age_days"
    MAX_BYTES = "max_bytes"


@dataclass(frozen=True, slots=True)
class RetentionRule:
    """What stays. None: without that limit. Raises InvalidRequestError, naming the field.

    Args:
        keep_last: so many of each VM, or of each volume, the newest.
        max_age_days: those that are no older.
        max_bytes: the newest that take no more for themselves, all of the organization's together. The newest of each VM or volume stays whatever it takes.

    """

    keep_last: int | None = None
    max_age_days: int | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, value, limit in (
            ("keep_last", self.keep_last, KEEP_LAST_MAX),
            ("max_age_days", self.max_age_days, MAX_AGE_DAYS_MAX),
            ("max_bytes", self.max_bytes, MAX_BYTES_MAX),
        ):
            if value is not None and not 1 <= value <= limit:
                raise InvalidRequestError(f"{name}: must be between 1 and {limit}, or null")

    @property
    def limits(self) -> bool:
        """Whether anything goes by it."""
        return (self.keep_last, self.max_age_days, self.max_bytes) != (None, None, None)


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """An organization's rules. Without any, everything stays."""

    snapshots: RetentionRule = field(default_factory=RetentionRule)
    volume_checkpoints: RetentionRule = field(default_factory=RetentionRule)

    def rule(self, kind: KeptKind) -> RetentionRule:
        """The rule for a kind."""
        return self.snapshots if kind is KeptKind.SNAPSHOTS else self.volume_checkpoints


@dataclass(frozen=True, slots=True)
class Kept:
    """A snapshot of the instance `of`, or a checkpoint of the volume `of`; `size_bytes` would be free without it."""

    kind: KeptKind
    id: UUID
    of: UUID
    name: str
    created_at: datetime
    size_bytes: int


def excess(rule: RetentionRule, kept: Iterable[Kept], *, now: datetime) -> list[tuple[Kept, Reason]]:
    """What goes by a rule, oldest first."""
    newest_first = sorted(kept, key=lambda one: (one.created_at, one.id), reverse=True)
    oldest = None if rule.max_age_days is None else now - timedelta(days=rule.max_age_days)
    seen: Counter[UUID] = Counter()
    found: list[tuple[Kept, Reason]] = []
    left: list[tuple[Kept, bool]] = []
    for one in newest_first:
        seen[one.of] += 1
        if rule.keep_last is not None and seen[one.of] > rule.keep_last:
            found.append((one, Reason.KEEP_LAST))
        elif oldest is not None and one.created_at < oldest:
            found.append((one, Reason.MAX_AGE))
        else:
            left.append((one, seen[one.of] == 1))
    if rule.max_bytes is not None:
        total = sum(one.size_bytes for one, _ in left)
        for one, newest in reversed(left):
            if total <= rule.max_bytes:
                break
            if not newest:
                found.append((one, Reason.MAX_BYTES))
                total -= one.size_bytes
    return sorted(found, key=lambda row: (row[0].created_at, row[0].id))
