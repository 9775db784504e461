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


async def test_the_operator_makes_organizations_and_limits_them(api: Any) -> None:
    async with operator(api) as client:
        made = await client.post("/v1/organizations", json={"name": "acme", "max_instances": 1})
        assert made.status_code == 201
        acme = made.json()
        assert (acme["name"], acme["max_instances"], acme["max_memory_mb"]) == ("acme", 1, None)
        taken = await client.post("/v1/organizations", json={"name": "acme"})
        assert (taken.status_code, taken.json()["code"]) == (409, "conflict")
        assert [row["name"] for row in (await client.get("/v1/organizations")).json()] == ["default", "acme"]

        async def limit(**limits: int | None) -> tuple[int | None, int | None]:
            answer = await client.patch("/v1/organizations/acme", json=limits)
            assert answer.status_code == 200, answer.text
            listed = (await client.get("/v1/organizations")).json()[1]
            assert listed == answer.json()
            return listed["max_instances"], listed["max_memory_mb"]

        assert await limit(max_memory_mb=4096) == (1, 4096)
        assert await limit() == (1, 4096)
        assert await limit(max_instances=None) == (None, 4096)
        assert await limit(max_instances=0, max_memory_mb=None) == (0, None)
        missing = await client.patch("/v1/organizations/nobody", json={"max_instances": 1})
        assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
        events = (await client.get("/v1/audit")).json()["events"]
        assert (events[0]["action"], events[0]["object_id"]) == ("organization.limits", acme["id"])
        assert events[0]["details"] == {"max_instances": "0", "max_memory_mb": "None"}


@pytest.mark.parametrize(
    "body",
    [
        {"name": ""},
        {"name": "Upper"},
        {"name": "-a"},
        {"name": "a" * 64},
        {"name": "a", "max_instances": -1},
        {"name": "a", "max_memory_mb": 2**31},
        {"name": "a", "max_instances": "1"},
        {"name": "a", "max_instances": True},
        {"name": "a", "max_disk_mb": 1},
    ],
)
async def test_wrong_organizations_and_limits(api: Any, body: dict[str, Any]) -> None:
    async with operator(api) as client:
        refused = [await client.post("/v1/organizations", json=body)]
        if body.pop("name") == "a":
            refused.append(await client.patch("/v1/organizations/default", json=body))
        for answer in refused:
            assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")
        (default,) = (await client.get("/v1/organizations")).json()
        assert (default["max_instances"], default["max_memory_mb"]) == (None, None)


async def test_only_the_operator_may_see_or_change_organizations(api: Any) -> None:
    for method, path, body in (
        ("GET", "/v1/organizations", None),
        ("POST", "/v1/organizations", {"name": "mine"}),
        ("PATCH", "/v1/organizations/default", {"max_instances": None}),
        ("PATCH", "/v1/organizations/nobody", {"max_instances": None}),
        ("POST", "/v1/tokens", {"name": "x", "organization": "default"}),
        ("POST", "/v1/tokens", {"name": "x", "organization": "nobody"}),
    ):
        answer = await api.client.request(method, path, json=body)
        assert (answer.status_code, answer.json()["code"], set(answer.json())) == (403, "forbidden", {"detail", "code"})
    assert len((await api.client.get("/v1/tokens")).json()) == 1
    async with operator(api) as client:
        admin = (await client.post("/v1/tokens", json={"name": "admin", "scopes": ["admin"]})).json()["token"]
    async with api.anonymous() as client:
        headers = {"Authorization": f"Bearer {admin}"}
        assert (await client.post("/v1/organizations", json={"name": "mine"}, headers=headers)).status_code == 201


async def test_the_operator_makes_another_organizations_token(api: Any) -> None:
    async with operator(api) as client:
        await client.post("/v1/organizations", json={"name": "acme", "max_instances": 1})
        made = (await client.post("/v1/tokens", json={"name": "theirs", "organization": "acme"})).json()
        own = await client.post("/v1/tokens", json={"name": "own", "organization": None})
        assert own.status_code == 201
        missing = await client.post("/v1/tokens", json={"name": "x", "organization": "nobody"})
        assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
        assert [row["name"] for row in (await client.get("/v1/tokens")).json()] == ["first", "own"]
    assert made["scopes"] == ["audit", "profiles", "rooms", "tokens"]
    async with api.anonymous() as client:
        client.headers["Authorization"] = f"Bearer {made['token']}"
        assert [row["name"] for row in (await client.get("/v1/tokens")).json()] == ["theirs"]
        (event,) = (await client.get("/v1/audit")).json()["events"]
        assert (event["action"], event["actor"]) == ("token.create", "operator")
        profiles = (await client.get("/api/profiles")).json()
        assert {row["name"] for row in profiles} == {"base", "python-data-science", "node"}
        assert str(api.profile_id) not in {row["id"] for row in profiles}
        room = f"/api/profile/{profiles[0]['id']}/room"
        assert (await client.post(f"{room}/one")).status_code == 200
        assert (await client.post(f"{room}/two")).status_code == 429
        async with operator(api) as control:
            await control.patch("/v1/organizations/acme", json={"max_instances": 2})
        assert (await client.post(f"{room}/two")).status_code == 200


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
        "accelerator": None,
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
    assert hosts[0]["isolation_level"] == "gvisor"
    assert [(one["driver"], one["isolation"]["level"], one["capabilities"]) for one in hosts[0]["drivers"]] == [
        ("gvisor", "gvisor", ["freeze", "host_sees_changes"])
    ]


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
    assert "innkeeper_control_instances_created_total 1.0" in page


async def test_the_log_has_no_query_token_or_body(api: Any, capsys: pytest.CaptureFixture[str]) -> None:
    await api.client.post(f"{api.room}/command?q=hunter2", json={"command": "hunter2"})
    out = capsys.readouterr().out
    assert "/command" in out
    assert "request_id" in out
    assert "hunter2" not in out
    assert api.token not in out


async def test_the_log_names_request_and_instance_and_never_the_key_of_public_files(
    api: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made = await api.make_room()
    answer = await api.client.post(f"{api.room}/command", json={"command": "true"})
    entry = next(iter(api.world.control.live))
    await api.client.get("/v1/tokens")
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if answer.headers["x-request-id"] in line)
    assert str(entry.instance.id) in line
    assert "instance_id" not in lines[-1]
    assert made["instance_id"] not in "".join(lines)


async def test_a_call_carries_its_request_to_the_host(api: Any) -> None:
    answer = await api.client.post(f"{api.room}/command", json={"command": "true"})
    # Making the room and running the command.
    assert api.world.host.request_ids.count(answer.headers["x-request-id"]) == 2
