"""Specs: which guests are interchangeable."""

from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

from innkeeper.core.egress_policy import EgressPolicy
from innkeeper.core.instance_spec import pool_shape, spec_of_profile
from innkeeper.core.profile import Profile

GOOD = Profile(UUID(int=1), UUID(int=2), "base", "base", datetime(2026, 1, 1, tzinfo=UTC))
SHAPE = {"image_digest": "d", "driver": "gvisor", "agent_version": "1"}


def key_of(profile, **shape):
    return pool_shape(spec_of_profile(profile), **shape)


def test_equal_guests_have_equal_keys():
    key = key_of(GOOD, **SHAPE)
    # Also in another process and version of the server: adopted guests are found by it.
    assert key == "c3d7d51905cb6fb8d100572ab65a3a42"
    assert (len(key), int(key, 16) >= 0) == (32, True)
    claimed = replace(GOOD, env={"A": "b"}, user="x", workdir="/y", name="other", warm_pool_size=9, idle_seconds=None)
    assert key_of(claimed, **SHAPE) == key


def test_whatever_makes_guests_differ_makes_keys_differ():
    profiles = [
        replace(GOOD, **{name: value})
        for name, value in {
            "id": UUID(int=9),
            "organization_id": UUID(int=9),
            "revision": 1,
            "vcpu_count": 3,
            "memory_mb": 2_048,
            "disk_mb": 100,
            "egress_policy": EgressPolicy("none"),
        }.items()
    ]
    keys = [key_of(profile, **SHAPE) for profile in [GOOD, *profiles]]
    keys += [key_of(GOOD, **{**SHAPE, name: "other"}) for name in SHAPE]
    assert len(set(keys)) == len(keys) == 11
