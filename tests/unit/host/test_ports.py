import types
from uuid import UUID

import pytest

from innkeeper.core.port_verbs import DialPort
from innkeeper.errors import GuestError, InvalidRequestError, PortUnreachableError
from innkeeper.host.guest_link import guest_error
from innkeeper.host.ports import checked_ports
from innkeeper.host.verbs import parser

GOOD = {"port": 80, "address": "127.0.0.1", "pid": 7, "command": "nginx"}


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (GOOD, GOOD),
        ({"port": 80, "address": "::"}, {"port": 80, "address": "::", "pid": None, "command": None}),
        ({**GOOD, "command": "a\nb\x1b[2J" + "x" * 1000}, {**GOOD, "command": ("a?b?[2J" + "x" * 1000)[:64]}),
        ({**GOOD, "pid": -1, "command": ["x"]}, {**GOOD, "pid": None, "command": None}),
        ({**GOOD, "port": True}, None),
        ({**GOOD, "port": 0}, None),
        ({**GOOD, "port": 1 << 70}, None),
        ({**GOOD, "address": "<script>"}, None),
        ("text", None),
    ],
)
def test_what_an_agent_says_of_ports_is_checked(said, kept):
    assert checked_ports([said]) == ([] if kept is None else [kept])


@pytest.mark.parametrize("answer", [None, {}, "x", [GOOD] * 501])
def test_no_list_of_ports(answer):
    with pytest.raises(GuestError):
        checked_ports(answer)


@pytest.mark.parametrize("port", [0, 65_536, -1, "x", 80.5, None])
def test_a_port_that_is_none_is_refused(port):
    call = types.SimpleNamespace(params={"verb": DialPort.verb, "instance_id": str(UUID(int=1)), "port": port})
    with pytest.raises(InvalidRequestError):
        parser(DialPort)(call)


def test_an_unreachable_port_tells_nothing_of_the_inside():
    error = guest_error("unreachable", "dial tcp 127.0.0.1:80: connect: connection refused")
    assert isinstance(error, PortUnreachableError) and "127.0.0.1" not in error.message
