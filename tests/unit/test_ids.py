import sys
import threading
import time
from uuid import RFC_4122, UUID

import pytest

from innkeeper import ids
from innkeeper.ids import parse_uuid, public_key_id, uuid7


def test_layout():
    before = time.time_ns() // 1_000_000
    one = uuid7()
    assert (one.version, one.variant) == (7, RFC_4122)
    assert before <= one.int >> 80 <= ids._last_ms
    assert len({uuid7().int & ((1 << 62) - 1) for _ in range(100)}) == 100


def test_they_ascend_across_threads():
    made = [[] for _ in range(4)]
    barrier = threading.Barrier(4)

    def make(into):
        barrier.wait()
        into.extend(uuid7() for _ in range(3_000))

    threads = [threading.Thread(target=make, args=(into,)) for into in made]
    # Threads take turns as often as they can, so that a lock that is not there is missed.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for mine in made:
        assert mine == sorted(mine)
    assert len({one >> 64 for one in (x.int for mine in made for x in mine)}) == 12_000


@pytest.mark.parametrize("clock", [[5_000], [5_000, 4_000, 3_000]], ids=["stands still", "goes back"])
def test_they_ascend_whatever_the_clock_does(monkeypatch, clock):
    monkeypatch.setattr(ids, "_last_ms", 0)
    monkeypatch.setattr(ids, "_counter", 0)
    moments = iter(clock)
    now = [0]

    def time_ns():
        now[0] = next(moments, now[0])
        return now[0] * 1_000_000

    monkeypatch.setattr(ids.time, "time_ns", time_ns)
    made = [uuid7() for _ in range(10_000)]
    assert made == sorted(set(made))
    assert (made[0].int >> 80, made[-1].int >> 80) == (5_000, 5_002)


def test_public_ids_are_random():
    one = public_key_id()
    assert (one.version, one != public_key_id()) == (4, True)


@pytest.mark.parametrize("text", ["", "x", "{%s}", "urn:uuid:%s", " %s", "%s\n", "%sx"])
def test_only_the_canonical_spelling(text):
    one = uuid7()
    assert parse_uuid(str(one)) == parse_uuid(str(one).upper()) == one
    assert parse_uuid(text % one if "%" in text else text) is None
    assert parse_uuid(one.hex) is None
    assert isinstance(parse_uuid(str(one)), UUID)
