"""The same command endpoint with `Accept: text/event-stream`: output as it comes, then the result."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from server_fixture import Room, until

pytestmark = pytest.mark.microvms

EVENTS = {"Accept": "text/event-stream"}


def events(response: httpx2.Response) -> Iterator[tuple[str, Any]]:
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])


def stream(room: Room, command: str, **extras: Any) -> Any:
    return room.client.stream("POST", f"{room.path}/command", json={"command": command, **extras}, headers=EVENTS)


def test_output_comes_while_the_command_runs(shared: Room) -> None:
    with stream(shared, "echo one; sleep 1.5; echo two >&2") as response:
        assert response.status_code == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        seen = [(name, data, time.monotonic()) for name, data in events(response)]
    assert [name for name, _, _ in seen] == ["started", "output", "output", "result"]
    assert [data["data"] for name, data, _ in seen if name == "output"] == ["one\n", "two\n"]
    assert seen[2][2] - seen[1][2] > 1, "the first line was held back"
    result = seen[3][1]
    assert result["result"]["output"] == "one\ntwo" and result["status"] == "success"
    assert result["result"]["execution_id"] == seen[0][1]["execution_id"]


def test_the_result_is_the_same_object_as_without_a_stream(shared: Room) -> None:
    with stream(shared, "echo 1 > streamed.txt; exit 3") as response:
        *_, (name, streamed) = events(response)
    assert name == "result" and (streamed["status"], streamed["result"]["exit_code"]) == ("error", 3)
    assert set(streamed) == set(shared.run("true")) and set(streamed["result"]) == set(shared.run("true")["result"])
    assert [row["path"] for row in streamed["result"]["files_changed"]] == ["/home/user/streamed.txt"]


def test_the_stream_is_whole_where_the_answer_is_cut(shared: Room) -> None:
    with stream(shared, "seq 1 400000") as response:
        seen = list(events(response))
    text = "".join(data["data"] for name, data in seen if name == "output")
    assert text == "".join(f"{n}\n" for n in range(1, 400_001))
    assert seen[-1][1]["result"]["output_truncated"] is True


def test_a_character_in_two_pieces_arrives_whole(shared: Room) -> None:
    with stream(shared, r"printf '\xc3'; sleep 0.3; printf '\xbc'") as response:
        assert "".join(data["data"] for name, data in events(response) if name == "output") == "ü"


def test_a_refusal_before_the_stream_has_its_status(shared: Room) -> None:
    answer = shared.client.post(f"{shared.path}/command", json={"command": ""}, headers=EVENTS)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")


def test_a_client_that_goes_away_ends_nothing(room: Room) -> None:
    room.create()
    with stream(room, "echo begun; sleep 3; echo finished > done.txt; echo done") as response:
        seen = events(response)
        execution = next(seen)[1]["execution_id"]
        assert next(seen)[1]["data"] == "begun\n"
    assert room.run("cat done.txt")["result"]["exit_code"] == 1, "it had ended before the client went away"
    until(lambda: room.file("/home/user/done.txt").status_code == 200, seconds=20)

    def kept() -> Any:
        return room.client.get(f"{room.path}/command/{execution}/output").json()

    until(lambda: kept()["ended"], seconds=20)
    assert (kept()["output"], kept()["exit_code"]) == ("begun\ndone\n", 0)


def test_a_client_that_waited_for_json_and_went_away_ends_nothing(room: Room) -> None:
    room.create()
    try:
        room.client.post(f"{room.path}/command", json={"command": "sleep 3; echo yes > done.txt"}, timeout=0.5)
    except httpx2.ReadTimeout:
        pass
    else:
        raise AssertionError("it was answered at once")
    until(lambda: room.file("/home/user/done.txt").status_code == 200, seconds=20)
