"""Requests per client address, in a table that cannot grow without end."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Callable
from time import monotonic

from innkeeper.errors import RateLimitedError

MAX_ADDRESSES = 10_000


class AddressRateLimit:
    """A token bucket an address: `per_minute` requests at once, refilled evenly. An IPv6 client is its /64, which one customer owns whole."""

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = monotonic) -> None:
        self._capacity = float(per_minute)
        self._per_second = per_minute / 60
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def check(self, address: str) -> None:
        """Count one request.

        Raises:
            RateLimitedError: too many, with the seconds until the next one is allowed.

        """
        key = address_key(address)
        now = self._clock()
        left, at = self._buckets.pop(key, (self._capacity, now))
        left = min(self._capacity, left + (now - at) * self._per_second)
        allowed = left >= 1
        self._buckets[key] = (left - 1 if allowed else left, now)
        if len(self._buckets) > MAX_ADDRESSES:
            # The one that was quiet longest: it had the most time to refill.
            self._buckets.popitem(last=False)
        if not allowed:
            wait = int((1 - left) / self._per_second) + 1
            raise RateLimitedError("Too many requests from this address.", retry_after_seconds=wait)

    def __len__(self) -> int:
        return len(self._buckets)


def address_key(address: str) -> str:
    """What stands for a client: its address, of IPv6 the /64."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(ipaddress.IPv6Address(int(ip) >> 64 << 64))
    return str(ip)
