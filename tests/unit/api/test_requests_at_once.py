from uuid import uuid4

import pytest

from innkeeper.api.requests_at_once import RequestsAtOnce
from innkeeper.errors import RateLimitedError


def test_each_organization_has_its_own_count():
    limit, one, other = RequestsAtOnce(2), uuid4(), uuid4()
    scopes = [{}, {}, {}]
    limit.begin(scopes[0], one)
    limit.begin(scopes[1], one)
    with pytest.raises(RateLimitedError, match="2 requests"):
        limit.begin(scopes[2], one)
    limit.end(scopes[2])
    with pytest.raises(RateLimitedError):
        limit.begin(scopes[2], one)
    limit.begin(scopes[2], other)
    limit.end(scopes[0])
    limit.end(scopes[0])
    limit.begin(scopes[0], one)
    for scope in scopes:
        limit.end(scope)
    assert not limit._under_way
