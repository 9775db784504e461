"""What the daemon refuses although its types are right."""

from dataclasses import replace
from uuid import uuid4

import pytest

from innkeeper.core.checkpoint_verbs import ForkMachine, RestoreCheckpoint
from innkeeper.core.host_verbs import EnsureMachine, Execute, MachineShape, SetPools, WarmPool
from innkeeper.errors import InvalidRequestError
from innkeeper.host.request_limits import check_limits

SHAPE = MachineShape("key", "a" * 64, "gvisor", 1, 128, 64, "internet", "user")
ENSURE = EnsureMachine(uuid4(), SHAPE, "room-1")


def test_what_the_control_side_sends_passes() -> None:
    check_limits(ENSURE)
    check_limits(SetPools((WarmPool(SHAPE, 2),)))
    check_limits(Execute(uuid4(), uuid4(), "true", 3600))


@pytest.mark.parametrize(
    "change",
    [
        {"image_digest": "../../../etc"},
        {"image_digest": "a" * 63},
        {"image_digest": "a" * 64 + "\n"},
        {"vcpu_count": 0},
        {"vcpu_count": 65},
        {"memory_mb": 127},
        {"memory_mb": -1},
        {"disk_mb": 63},
        {"disk_mb": 1 << 40},
        {"egress_mode": "everything"},
        {"egress_ports": (0,)},
        {"egress_ports": (80,) * 17},
        {"egress_cidrs": ("0.0.0.0/0 }; flush ruleset",)},
        {"egress_cidrs": ("::/0",)},
        {"egress_cidrs": ("1.1.1.1",) * 65},
        {"user": "-rf"},
    ],
)
def test_a_shape_out_of_bounds_is_refused(change: dict[str, object]) -> None:
    shape = replace(SHAPE, **change)
    with pytest.raises(InvalidRequestError):
        check_limits(replace(ENSURE, shape=shape))
    with pytest.raises(InvalidRequestError):
        check_limits(SetPools((WarmPool(shape, 1),)))


@pytest.mark.parametrize("hostname", ["", "a\nb", "a b", "-a", "a" * 64, "UPPER"])
def test_a_host_name_that_is_none_is_refused(hostname: str) -> None:
    with pytest.raises(InvalidRequestError):
        check_limits(replace(ENSURE, hostname=hostname))


@pytest.mark.parametrize("timeout", [0, -1, 3601, float("nan"), float("inf")])
def test_a_time_limit_out_of_bounds_is_refused(timeout: float) -> None:
    with pytest.raises(InvalidRequestError):
        check_limits(Execute(uuid4(), uuid4(), "true", timeout))


def test_a_pool_is_not_larger_than_a_profile_may_ask() -> None:
    with pytest.raises(InvalidRequestError):
        check_limits(SetPools((WarmPool(SHAPE, 1001),)))


@pytest.mark.parametrize("change", [{"step_key": "a" * 64}, {"bare": True}, {"hostname": "../x"}, {"user": "-rf"}])
def test_a_machine_that_begins_with_a_checkpoint_is_one_of_an_instance(change: dict[str, object]) -> None:
    for kind in (RestoreCheckpoint, ForkMachine):
        check_limits(kind(uuid4(), ENSURE))
        with pytest.raises(InvalidRequestError):
            check_limits(kind(uuid4(), replace(ENSURE, **change)))
