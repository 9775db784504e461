from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest

from innkeeper.errors import InnkeeperError, InstanceFailedError, NoHostError

pytestmark = pytest.mark.anyio


async def test_a_room_has_all_fields_of_the_documented_answer(api: Any) -> None:
    answer = await api.client.post(f"{api.profile}/room/ai-session-123", json={})
    assert answer.status_code == 200
    body = answer.json()
    assert list(body) == ["instance_id", "profile_id", "room_id", "status", "host", "profile"]
    assert (body["room_id"], body["status"]) == ("ai-session-123", "ready")
    assert body["profile"] == {"id": str(api.profile_id), "name": "base"}
    assert body["host"] == {"id": str(api.world.host.id), "name": "scripted"}
    again = await api.client.post(f"{api.profile}/room/ai-session-123")
    assert again.json() == body


async def test_fifty_first_requests_get_one_instance(api: Any) -> None:
    answers = await asyncio.gather(*(api.client.post(api.room) for _ in range(50)))
    assert {a.status_code for a in answers} == {200}
    assert len({a.json()["instance_id"] for a in answers}) == 1


@pytest.mark.parametrize("content", [b"", b"  ", b"{}", b'{"host_id": null}'])
async def test_the_body_may_say_nothing(api: Any, content: bytes) -> None:
    headers = {"Content-Type": "application/json"} if content else {}
    assert (await api.client.post(api.room, content=content, headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("encoded", "room_id"),
    [
        ("a%2Fb", "a/b"),
        ("a%2Fcommand", "a/command"),
        ("%E2%98%83%20%F0%9F%92%A9", "☃ 💩"),
        ("a+b", "a+b"),
        ("%3Fx%23", "?x#"),
        ("%25", "%"),
        ("..%2F..%2Fetc", "../../etc"),
    ],
)
async def test_room_ids_are_any_text(api: Any, encoded: str, room_id: str) -> None:
    assert (await api.make_room(encoded))["room_id"] == room_id
    listed = (await api.client.get(f"{api.profile}/rooms")).json()
    assert [room["room_id"] for room in listed] == [room_id]


async def test_hosts_can_be_asked_for(api: Any) -> None:
    unknown = await api.client.post(api.room, json={"host_id": str(uuid4())})
    assert (unknown.status_code, unknown.json()) == (
        503,
        {"error": "service_unavailable", "message": "No available hosts for instance provisioning"},
    )
    assert int(unknown.headers["retry-after"]) >= 1
    assert (await api.client.post(api.room, json={"host_id": str(api.world.host.id)})).status_code == 200
    other = await api.client.post(api.room, json={"host_id": str(uuid4())})
    assert (other.status_code, other.json()["error"]) == (409, "host_mismatch")


@pytest.mark.parametrize(
    ("error", "code"), [(NoHostError(), "service_unavailable"), (InstanceFailedError("no disk"), "instance_failed")]
)
async def test_a_host_that_refuses(api: Any, error: InnkeeperError, code: str) -> None:
    api.world.host.ensure_error = error
    answer = await api.client.post(api.room)
    assert (answer.status_code, answer.json()["error"]) == (503, code)
    assert "retry-after" in answer.headers
    api.world.host.ensure_error = None
    assert (await api.client.post(api.room)).json()["status"] == "ready"


async def test_the_wait_has_a_limit_and_names_the_status(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = api.world.control.settings.model_copy(update={"room_wait_seconds": 0.05})
    monkeypatch.setattr(api.world.control, "settings", settings)
    api.world.host.hold.clear()
    answer = await api.client.post(api.room)
    api.world.host.hold.set()
    assert answer.status_code == 503
    assert answer.json() == {
        "error": "instance_not_ready",
        "message": "Instance is still provisioning, current status: image_generated",
    }
    assert (await api.client.post(api.room)).status_code == 200


async def test_destroy(api: Any) -> None:
    made = await api.make_room()
    gone = await api.client.delete(api.room)
    assert (gone.status_code, gone.content) == (204, b"")
    again = await api.client.delete(api.room)
    assert (again.status_code, again.json()["error"]) == (404, "instance_not_found")
    assert (await api.make_room())["instance_id"] != made["instance_id"]


async def test_tools_are_function_schemas(api: Any) -> None:
    missing = await api.client.get(f"{api.room}/tools")
    assert (missing.status_code, missing.json()["error"]) == (404, "instance_not_found")
    made = await api.make_room()
    body = (await api.client.get(f"{api.room}/tools")).json()
    assert list(body) == ["profile_id", "room_id", "instance_id", "instance_status", "tools"]
    assert body["instance_id"] == made["instance_id"]
    assert [tool["name"] for tool in body["tools"]] == ["execute", "read_file", "write_file"]
    assert all(set(tool) == {"name", "description", "parameters"} for tool in body["tools"])
    assert "python 3.11" in body["tools"][0]["description"]


async def test_another_organization_sees_nothing(api: Any) -> None:
    from innkeeper.control import organizations, tokens

    await api.make_room()
    await organizations.create(api.world.control, api.world.operator, "other")
    operator = await organizations.operator_of(api.world.control, api.world.operator, "other")
    token = (await tokens.create(api.world.control, operator, "t")).text
    headers = {"Authorization": f"Bearer {token}"}
    answer = await api.client.post(api.room, headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (404, "profile_not_found")
    assert (await api.client.get("/v1/rooms", headers=headers)).json() == []
