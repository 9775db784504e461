from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

import pytest

from innkeeper.core.egress_policy import parse_egress_policy
from innkeeper.core.profile import ENV_BYTES_MAX, Profile, validate_env, validate_profile
from innkeeper.core.room import validate_room_id
from innkeeper.errors import InvalidRequestError

GOOD = Profile(UUID(int=1), UUID(int=2), "base", "base", datetime(2026, 1, 1, tzinfo=UTC))
RANGES = {
    "vcpu_count": (1, 64),
    "memory_mb": (128, 262_144),
    "disk_mb": (64, 1_048_576),
    "warm_pool_size": (0, 1_000),
    "idle_seconds": (60, 31_536_000),
    "command_timeout_seconds": (1, 3_600),
}


def refused(name, value):
    with pytest.raises(InvalidRequestError, match=rf"^{name}: "):
        validate_profile(replace(GOOD, **{name: value}))


@pytest.mark.parametrize("name", RANGES)
def test_both_ends_of_each_range(name):
    low, high = RANGES[name]
    for value in (low, high):
        validate_profile(replace(GOOD, **{name: value}))
    for value in (low - 1, high + 1, -1):
        refused(name, value)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("name", ["a", "0", "a-b.c_d", "a" * 63], ["", "A", "-a", "a-", ".a", "a" * 64, "a b", "a\n", "é", "a/b"]),
        ("image", ["base", "python-data-science"], ["", "../x", "a/b", "Base", "base\n"]),
        ("driver", ["auto", "gvisor", "qemu"], ["", "docker", "GVISOR"]),
        ("min_isolation", ["none", "gvisor", "microvm"], ["", "all"]),
        ("public_files", ["reported", "all", "off"], ["", "none"]),
        ("user", [None, "user", "_x", "a" * 32], ["", "0a", "A", "a" * 33, "root:x", "a\n"]),
        ("workdir", [None, "/", "/home/user", "/" + "x" * 4_095], ["", "x", "/a\0", "/" + "x" * 4_096]),
        ("idle_seconds", [None], []),
    ],
)
def test_words(name, good, bad):
    for value in good:
        validate_profile(replace(GOOD, **{name: value}))
    for value in bad:
        refused(name, value)


def test_env_limits():
    validate_env({})
    validate_env({"A": "x" * (ENV_BYTES_MAX - 3)})
    validate_env({"_a9": "é\n\ud800"})
    for env in (
        {"A": "x" * (ENV_BYTES_MAX - 2)},
        {"A": "é" * (ENV_BYTES_MAX // 2)},
        {f"A{number}": "" for number in range(ENV_BYTES_MAX // 3)},
    ):
        with pytest.raises(InvalidRequestError, match=f"at most {ENV_BYTES_MAX} bytes"):
            validate_env(env)


@pytest.mark.parametrize("name", ["", "1A", "A=B", "A B", "é", "A\n", "A\0"])
def test_env_names(name):
    with pytest.raises(InvalidRequestError, match="is not a variable name"):
        validate_env({name: "x"})


def test_an_error_names_the_variable_and_never_its_value():
    with pytest.raises(InvalidRequestError) as caught:
        validate_profile(replace(GOOD, env={"KEY": "hunter2\0"}))
    assert "KEY" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(replace(GOOD, env={"KEY": "hunter2"}))


@pytest.mark.parametrize("mode", ["internet", "none"])
def test_egress_policies_that_are_enforced(mode):
    assert parse_egress_policy({"mode": mode}).as_dict() == {"mode": mode}


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({}, "None"),
        ({"mode": "allowlist"}, "'allowlist'"),
        ({"mode": None}, "None"),
        ({"mode": ["none"]}, "none"),
        ({"mode": "none", "allow": []}, "'allow'"),
        ({"mode": "internet", "b": 1, "a": 2}, "'a', 'b'"),
    ],
)
def test_other_policies_are_refused_by_name(value, named):
    with pytest.raises(InvalidRequestError) as caught:
        parse_egress_policy(value)
    assert named in str(caught.value)


@pytest.mark.parametrize("room_id", ["a", "x" * 255, "é" * 255, "a/b", "..", " ", "\n", "\U0001f600"])
def test_room_ids(room_id):
    validate_room_id(room_id)


@pytest.mark.parametrize("room_id", ["", "x" * 256, "a\ud800", "a\0b"])
def test_bad_room_ids(room_id):
    with pytest.raises(InvalidRequestError, match=r"^room_id: "):
        validate_room_id(room_id)
