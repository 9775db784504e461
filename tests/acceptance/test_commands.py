"""Commands in rooms, as the endpoint's page promises them."""

from __future__ import annotations

from server_fixture import Room


def test_a_command_says_what_it_printed_and_how_it_ended(shared: Room) -> None:
    answer = shared.run("echo out; echo err >&2")
    assert answer["instance_id"] == shared.create()["instance_id"]
    assert answer["command"] == "echo out; echo err >&2"
    assert answer["status"] == "success"
    assert answer["result"]["output"] == "out\nerr"
