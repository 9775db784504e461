"""What a verification makes of a guest's word."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from innkeeper.control.guest_probe import Told, told_of
from innkeeper.control.snapshot_checks import judged
from innkeeper.core.snapshot import Mark, Snapshot, SnapshotStatus

ID = UUID(int=1)
MARK = Mark(nonce="n", machine_id="m", hostname="h", entropy="e")
SNAPSHOT = Snapshot(
    ID, ID, ID, ID, "", SnapshotStatus.READY, datetime(2026, 1, 1, tzinfo=UTC), True, "gvisor", "base", "d", None, 1, 512, 1024,
    mark=MARK,
)  # fmt: skip
GOOD = Told(time=1_000, hostname="h2", machine_id="m2", entropy="e2", nonce="n")


def found(told: Told, snapshot: Snapshot = SNAPSHOT, **options: Any) -> dict[str, bool | None]:
    checks = judged(snapshot, told, 1_000.2, 1_001.0, **{"restored": True, **options})
    return {check.name: check.ok for check in checks}


def test_a_guest_of_its_own() -> None:
    assert found(GOOD) == {"clock": True, "entropy": True, "identity": True, "sentinel": True}


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"time": 990}, "clock"),
        ({"time": 1_010}, "clock"),
        ({"entropy": "e"}, "entropy"),
        ({"machine_id": "m"}, "identity"),
        ({"hostname": "h"}, "identity"),
        ({"nonce": "other"}, "sentinel"),
        ({"nonce": ""}, "sentinel"),
    ],
)
def test_what_is_wrong_fails_alone(wrong: dict[str, Any], name: str) -> None:
    checks = found(dataclasses.replace(GOOD, **wrong))
    assert [one for one, ok in checks.items() if ok is not True] == [name] and checks[name] is False


@pytest.mark.parametrize("time", [995, 1_000, 1_006])
def test_a_slow_machine_is_not_damage(time: int) -> None:
    assert found(dataclasses.replace(GOOD, time=time))["clock"] is True


def test_what_is_not_told_is_no_failure() -> None:
    silent = Told(time=None, hostname="", machine_id="", entropy="", nonce="n")
    assert found(silent) == {"clock": None, "entropy": None, "identity": None, "sentinel": True}
    unmarked = dataclasses.replace(SNAPSHOT, mark=None)
    nothing = {"clock": True, "entropy": None, "identity": None, "sentinel": None}
    assert found(GOOD, unmarked) == found(GOOD, restored=False) == nothing


def test_what_a_guest_says_is_read_with_care() -> None:
    said = (
        b"time=12\nhostname=a b\x1b[2J\nmachine_id=m1\nmachine_id=m2\nentropy=" + b"f" * 200 + b"\nnonce=\xff\njunk\n"
    )
    assert told_of(said) == Told(time=12, hostname="", machine_id="m1", entropy="", nonce="")
    assert told_of(b"time=1e9\n").time is None and told_of(b"time=" + b"9" * 40).time is None
