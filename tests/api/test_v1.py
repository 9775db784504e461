from __future__ import annotations

from typing import Any
from uuid import uuid4

import httpx2
import pytest

from innkeeper import __version__
from innkeeper.api.server import UnixSocketOperator

pytestmark = pytest.mark.anyio


def operator(api: Any) -> httpx2.AsyncClient:
    """A client on the operator's socket."""
    transport = httpx2.ASGITransport(app=UnixSocketOperator(api.app), client=("", 0))
    return httpx2.AsyncClient(transport=transport, base_url="http://inn")


async def test_tokens(api: Any) -> None:
    made = (await api.client.post("/v1/tokens", json={"name": "ci", "dialect": "instavm"})).json()
    assert made["token"].startswith("instavm_sk_")
    assert made["prefix"] == made["token"][:16]
    async with api.anonymous() as client:
        for headers in ({"Authorization": f"Bearer {made['token']}"}, {"X-API-Key": made["token"]}):
            listed = await client.get("/v1/tokens", headers=headers)
            assert [token["name"] for token in listed.json()] == ["first", "ci"]
            assert made["token"] not in listed.text
        assert (await client.get("/api/profiles", headers={"X-API-Key": made["token"]})).status_code == 401
        assert (await api.client.delete(f"/v1/tokens/{made['id']}")).status_code == 204
        assert (await api.client.delete(f"/v1/tokens/{made['id']}")).status_code == 204
        assert (await client.get("/v1/tokens", headers=headers)).status_code == 401


async def test_nobody_gives_a_scope_they_lack(api: Any) -> None:
    answer = await api.client.post("/v1/tokens", json={"name": "x", "scopes": ["admin"]})
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    narrow = (await api.client.post("/v1/tokens", json={"name": "x", "scopes": ["rooms"]})).json()["token"]
    async with api.anonymous() as client:
        headers = {"Authorization": f"Bearer {narrow}"}
        assert (await client.get("/v1/rooms", headers=headers)).status_code == 200
        refused = await client.get("/v1/audit", headers=headers)
        assert (refused.status_code, set(refused.json())) == (403, {"detail", "code"})


async def test_rooms_with_their_boot_trace(api: Any) -> None:
    made = await api.make_room("a")
    await api.make_room("b")
    rows = (await api.client.get("/v1/rooms")).json()
    assert [(row["room_id"], row["profile_name"], row["status"]) for row in rows] == [
        ("a", "base", "ready"),
        ("b", "base", "ready"),
    ]
    assert rows[0]["isolation"] == {
        "level": "gvisor",
        "driver": "gvisor",
        "platform": "systrap",
        "reason": "measured",
    }
    assert rows[0]["host"]["name"] == "scripted"
    detail = (await api.client.get(f"/v1/rooms/{made['instance_id']}")).json()
    assert [step["step"] for step in detail["boot_trace"]][-1] == "ready"
    missing = await api.client.get(f"/v1/rooms/{uuid4()}")
    assert (missing.status_code, missing.json()["code"]) == (404, "instance_not_found")


async def test_images_and_hosts(api: Any) -> None:
    images = (await api.client.get("/v1/images")).json()
    assert {image["name"]: image["status"] for image in images}["base"] == "ready"
    assert (await api.client.get("/v1/hosts")).status_code == 403
    async with operator(api) as client:
        hosts = (await client.get("/v1/hosts")).json()
    assert [(host["name"], host["reachable"], host["driver"]) for host in hosts] == [("scripted", True, "gvisor")]


async def test_the_operator_needs_no_token_but_a_bad_one_is_refused(api: Any) -> None:
    async with operator(api) as client:
        assert (await client.get("/v1/tokens")).status_code == 200
        assert (await client.get("/api/profiles")).status_code == 200
        assert (await client.get("/v1/tokens", headers={"Authorization": "Bearer nope"})).status_code == 401
        assert (await client.get("/metrics")).status_code == 200


async def test_the_audit_log_in_pages(api: Any) -> None:
    for name in "ab":
        await api.client.post("/v1/tokens", json={"name": name})
    first = (await api.client.get("/v1/audit", params={"limit": 1})).json()
    assert (first["events"][0]["action"], first["events"][0]["details"]["name"]) == ("token.create", "b")
    second = (await api.client.get("/v1/audit", params={"limit": 1, "cursor": first["next_cursor"]})).json()
    assert second["events"][0]["details"]["name"] == "a"
    for bad in ("limit=0", "limit=x", "limit=1001", "cursor=x"):
        answer = await api.client.get(f"/v1/audit?{bad}")
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")


async def test_health(api: Any) -> None:
    async with api.anonymous() as client:
        assert (await client.get("/healthz")).json() == {"status": "ok", "version": __version__}


async def test_metrics_are_for_this_machine_or_a_token(api: Any) -> None:
    await api.make_room("secret-room")
    async with api.anonymous() as client:
        assert (await client.get("/metrics")).status_code == 401
    async with api.anonymous(("127.0.0.1", 1)) as client:
        page = (await client.get("/metrics")).text
        assert (await client.get("/metrics", headers={"Authorization": "Bearer nope"})).status_code == 401
    assert (await api.client.get("/metrics")).status_code == 200
    line = 'method="POST",route="/api/profile/{profile_id}/room/{room_id}",status="200"} 1.0'
    assert line in page
    assert "secret-room" not in page
    assert 'innkeeper_host_leaked{host="scripted"} 0.0' in page
    assert "innkeeper_control_rooms_created_total 1.0" in page


async def test_the_log_has_no_query_token_or_body(api: Any, capsys: pytest.CaptureFixture[str]) -> None:
    await api.client.post(f"{api.room}/command?q=hunter2", json={"command": "hunter2"})
    out = capsys.readouterr().out
    assert "/command" in out
    assert "request_id" in out
    assert "hunter2" not in out
    assert api.token not in out
