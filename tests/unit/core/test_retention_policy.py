"""Which of the kept go by a rule: worked out by hand, and what holds for every set of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from innkeeper.core.retention_policy import Kept, KeptKind, Reason, RetentionRule, excess
from innkeeper.errors import InvalidRequestError

NOW = datetime(2026, 1, 31, tzinfo=UTC)


def kept(number: int, of: int = 1, *, days_ago: float = 0.0, size: int = 10) -> Kept:
    return Kept(KeptKind.SNAPSHOTS, UUID(int=number), UUID(int=of), "n", NOW - timedelta(days=days_ago), size)


def gone(rule: RetentionRule, *rows: Kept) -> list[tuple[int, Reason]]:
    return [(one.id.int, reason) for one, reason in excess(rule, rows, now=NOW)]


def test_without_limits_nothing_goes() -> None:
    assert gone(RetentionRule(), kept(1, days_ago=10_000, size=1 << 50)) == []
    assert not RetentionRule().limits


def test_the_newest_of_each_stay() -> None:
    rows = [kept(n, of=n % 2, days_ago=n) for n in range(6)]
    assert gone(RetentionRule(keep_last=2), *rows) == [(5, Reason.KEEP_LAST), (4, Reason.KEEP_LAST)]


def test_older_ones_go_the_newest_included() -> None:
    rows = [kept(1, days_ago=8), kept(2, days_ago=7), kept(3, of=2, days_ago=400)]
    assert gone(RetentionRule(max_age_days=7), *rows) == [(3, Reason.MAX_AGE), (1, Reason.MAX_AGE)]


def test_by_bytes_the_oldest_go_but_never_the_newest_of_its_own() -> None:
    rows = [kept(1, days_ago=3), kept(2, days_ago=2), kept(3, days_ago=1), kept(4, of=2, days_ago=9, size=100)]
    assert gone(RetentionRule(max_bytes=125), *rows) == [(1, Reason.MAX_BYTES)]
    assert gone(RetentionRule(max_bytes=1), *rows) == [(1, Reason.MAX_BYTES), (2, Reason.MAX_BYTES)]
    assert gone(RetentionRule(max_bytes=130), *rows) == []


def test_each_limit_counts_what_the_others_leave() -> None:
    rows = [kept(1, days_ago=3), kept(2, days_ago=2), kept(3, days_ago=1), kept(4, days_ago=0)]
    assert gone(RetentionRule(keep_last=3, max_bytes=25), *rows) == [(1, Reason.KEEP_LAST), (2, Reason.MAX_BYTES)]


@pytest.mark.parametrize("field", ["keep_last", "max_age_days", "max_bytes"])
@pytest.mark.parametrize("value", [0, -1, 1 << 62])
def test_what_is_no_limit(field: str, value: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field}: "):
        RetentionRule(**{field: value})


LIMIT = st.none() | st.integers(1, 40)


@given(
    st.builds(RetentionRule, LIMIT, LIMIT, LIMIT),
    st.lists(st.tuples(st.integers(1, 3), st.floats(0, 60), st.integers(0, 20)), max_size=20),
)
def test_what_stays_keeps_the_rule(rule: RetentionRule, drawn: list[tuple[int, float, int]]) -> None:
    rows = [kept(number, of, days_ago=days, size=size) for number, (of, days, size) in enumerate(drawn)]
    away = {one.id for one, _ in excess(rule, rows, now=NOW)}
    left = [one for one in rows if one.id not in away]
    newest = {
        of: max((one for one in left if one.of == of), key=lambda one: (one.created_at, one.id))
        for of in {one.of for one in left}
    }
    for of in newest:
        assert rule.keep_last is None or sum(one.of == of for one in left) <= rule.keep_last
    assert all(rule.max_age_days is None or NOW - one.created_at <= timedelta(days=rule.max_age_days) for one in left)
    if rule.max_bytes is not None and sum(one.size_bytes for one in left) > rule.max_bytes:
        assert left == [one for one in rows if one in newest.values()]
    # Nothing goes in the place of an older one of its own.
    for one in rows:
        if one.id in away:
            assert all(
                other.id in away
                for other in rows
                if other.of == one.of and (other.created_at, other.id) < (one.created_at, one.id)
            )
