import pytest

from innkeeper.api.rate_limit import MAX_ADDRESSES, AddressRateLimit
from innkeeper.errors import RateLimitedError


def test_the_limit_holds_per_address_and_refills() -> None:
    now = 0.0
    limit = AddressRateLimit(60, clock=lambda: now)
    for _ in range(60):
        limit.check("192.0.2.1")
    with pytest.raises(RateLimitedError) as caught:
        limit.check("192.0.2.1")
    assert caught.value.retry_after_seconds >= 1
    limit.check("192.0.2.2")
    now = 1.0
    limit.check("192.0.2.1")
    with pytest.raises(RateLimitedError):
        limit.check("192.0.2.1")


def test_an_ipv6_network_is_one_client() -> None:
    limit = AddressRateLimit(1, clock=lambda: 0.0)
    limit.check("2001:db8::1")
    with pytest.raises(RateLimitedError):
        limit.check("2001:db8::ffff:1")
    limit.check("2001:db8:0:1::1")


def test_the_table_is_bounded() -> None:
    limit = AddressRateLimit(1, clock=lambda: 0.0)
    for i in range(MAX_ADDRESSES + 100):
        limit.check(f"client-{i}")
    assert len(limit) == MAX_ADDRESSES
