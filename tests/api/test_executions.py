"""Executions of VMs and sessions over HTTP: fields, what is refused, and what is sent to the host."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest

from innkeeper.control import vm_executions
from innkeeper.core.host_verbs import Execute, SignalExecution
from innkeeper.errors import InvalidRequestError

pytestmark = pytest.mark.anyio


def executed(api: Any) -> list[Execute]:
    return [request for request in api.world.host.asked if isinstance(request, Execute)]


async def session(api: Any) -> str:
    made: str = (await api.client.post("/v1/sessions/session", json={})).json()["session_id"]
    return made


def form(name: str, content: str) -> bytes:
    return struct.pack("!HIB", len(name), len(content), 1) + name.encode() + content.encode()


async def test_code_runs_in_the_sessions_interpreter(api: Any) -> None:
    host, of = api.world.host, await session(api)
    host.output, host.errors = [b"o\xc3", b"\xa4\n"], b"e\n"
    host.shown = struct.pack("!BB", 2, 1) + form("text/plain", "21")
    host.result = {"kernel": {"fresh": True, "lost": False}}
    answer = (await api.client.post("/execute", json={"code": "20 + 1", "session_id": of})).json()
    assert (answer["stdout"], answer["stderr"], answer["output"], answer["exit_code"]) == ("oä\n", "e\n", "oä\n", 0)
    assert (answer["execution_time"], answer["cpu_time"], answer["session_id"]) == (0.0015, 0.0005, of)
    assert answer["results"] == [{"kind": "result", "data": {"text/plain": "21"}, "omitted": {}}]
    assert answer["kernel"] == {"fresh": True, "lost": False}
    assert answer["files_changed"][0]["path"] == "/tmp/a"
    assert answer["created_at"].startswith("2023-11-14T22:13:20")
    (asked,) = executed(api)
    assert (asked.command, asked.kernel, asked.merge, asked.timeout_seconds) == ("20 + 1", "session", False, 59)


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("bash", {"command": "code", "kernel": None, "argv": ()}),
        ("sh", {"command": "code", "kernel": None, "argv": ()}),
        ("javascript", {"command": "", "kernel": None, "argv": ("node", "-e", "code")}),
    ],
)
async def test_other_languages_begin_anew(api: Any, language: str, expected: dict[str, Any]) -> None:
    answer = await api.client.post("/execute", json={"command": "code", "language": language, "timeout": 5})
    assert answer.status_code == 200, answer.text
    (asked,) = executed(api)
    assert {name: getattr(asked, name) for name in expected} == expected
    assert asked.timeout_seconds == 4.5


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"command": "a", "code": "b"},
        {"command": ""},
        {"command": "a\0"},
        {"command": "a", "language": "cobol"},
        {"command": "a", "timeout": 0},
        {"command": "a", "timeout": 601},
        {"command": "a", "vault_ids": ["v"]},
        {"command": "a", "session_id": str(uuid4()), "vm_id": "vm_x"},
        {"command": "x" * 200_000},
    ],
)
async def test_code_that_is_refused_makes_no_vm(api: Any, body: dict[str, Any]) -> None:
    before = len(api.world.host.asked)
    for path in ("/execute", "/execute_async"):
        answer = await api.client.post(path, json=body)
        assert answer.status_code == 422, (path, answer.text)
        assert answer.json()["detail"][0]["loc"][0] == "body"
    assert len(api.world.host.asked) == before


@pytest.mark.parametrize("language", ["python", "bash", "node"])
@pytest.mark.parametrize("name", ["code", "command"])
async def test_what_is_too_long_has_the_name_that_the_client_gave_it(api: Any, name: str, language: str) -> None:
    for path in ("/execute", "/execute_async"):
        answer = await api.client.post(path, json={name: "x" * 200_000, "language": language})
        assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["body", name]), answer.text


async def test_a_language_that_the_image_lacks_is_named(api: Any) -> None:
    api.world.host.execute_error = InvalidRequestError("node: command not found")
    answer = await api.client.post("/execute", json={"command": "1", "language": "node"})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "language"]
    assert "node" in answer.json()["detail"][0]["msg"]


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ("nope: command not found", "argv"),
        ("/nope: no such file or directory", "argv"),
        ('there is no user "x" in the guest', "user"),
        ("the working directory /nope: no such file or directory", "cwd"),
    ],
)
async def test_what_the_guest_refuses_names_the_field(api: Any, said: str, field: str) -> None:
    vm = (await api.client.post("/v1/vms", json={})).json()["vm_id"]
    api.world.host.execute_error = InvalidRequestError(said)
    answer = await api.client.post(f"/v1/vms/{vm}/exec", json={"argv": ["nope"]})
    assert answer.status_code == 422
    assert answer.json()["detail"] == [{"loc": ["body", field], "msg": said, "type": "value_error"}]


async def test_a_task_is_found_by_its_id(api: Any) -> None:
    host, of = api.world.host, await session(api)
    begun = (await api.client.post("/execute_async", json={"command": "1", "session_id": of})).json()
    assert (begun["status"], begun["session_id"]) == ("running", of)
    (asked,) = executed(api)
    assert (asked.detach, asked.timeout_seconds) == (True, 60)
    host.errors, host.record = b"err", {"timed_out": True, "exit_code": 124}
    found = (await api.client.get(f"/v1/executions/{begun['task_id']}")).json()
    assert (found["is_complete"], found["status"], found["language"]) == (True, "completed", "python")
    assert (found["serialized_stdout"], found["serialized_stderr"]) == ("hello\n", "err")
    assert (found["exit_code"], found["timed_out"], found["execution_time"]) == (124, True, 0.0015)
    host.record = {"ended": False, "exit_code": None, "duration_ms": None, "cpu_ms": None}
    found = (await api.client.get(f"/v1/executions/{begun['task_id']}")).json()
    assert (found["is_complete"], found["status"], found["exit_code"]) == (False, "running", None)
    host.record = {"exit_code": None, "lost": "The guest was started again", "duration_ms": None}
    found = (await api.client.get(f"/v1/executions/{begun['task_id']}")).json()
    assert (found["is_complete"], found["status"], found["error"]) == (True, "lost", "The guest was started again")
    await api.client.delete(f"/v1/vms/{begun['vm_id']}")
    gone = await api.client.get(f"/v1/executions/{begun['task_id']}")
    assert (gone.status_code, gone.json()["code"]) == (404, "execution_not_found")


async def events(api: Any, execution_id: str, **headers: str) -> list[tuple[str | None, str, str]]:
    """(id, stream, text) of each piece of output."""
    answer = await api.client.get(f"/v1/executions/{execution_id}/stream", headers=headers)
    found = []
    for frame in answer.text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in frame.splitlines() if not line.startswith(":"))
        if lines.get("event") == "output":
            body = json.loads(lines["data"])
            found.append((lines.get("id"), body["stream"], body["data"]))
    return found


async def test_who_comes_back_within_a_character_misses_and_repeats_nothing(
    api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = (await api.client.post("/execute_async", json={"command": "1", "session_id": await session(api)})).json()
    follow = vm_executions.follow
    pieces = [(0, 1, b"a\xe2\x82"), (3, 1, b"\xacb"), (5, 1, b"c\xc3"), (7, 2, b"d")]

    async def in_pieces(*args: Any, **options: Any) -> AsyncIterator[Any]:
        for piece in pieces:
            yield piece
        async for item in follow(*args, **options):
            if isinstance(item, vm_executions.ExecutionState):
                yield item

    monkeypatch.setattr(vm_executions, "follow", in_pieces)
    found = await events(api, begun["task_id"])
    assert found == [
        ("1", "stdout", "a"),
        ("5", "stdout", "\u20acb"),
        ("6", "stdout", "c"),
        # Nobody could go on after this one without the half of a character before it.
        (None, "stderr", "d"),
        ("8", "stdout", "\ufffd"),
    ]


async def test_programs_in_a_vm(api: Any) -> None:
    vm = (await api.client.post("/v1/vms", json={})).json()["vm_id"]
    body = {"argv": ["cat", "-"], "user": "nobody", "cwd": "/", "env": {"A": "b"}, "stdin": "typed", "merge": True}
    answer = (await api.client.post(f"/v1/vms/{vm}/exec", json=body)).json()
    assert (answer["stdout"], answer["vm_id"]) == ("typedhello\n", vm)
    (asked,) = executed(api)
    assert (asked.argv, asked.user, asked.cwd, asked.env, asked.merge) == (
        ("cat", "-"),
        "nobody",
        "/",
        {"A": "b"},
        True,
    )
    begun = await api.client.post(f"/v1/vms/{vm}/exec", json={"command": "sleep 5", "background": True})
    assert (begun.status_code, begun.json()["status"]) == (202, "running")
    sent = await api.client.post(f"/v1/executions/{begun.json()['task_id']}/signal", json={"signal": "TERM"})
    assert sent.json() == {"status": "ok"}
    assert [one.signal for one in api.world.host.asked if isinstance(one, SignalExecution)] == [15]
    listed = (await api.client.get(f"/v1/vms/{vm}/executions")).json()
    assert [row["execution_id"] for row in listed] == [begun.json()["task_id"], answer["execution_id"]]
    first = (await api.client.get(f"/v1/vms/{vm}/executions", params={"limit": 1})).json()
    then = (await api.client.get(f"/v1/vms/{vm}/executions", params={"before": first[0]["execution_id"]})).json()
    assert first + then == listed
    for wrong in ({"signal": 0}, {"signal": "NOSUCH"}, {"signal": 65}, {}):
        refused = await api.client.post(f"/v1/executions/{begun.json()['task_id']}/signal", json=wrong)
        assert refused.status_code == 422, wrong
    for wrong in ({}, {"argv": []}, {"argv": ["a"], "command": "b"}, {"argv": ["a\0"]}, {"argv": ["a"], "user": "a b"}):
        assert (await api.client.post(f"/v1/vms/{vm}/exec", json=wrong)).status_code == 422, wrong


async def test_a_stream_goes_on_where_it_was(api: Any) -> None:
    host, of = api.world.host, await session(api)
    host.output, host.errors = [b"\xc3", b"\xa4b"], b"e"
    begun = (await api.client.post("/execute_async", json={"command": "1", "session_id": of})).json()
    path = f"/v1/executions/{begun['task_id']}/stream"

    def events(text: str) -> list[tuple[str, str, dict[str, Any]]]:
        found = []
        for block in filter(None, text.split("\n\n")):
            fields = dict(line.split(": ", 1) for line in block.splitlines())
            found.append((fields.get("id", ""), fields["event"], json.loads(fields["data"])))
        return found

    whole = events((await api.client.get(path)).text)
    assert whole[:2] == [
        ("3", "output", {"stream": "stdout", "data": "äb"}),
        ("4", "output", {"stream": "stderr", "data": "e"}),
    ]
    assert (whole[2][1], whole[2][2]["exit_code"], whole[2][2]["is_complete"]) == ("result", 0, True)
    rest = events((await api.client.get(path, headers={"Last-Event-ID": "3"})).text)
    assert rest == whole[1:]
    assert (await api.client.get(path, headers={"Last-Event-ID": "x"})).status_code == 422
