"""Accounts, keys, usage and events over HTTP, in the form of InstaVM's clients."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from innkeeper.core.vm import vm_id

pytestmark = pytest.mark.anyio
SSH_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA" + "A" * 42 + " me@here"


async def test_who_a_key_stands_for(api: Any) -> None:
    answer = await api.client.get("/v1/users/me")
    assert answer.status_code == 200, answer.text
    assert set(answer.json()) == {"id", "email", "name", "is_verified"}
    assert answer.json()["name"] == "default" and "@" in answer.json()["email"]


async def test_api_keys_by_number(api: Any) -> None:
    made = await api.client.post("/v1/api-keys/", json={"description": "ci"})
    assert made.status_code == 200, made.text
    key = made.json()
    assert key["id"] == 2 and key["api_key"].startswith("instavm_sk_") and key["prefix"] == key["api_key"][:16]
    listed = await api.client.get("/v1/api-keys/", headers={"X-API-Key": key["api_key"]})
    assert [(row["id"], row["description"]) for row in listed.json()] == [(1, "first"), (2, "ci")]
    assert key["api_key"] not in listed.text
    path = f"/v1/api-keys/{key['id']}"
    assert (await api.client.patch(path, json={"description": "renamed"})).json()["description"] == "renamed"
    assert (await api.client.get(path)).json()["description"] == "renamed"
    assert (await api.client.delete(path)).json() == {"status": "deleted"}
    async with api.anonymous() as client:
        assert (await client.get("/v1/users/me", headers={"X-API-Key": key["api_key"]})).status_code == 401
    for answer in (await api.client.get(path), await api.client.delete(path), await api.client.get("/v1/api-keys/99")):
        assert answer.status_code == 404 and answer.json()["detail"] == "API key not found"
    assert (await api.client.get(f"/v1/api-keys/{10**30}")).status_code in (400, 404, 422)
    # A number never means another key.
    assert (await api.client.post("/v1/api-keys/", json={})).json()["id"] == 3
    unnamed = await api.client.post("/v1/api-keys/", json={"description": None})
    assert unnamed.json()["description"] == "API key"


async def test_a_key_gives_no_scope_that_its_maker_lacks(api: Any) -> None:
    narrow = (await api.client.post("/v1/tokens", json={"name": "x", "scopes": ["tokens"]})).json()["token"]
    async with api.anonymous() as client:
        made = await client.post("/v1/api-keys/", json={}, headers={"X-API-Key": narrow})
        refused = await client.get("/v1/rooms", headers={"X-API-Key": made.json()["api_key"]})
        assert (made.status_code, refused.status_code) == (200, 403)


async def test_ssh_keys(api: Any) -> None:
    assert (await api.client.get("/v1/ssh-keys")).json() == {"keys": []}
    key = (await api.client.post("/v1/ssh-keys", json={"public_key": SSH_KEY})).json()
    assert key["fingerprint"].startswith("SHA256:") and (key["id"], key["comment"]) == (1, "me@here")
    assert (await api.client.post("/v1/ssh-keys", json={"public_key": SSH_KEY})).json() == key
    assert (await api.client.get("/v1/ssh-keys")).json() == {"keys": [key]}
    assert (await api.client.delete("/v1/ssh-keys/1")).json() == {"status": "deleted"}
    assert (await api.client.delete("/v1/ssh-keys/1")).status_code == 404
    assert (await api.client.post("/v1/ssh-keys", json={"public_key": SSH_KEY})).json()["id"] == 2
    bad = await api.client.post("/v1/ssh-keys", json={"public_key": "ssh-rsa secret-looking"})
    assert bad.status_code in (400, 422) and "secret-looking" not in bad.text


async def test_usage_by_day(api: Any) -> None:
    await api.make_room()
    (entry,) = api.world.control.live
    used = {"machine_id": "m", "instance_id": str(entry.instance.id), "cpu_us": 7_200_000_000, "memory_mb": 2_048}
    api.world.host.running_usage = {"m": {**used, "seconds": 1_800.0}}
    body = (await api.client.get("/v1/users/me/usage-breakdown?days=7")).json()
    today = datetime.now(UTC).date()
    assert (body["total_days"], body["period_end"]) == (7, today.isoformat())
    assert body["period_start"] == (today - timedelta(days=6)).isoformat()
    assert body["totals"] == {"cost_dollars": 0.0, "cpu_hours": 2.0, "ram_gib_hours": 1.0}
    assert body["daily_breakdown"][-1] == {"date": today.isoformat(), **body["totals"]}
    assert sum(day["cpu_hours"] for day in body["daily_breakdown"]) == 2.0
    one = (await api.client.get("/v1/users/me/usage-breakdown?start_date=2026-01-01&end_date=2026-01-01")).json()
    assert (one["total_days"], one["totals"]["cpu_hours"]) == (1, 0.0)
    for query in (
        "days=0",
        "days=366",
        "start_date=x",
        "start_date=2026-01-02&end_date=2026-01-01",
        "end_date=0001-01-05",
    ):
        answer = await api.client.get(f"/v1/users/me/usage-breakdown?{query}")
        assert answer.status_code in (400, 422) and answer.json()["detail"], query


async def test_events_newest_first_by_every_filter(api: Any) -> None:
    made = await api.make_room()
    await api.client.post("/v1/ssh-keys", json={"public_key": SSH_KEY})
    (entry,) = api.world.control.live
    instance_id = vm_id(entry.instance.id, 1)

    async def told(**query: object) -> list[str]:
        answer = await api.client.get("/v1/audit/events", params=query)
        assert answer.status_code == 200, answer.text
        return [event["event_type"] for event in answer.json()["items"]]

    assert (await told())[:2] == ["ssh_key.create", "room.create"]
    assert await told(event_group="room") == await told(event_type="room.create") == ["room.create"]
    assert await told(event_group="roo") == await told(event_group="%") == await told(status="failure") == []
    assert await told(vm_id=instance_id) == ["room.create"]
    assert await told(session_id=str(uuid4())) == await told(vm_id="vm_x") == await told(vm_id=str(uuid4())) == []
    answer = (await api.client.get("/v1/audit/events", params={"limit": 1})).json()
    event = answer["items"][0]
    assert (event["status"], event["resource_type"], event["resource_id"]) == ("success", "ssh_key", "1")
    assert event["actor_type"] == "token" and await told(user_id=event["actor_id"]) == ["ssh_key.create", "room.create"]
    rest = await api.client.get("/v1/audit/events", params={"cursor": answer["next_cursor"], "limit": 1})
    assert rest.json()["items"][0]["event_type"] == "room.create"
    assert (await api.client.get(f"/v1/audit/events/{event['id']}")).json() == event
    assert (await api.client.get(f"/v1/audit/events/{uuid4()}")).status_code == 404
    for bad in ({"limit": 0}, {"limit": 201}, {"cursor": "x"}, {"status": "so so"}):
        assert (await api.client.get("/v1/audit/events", params=bad)).status_code in (400, 422), bad
    assert made["instance_id"] not in (await api.client.get("/v1/audit/events")).text


async def test_the_catalog_is_what_events_are_called(api: Any) -> None:
    catalog = (await api.client.get("/v1/audit/catalog")).json()["catalog"]
    assert "room.create" in catalog["room"] and "ssh_key.create" in catalog["ssh_key"]


@pytest.mark.parametrize(
    "path",
    ["/v1/egress/vm/vm_x", "/v1/browser/sessions/", "/v1/credits/rates", "/v1/recordings", "/v1/tapes/1/events", "/v1/sessions/x/tape/start", "/v1/vaults"],
)  # fmt: skip
async def test_what_is_not_here_says_so_to_those_who_may_ask(api: Any, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        answer = await api.client.request(method, path)
        assert (answer.status_code, answer.json()["code"]) == (501, "not_implemented")
    async with api.anonymous() as client:
        assert (await client.get(path)).status_code == 401


async def test_several_slashes_before_a_path_are_one(api: Any) -> None:
    assert (await api.client.get("http://inn//v1/users/me")).json()["name"] == "default"
    assert (await api.client.get("http://inn///v1//users/me")).status_code == 404


async def test_a_login_needs_to_know_where_it_was_asked_for(api: Any) -> None:
    pairing = {
        "state": "s" * 8,
        "code_challenge": "c" * 43,
        "redirect_uri": "http://127.0.0.1:9/callback",
    }
    async with api.anonymous() as client:
        request = client.build_request("POST", "/api/cli-auth/start", json=pairing)
        assert (await client.send(request)).json()["login_url"].startswith("http://inn/cli-login/")
        # As HTTP/1.0 may.
        request = client.build_request("POST", "/api/cli-auth/start", json=pairing)
        del request.headers["Host"]
        answer = await client.send(request)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request"), answer.text


async def test_whatever_happens_in_a_vm_is_found_by_it_and_by_its_session(api: Any) -> None:
    made = (await api.client.post("/v1/vms", json={"share": {"port": 80}})).json()
    vm, session, share = made["vm_id"], made["session_id"], f"/v1/shares/{made['share']['share_id']}"
    for method, path, body in (
        ("POST", f"/v1/vms/{vm}/pty/sessions", {"id": "t"}),
        ("DELETE", f"/v1/vms/{vm}/pty/sessions/t", None),
        ("POST", f"/v1/vms/{vm}/exec", {"command": "true"}),
        ("POST", f"/v1/vms/{vm}/files/mkdir", {"path": "/a"}),
        ("POST", f"/v1/vms/{vm}/stage-env", {"entries": [{"env_name": "A", "value": "b"}]}),
        ("POST", f"/v1/vms/{vm}/hold", {"seconds": 60}),
        ("PATCH", share, {"is_public": True}),
        ("POST", f"{share}/link", {}),
        ("DELETE", share, None),
        ("DELETE", f"/v1/vms/{vm}", None),
    ):
        answer = await api.client.request(method, path, json=body)
        assert answer.status_code < 300, (path, answer.text)
    await api.client.post("/v1/vms", json={})
    expected = {
        "vm.create", "share.create", "terminal.create", "terminal.delete", "execution.start", "file.mkdir", "vm.stage_env", "vm.hold", "share.change",
        "share.link", "share.revoke", "vm.destroy",
    }  # fmt: skip
    await api.world.control.later.flush(api.world.control)
    for query in ({"vm_id": vm}, {"session_id": session}):
        items = (await api.client.get("/v1/audit/events", params=query)).json()["items"]
        assert {event["event_type"] for event in items} == expected, query
        assert {(event["vm_id"], event["session_id"]) for event in items} == {(vm, session)}
