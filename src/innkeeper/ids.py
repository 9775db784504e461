"""Identifiers: uuid7 inside (sorted by creation), random uuid4 where an id is also a key.

Source of the layout: RFC 9562 section 5.7.
"""

from __future__ import annotations

import os
import threading
import time
from datetime import datetime
from uuid import UUID, uuid4

_lock = threading.Lock()
_last_ms = 0
_counter = 0


def uuid7() -> UUID:
    """A UUID of version 7: 48 bits of Unix milliseconds, a 12-bit counter within the millisecond, 62 random bits."""
    global _last_ms, _counter
    with _lock:
        now_ms = time.time_ns() // 1_000_000
        if now_ms > _last_ms:
            _last_ms, _counter = now_ms, 0
        else:
            # The clock stood still or went back: count on, and borrow from the future when the counter is full, so ids still ascend.
            _counter += 1
            if _counter > 0xFFF:
                _last_ms, _counter = _last_ms + 1, 0
        ms, counter = _last_ms, _counter
    random = int.from_bytes(os.urandom(8), "big") & ((1 << 62) - 1)
    return UUID(int=(ms << 80) | (0x7 << 76) | (counter << 64) | (0b10 << 62) | random)


def before_uuid7(moment: datetime) -> UUID:
    """The UUID that every `uuid7` of before the moment is smaller than, and none of later."""
    return UUID(int=(int(moment.timestamp() * 1000) << 80) | (0x7 << 76) | (0b10 << 62))


def public_key_id() -> UUID:
    """A random uuid4: for ids that grant access by being known (Gentility's instance_id), derivable from nothing else."""
    return uuid4()


def parse_uuid(text: str) -> UUID | None:
    """The UUID in canonical 8-4-4-4-12 spelling (any case), or None."""
    try:
        value = UUID(text)
    except ValueError:
        return None
    return value if str(value) == text.lower() else None
