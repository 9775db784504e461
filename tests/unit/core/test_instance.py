from datetime import UTC, datetime
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from innkeeper.core.instance import LEGAL, PROVISIONING, Instance, InstanceState, transition
from innkeeper.errors import ConflictError

S = InstanceState
FORWARD = ["active", "network_allocated", "ftap_created", "image_generated", "vm_started", "vm_booted", "ready"]
# The table a second time, by hand.
TABLE = {name: {*FORWARD[at + 1 :], "suspended", "failed", "stopping", "destroyed"} for at, name in enumerate(FORWARD)}
TABLE["ready"] = {"active", "suspending", "failed", "stopping", "destroyed"}
TABLE |= {
    "suspending": {"suspended", "ready", "stopping", "failed", "destroyed"},
    "suspended": {"active", "stopping", "failed", "destroyed"},
    "stopping": {"stopped", "failed", "destroyed"},
    "stopped": {"active", "failed", "destroyed"},
    "failed": {"active", "destroyed"},
    "destroyed": set(),
}


def instance(state):
    return Instance(uuid4(), uuid4(), uuid4(), uuid4(), "base", state, datetime.now(UTC), failure="old", revision=7)


def test_the_names_are_the_documented_ones():
    assert [state.value for state in PROVISIONING] == FORWARD
    assert set(TABLE) == {state.value for state in S} == {state.value for state in LEGAL}


@pytest.mark.parametrize("before", list(S))
@pytest.mark.parametrize("after", list(S))
def test_every_step_is_legal_or_refused(before, after):
    one = instance(before)
    if before is after:
        assert transition(one, after) is one
    elif after.value in TABLE[before.value]:
        moved = transition(one, after, failure="why")
        assert (moved.state, moved.revision) == (after, 8)
        assert moved.failure == ("why" if after is S.FAILED else None)
        assert (moved.id, moved.public_id, moved.created_at) == (one.id, one.public_id, one.created_at)
    else:
        with pytest.raises(ConflictError, match=f"from {before} to {after}"):
            transition(one, after)
    assert (one.state, one.revision, one.failure) == (before, 7, "old")


@given(st.lists(st.sampled_from(list(S)), max_size=30))
def test_a_walk_counts_its_steps_and_never_returns_from_destruction(wishes):
    one, steps, seen = instance(S.ACTIVE), 0, []
    for wish in wishes:
        try:
            moved = transition(one, wish, failure="f")
        except ConflictError:
            continue
        steps += moved is not one
        one = moved
        seen.append(one.state)
        assert (one.failure is not None) == (one.state is S.FAILED) or steps == 0
    assert one.revision == 7 + steps
    if S.DESTROYED in seen:
        assert set(seen[seen.index(S.DESTROYED) :]) == {S.DESTROYED}


def test_from_everywhere_there_is_a_way_out():
    assert all(S.DESTROYED in LEGAL[state] for state in S if state is not S.DESTROYED)
