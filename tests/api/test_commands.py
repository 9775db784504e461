from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import UUID, uuid4

import pytest

from innkeeper.api import sse
from innkeeper.core.host_verbs import Execute
from innkeeper.errors import UnavailableError

pytestmark = pytest.mark.anyio


async def run(api: Any, command: str = "true", **fields: Any) -> Any:
    return await api.client.post(f"{api.room}/command", json={"command": command, **fields})


async def test_the_answer_is_the_documented_one(api: Any) -> None:
    body = (await run(api, "echo hello")).json()
    instance_id = (await api.make_room())["instance_id"]
    UUID(body["result"].pop("execution_id"))
    assert body == {
        "instance_id": instance_id,
        "command": "echo hello",
        "result": {
            "output": "hello",
            "exit_code": 0,
            "files_changed": [
                {
                    "path": "/tmp/a",
                    "status": "created",
                    "size": 1,
                    "mime_type": "text/plain",
                    "public_url": f"/vm/{instance_id}/file/tmp/a",
                }
            ],
            "output_truncated": False,
            "files_changed_total": 1,
            "files_changed_truncated": False,
        },
        "status": "success",
    }


async def test_a_failure_is_http_200(api: Any) -> None:
    api.world.host.result = {"exit_code": 137, "signal": 9}
    answer = await run(api)
    assert (answer.status_code, answer.json()["status"]) == (200, "error")
    assert answer.json()["result"]["exit_code"] == 137


async def test_names_that_are_not_utf8_and_deleted_files(api: Any) -> None:
    api.world.host.result = {
        "files_changed": [
            {"path": "b64:L3RtcC//IGE=", "status": "modified", "size": 3, "mime_type": None},
            {"path": "/tmp/ü?#", "status": "deleted", "size": 9, "mime_type": "text/plain"},
        ]
    }
    body = (await run(api)).json()
    rows = body["result"]["files_changed"]
    assert rows[0]["path"] == "/tmp/\N{REPLACEMENT CHARACTER} a"
    assert rows[0]["public_url"] == f"/vm/{body['instance_id']}/file/tmp/%FF%20a"
    assert rows[1] == {"path": "/tmp/ü?#", "status": "deleted", "size": 0, "mime_type": None, "public_url": None}


async def test_extras_reach_the_host(api: Any) -> None:
    await run(api, "cat", timeout=7, cwd="/tmp", env={"A": "é"}, stdin="in\0put")
    request = next(r for r in api.world.host.asked if isinstance(r, Execute))
    assert (request.timeout_seconds, request.cwd, request.env, request.stdin) == (7, "/tmp", {"A": "é"}, True)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"command": ""},
        {"command": "  "},
        {"command": 1},
        {"command": None},
        {"command": ["ls"]},
        {"command": "a\0b"},
        {"command": "x", "timeout": 0},
        {"command": "x", "timeout": 3601},
        {"command": "x", "timeout": "5"},
        {"command": "x", "timeout": True},
        {"command": "x", "cwd": "relative"},
        {"command": "x", "env": {"A": 1}},
        {"command": "x", "env": {"A=B": "1"}},
        {"command": "x", "stdin": 5},
        {"command": "x", "unknown": 1},
        [],
        "ls",
        None,
    ],
)
async def test_bad_requests(api: Any, body: Any) -> None:
    answer = await api.client.post(f"{api.room}/command", json=body)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request"), answer.text
    assert not [r for r in api.world.host.asked if isinstance(r, Execute)]


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"command": "\xff"}', b'{"command": "\\ud800"}', b"[" * 100_000, b'{"command": NaN}']
)
async def test_bodies_that_are_no_json(api: Any, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = await api.client.post(f"{api.room}/command", content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")


async def test_a_secret_is_not_in_the_error(api: Any) -> None:
    answer = await run(api, env={"TOKEN": "hunter2", "BAD NAME": "hunter2"}, extra="hunter2")
    assert "hunter2" not in answer.text


async def test_long_output_is_cut_between_characters(api: Any) -> None:
    api.world.host.output = [b"x" * 1_048_575, "éé".encode()]
    result = (await run(api)).json()["result"]
    assert result["output_truncated"] is True
    assert result["output"] == "x" * 1_048_575
    execution_id = result["execution_id"]
    url = f"{api.room}/command/{execution_id}/output"
    piece = (await api.client.get(url, params={"offset": 1_048_575, "limit": 5})).json()
    assert (piece["output"], piece["next_offset"]) == ("éé", 1_048_579)
    first = (await api.client.get(url, params={"offset": 1_048_572, "limit": 4})).json()
    assert (first["output"], first["next_offset"], first["total_bytes"]) == ("xxx", 1_048_575, 1_048_579)


async def test_what_was_kept_can_be_read_again(api: Any) -> None:
    execution_id = (await run(api)).json()["result"]["execution_id"]
    url = f"{api.room}/command/{execution_id}"
    assert (await api.client.get(f"{url}/output")).json() == {
        "execution_id": execution_id,
        "offset": 0,
        "output": "hello\n",
        "next_offset": 6,
        "total_bytes": 6,
        "gap": None,
        "ended": True,
        "exit_code": 0,
    }
    page = (await api.client.get(f"{url}/files_changed")).json()
    assert (page["files_changed_total"], page["next_cursor"], len(page["files_changed"])) == (1, None, 1)
    for bad in ("offset=-1", "offset=x", "limit=0", "offset=99999999999999999999", "offset=%FF"):
        assert (await api.client.get(f"{url}/output?{bad}")).status_code == 400
    for unknown in (uuid4(), "x"):
        missing = await api.client.get(f"{api.room}/command/{unknown}/output")
        assert (missing.status_code, missing.json()["error"]) == (404, "execution_not_found")


def events(text: str) -> list[tuple[str, Any]]:
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        if block.startswith(":"):
            found.append(("ping", None))
            continue
        event, data = block.split("\n")
        found.append((event.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


async def stream(api: Any) -> Any:
    return await api.client.post(f"{api.room}/command", json={"command": "x"}, headers={"Accept": "text/event-stream"})


async def test_events(api: Any) -> None:
    snowman = "☃".encode()
    api.world.host.output = [b"a\r\n" + snowman[:1], snowman[1:], b"\xff\n"]
    answer = await stream(api)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "\r" not in answer.text
    found = events(answer.text)
    # Small pieces that wait together travel together, so only the ends are certain.
    kinds = [event for event, _ in found]
    assert (kinds[0], set(kinds[1:-1]), kinds[-1]) == ("started", {"output"}, "result")
    assert "".join(data["data"] for event, data in found if event == "output") == "a\r\n☃\N{REPLACEMENT CHARACTER}\n"
    result = found[-1][1]
    assert result["result"]["execution_id"] == found[0][1]["execution_id"]
    assert result["result"]["output"] == "a\r\n☃\N{REPLACEMENT CHARACTER}"
    assert result["status"] == "success"


class Broken:
    """Output whose source fails in the middle."""

    def __iter__(self) -> Any:
        yield b"so far"
        raise UnavailableError("The guest is gone")


async def test_an_error_in_the_middle_is_an_event(api: Any) -> None:
    api.world.host.output = Broken()
    found = events((await stream(api)).text)
    assert [event for event, _ in found] == ["started", "output", "error"]
    assert found[-1][1] == {"error": "service_unavailable", "message": "The guest is gone"}


async def test_errors_before_the_stream_have_a_status(api: Any) -> None:
    answer = await api.client.post(
        f"/api/profile/{uuid4()}/room/r/command", json={"command": "x"}, headers={"Accept": "text/event-stream"}
    )
    assert (answer.status_code, answer.json()["error"]) == (404, "profile_not_found")


async def asgi_call(api: Any, accept: str, *, until: bytes) -> tuple[bytes, float]:
    """A raw ASGI request whose client disconnects once `until` was sent."""
    body = json.dumps({"command": "x"}).encode()
    sent = bytearray()
    seen = asyncio.Event()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await seen.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.extend(message.get("body", b""))
        if until in sent:
            seen.set()

    if not until:
        asyncio.get_running_loop().call_later(0.1, seen.set)
    path = f"{api.room}/command"
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "client": ("192.0.2.1", 1),
        "headers": [
            (b"authorization", f"Bearer {api.token}".encode()),
            (b"content-type", b"application/json"),
            (b"accept", accept.encode()),
        ],
    }
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with asyncio.timeout(20):
        await api.app(scope, receive, send)
    return bytes(sent), loop.time() - started


class Endless:
    """Output without end: nobody reads it, so the host waits for credit."""

    def __iter__(self) -> Any:
        while True:
            yield b"y\n" * 512


@pytest.mark.parametrize(("accept", "until"), [("text/event-stream", b"started"), ("application/json", b"")])
async def test_a_client_that_goes_away_frees_everything(api: Any, accept: str, until: bytes) -> None:
    made = await api.make_room()
    entry = api.world.control.live.by_public_id(UUID(made["instance_id"]))
    tasks = len(asyncio.all_tasks())
    api.world.host.output = Endless()
    sent, _ = await asgi_call(api, accept, until=until)
    assert until in sent
    assert b"result" not in sent
    assert entry.open_streams == 0
    await api.world.until(lambda: len(asyncio.all_tasks()) <= tasks)


async def test_silence_is_filled_with_comments(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_SECONDS", 0.05)
    await api.make_room()
    api.world.host.hold_execute = asyncio.Event()
    asyncio.get_running_loop().call_later(0.2, api.world.host.hold_execute.set)
    found = events((await stream(api)).text)
    assert [event for event, _ in found][:3] == ["started", "ping", "ping"]
    assert found[-1][0] == "result"
