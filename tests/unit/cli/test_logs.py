"""`inn logs`: what it asks for and prints, and how it goes on after a connection that broke."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scripted_server import VM, room

from innkeeper.cli import logs

LINES = [
    {"sequence": 1, "at": "2026-01-02T03:04:05Z", "source": "lifecycle", "level": "info", "message": "Created"},
    {"sequence": 2, "at": "2026-01-02T03:04:06Z", "source": "stderr", "level": "warning", "message": "\x1b[2Joh\u202e"},
    {"sequence": 3, "at": "2026-01-02T03:04:07Z", "source": "lifecycle", "level": "error", "message": "Failed: gone"},
]
PRINTED = [
    "2026-01-02T03:04:05Z info    lifecycle Created",
    "2026-01-02T03:04:06Z warning stderr    \\x1b[2Joh\\u202e",
    "2026-01-02T03:04:07Z error   lifecycle Failed: gone",
]


def test_the_newest_lines_are_shown_harmless(inn: Any, server: Any) -> None:
    server.log_streams = [LINES]
    said = inn("logs", VM, "-n", "7")
    assert (said.status, said.out.splitlines()) == (0, PRINTED)
    assert (server.seen[-1].path, server.seen[-1].query) == (f"/v1/vms/{VM}/logs", {"lines": ["7"]})
    assert json.loads(inn("logs", VM, "--json").out)["lines"] == LINES
    for wrong in ("-1", "1001", "x"):
        assert inn("logs", VM, "-n", wrong).status == 2


def test_a_room_is_found_by_its_name(inn: Any, server: Any) -> None:
    server.log_streams = [LINES]
    assert inn("logs", "base/none").status == 1
    server.rooms = [room("r", server.profiles[0])]
    assert inn("logs", "base/r").out.splitlines() == PRINTED
    assert server.seen[-1].path == f"/v1/rooms/{server.rooms[0].instance_id}/logs"


def test_following_goes_on_after_breaks_and_ends_with_the_instance(
    inn: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "PAUSE_SECONDS", 0.0)
    # Cut in the middle, refused while the server starts, ended by an error, and at last the end.
    server.log_streams = [LINES[:2], 503, ["error"], [*LINES[2:], "end"]]
    said = inn("logs", VM, "-f", "-n", "9")
    assert (said.status, said.out.splitlines()) == (0, PRINTED)
    asked = [seen for seen in server.seen if seen.path.endswith("/logs/stream")]
    assert [seen.headers.get("last-event-id") for seen in asked] == [None, "2", "2", "2"]
    assert asked[0].query == {"lines": ["9"]}
    server.log_streams = [[*LINES, "gap", "end"]]
    said = inn("logs", VM, "-f", "--json")
    assert [json.loads(line) for line in said.out.splitlines()] == LINES
    assert "4 lines are not kept any more" in said.err


def test_following_gives_up_where_it_is_refused_or_the_server_stays_away(
    inn: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(logs, "AWAY_SECONDS", 0.0)
    server.log_streams = [404]
    assert inn("logs", VM, "-f").status == 1
    server.log_streams = [503] * 1_000
    said = inn("logs", VM, "-f")
    assert said.status == 1 and "cannot be followed any more" in said.err
