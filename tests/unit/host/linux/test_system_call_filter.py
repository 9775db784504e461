"""The filter's program, run by an interpreter of its own: what is refused and what goes on."""

from __future__ import annotations

import pytest

from innkeeper.host.linux import system_call_filter as filters
from innkeeper.host.linux.system_call_filter import (
    ALLOW,
    ARCHITECTURES,
    FAMILIES,
    KILL,
    NO_SUCH_FAMILY,
    REFUSE,
    REFUSED,
    SOCKET,
    instructions,
)


def decide(machine: str, architecture: int, number: int, argument: int = 1) -> int:
    """What the kernel would answer."""
    program, at, word = instructions(machine), 0, 0
    while True:
        code, if_true, if_false, value = program[at]
        if code == filters.BPF_RETURN:
            return value
        if code == filters.BPF_LOAD_WORD:
            word = {
                filters.NUMBER_OFFSET: number,
                filters.ARCHITECTURE_OFFSET: architecture,
                filters.FIRST_ARGUMENT_OFFSET: argument,
            }[value]
            at += 1
            continue
        true = word == value if code == filters.BPF_JUMP_EQUAL else word >= value
        at += 1 + (if_true if true else if_false)


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_what_is_named_is_refused_and_nothing_else(machine: str) -> None:
    column = list(ARCHITECTURES).index(machine)
    refused = {pair[column] for pair in REFUSED.values()}
    for number in range(500):
        expected = REFUSE if number in refused else ALLOW
        assert decide(machine, ARCHITECTURES[machine], number) == expected, number


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_sockets_of_a_few_families_only(machine: str) -> None:
    number = SOCKET[list(ARCHITECTURES).index(machine)]
    for family in range(60):
        expected = ALLOW if family in FAMILIES else NO_SUCH_FAMILY
        assert decide(machine, ARCHITECTURES[machine], number, family) == expected, family
        assert decide(machine, ARCHITECTURES[machine], 0, family) == ALLOW


def test_other_architectures_and_x32_get_nowhere() -> None:
    assert decide("x86_64", ARCHITECTURES["aarch64"], 0) == KILL
    assert decide("x86_64", ARCHITECTURES["x86_64"], filters.X32_BIT + 1) == REFUSE


def test_jumps_stay_in_their_byte() -> None:
    for machine in ARCHITECTURES:
        assert all(0 <= jump <= 255 for _, one, other, _ in instructions(machine) for jump in (one, other))
