"""How many SSH connections there may be, and how many of them from one address: asked before a byte of theirs is read."""

from __future__ import annotations

from collections import Counter

from innkeeper.api.rate_limit import address_key

# Clients that have not shown a key yet. A handshake costs a few milliseconds of the event loop, and these are anybody's.
STRANGERS = 32
STRANGERS_PER_ADDRESS = 8


class Place:
    """A connection that counts; `leave` must follow."""

    def __init__(self, limits: ConnectionLimits, address: str) -> None:
        self._limits = limits
        self._address = address
        self._strange = True
        self._left = False

    def known(self) -> None:
        """Its client has shown its key."""
        if self._strange:
            self._strange = False
            self._limits.forget_stranger(self._address)

    def leave(self) -> None:
        """It is closed; safe to repeat."""
        if not self._left:
            self._left = True
            self.known()
            self._limits.forget(self._address)


class ConnectionLimits:
    """Counts connections, all of them and those of strangers, by address."""

    def __init__(self, total: int, per_address: int) -> None:
        self._total = total
        self._per_address = per_address
        self._open: Counter[str] = Counter()
        self._strangers: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._open.total()

    def enter(self, address: str) -> Place | None:
        """A place for a new connection; None where there is none."""
        key = address_key(address)
        if (
            self._open.total() >= self._total
            or self._open[key] >= self._per_address
            or self._strangers.total() >= STRANGERS
            or self._strangers[key] >= STRANGERS_PER_ADDRESS
        ):
            return None
        self._open[key] += 1
        self._strangers[key] += 1
        return Place(self, key)

    def forget_stranger(self, key: str) -> None:
        """One of the address is no stranger any more."""
        _less(self._strangers, key)

    def forget(self, key: str) -> None:
        """One of the address is gone."""
        _less(self._open, key)


def _less(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
