"""The operator's endpoints: what they do, and that nobody else may."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from innkeeper.api.server import UnixSocketOperator
from innkeeper.core.host_verbs import CollectGarbage

pytestmark = pytest.mark.anyio


def operator(api: Any) -> httpx2.AsyncClient:
    """As over the unix socket."""
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=UnixSocketOperator(api.app)), base_url="http://inn")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/diagnosis", {"kind": "tasks"}),
        ("GET", "/v1/log-level", None),
        ("POST", "/v1/hosts/{host}/drain", {"draining": True}),
        ("GET", "/v1/hosts/{host}/capacity", None),
        ("POST", "/v1/hosts/{host}/gc", {"remove": True}),
        ("PUT", "/v1/log-level", {"level": "debug"}),
    ],
)
async def test_only_the_operator_may(api: Any, method: str, path: str, body: Any) -> None:
    path = path.format(host=api.world.host.id)
    async with api.anonymous() as client:
        assert (await client.request(method, path, json=body)).status_code == 401
    answer = await api.client.request(method, path, json=body)
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert api.world.control.log_level.name == "info"
    async with operator(api) as client:
        assert (await client.request(method, path, json=body)).status_code == 200


async def test_a_look_into_each_process(api: Any) -> None:
    async with operator(api) as client:
        own = (await client.post("/v1/diagnosis", json={"kind": "tasks"})).json()
        assert any("reconciler" in task["name"] for task in own["tasks"])
        stacks = (await client.post("/v1/diagnosis", json={"kind": "stacks", "seconds": 0.1})).json()
        assert stacks["samples"] >= 1 and any(stack.startswith("MainThread;") for stack in stacks["stacks"])
        host = {"kind": "tasks", "host_id": str(api.world.host.id)}
        assert (await client.post("/v1/diagnosis", json=host)).json()["tasks"][0]["name"] == "tasks"
        for bad in ({"kind": "heap"}, {"kind": "stacks", "seconds": 61}, {"kind": "tasks", "x": 1}, {}):
            answer = await client.post("/v1/diagnosis", json=bad)
            assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request"), bad
        made = await api.make_room()
        (entry,) = api.world.control.live
        guest = {"kind": "guest", "instance_id": made["instance_id"]}
        assert (await client.post("/v1/diagnosis", json=guest)).json()["text"].endswith(str(entry.instance.id))
        absent = {**guest, "instance_id": "00000000-0000-4000-8000-000000000000"}
        assert (await client.post("/v1/diagnosis", json=absent)).status_code == 404
        assert (await client.post("/v1/diagnosis", json={"kind": "guest"})).status_code == 400
        nowhere = {"kind": "tasks", "host_id": "00000000-0000-4000-8000-000000000000"}
        assert (await client.post("/v1/diagnosis", json=nowhere)).status_code == 503


async def test_the_log_level_of_both_processes(api: Any) -> None:
    async with operator(api) as client:
        before = (await client.get("/v1/log-level")).json()
        assert [(one["process"], one["level"]) for one in before] == [("api", "info"), ("host", "info")]
        after = (await client.put("/v1/log-level", json={"level": "debug"})).json()
        assert [one["level"] for one in after] == ["debug", "debug"]
        assert (api.world.control.log_level.name, api.world.host.log_level) == ("debug", "debug")
        assert (await client.put("/v1/log-level", json={"level": "loud"})).status_code == 400
        assert (await client.get("/v1/log-level")).json() == after


async def test_a_drained_host_refuses_in_each_dialect_and_says_so(api: Any) -> None:
    await api.make_room("old")
    drain = f"/v1/hosts/{api.world.host.id}/drain"
    async with operator(api) as client:
        row = (await client.post(drain, json={"draining": True, "deadline_seconds": 600})).json()
        assert (row["draining"], row["reachable"], row["rooms"], row["open_calls"]) == (True, True, 1, 0)
        assert row["drain_deadline"] is not None
        assert (await client.get("/v1/hosts")).json() == [row]
        assert (await client.get("/healthz")).json()["status"] == "draining"
        refused = await api.client.post(f"{api.profile}/room/new")
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "30")
        assert refused.json() == {
            "error": "service_unavailable",
            "message": "The host is being drained and takes nothing new",
        }
        assert (await api.client.post(f"{api.profile}/room/old/command", json={"command": "true"})).status_code == 200
        await client.post(drain, json={"draining": True, "deadline_seconds": 0})
        for method, path, body in (
            ("POST", "/command", {"command": "true"}),
            ("PUT", "/file/tmp/x", None),
            ("GET", "/file/tmp/x", None),
        ):
            late = await api.client.request(method, f"{api.profile}/room/old{path}", json=body)
            assert (late.status_code, late.headers["Retry-After"]) == (503, "30"), path
            assert late.json()["error"] == "service_unavailable"
        for bad in ({}, {"draining": 1}, {"draining": True, "deadline_seconds": -1}, {"draining": True, "x": 1}):
            assert (await client.post(drain, json=bad)).status_code == 400, bad
        nobody = "/v1/hosts/00000000-0000-4000-8000-000000000000/drain"
        assert (await client.post(nobody, json={"draining": True})).status_code == 404
        row = (await client.post(drain, json={"draining": False, "deadline_seconds": 5})).json()
        assert (row["draining"], row["drain_deadline"]) == (False, None)
        assert (await client.get("/healthz")).json()["status"] == "ok"
    await api.make_room("new")


async def test_one_page_has_the_metrics_of_both_processes(api: Any) -> None:
    await api.make_room()
    vm = (await api.client.post("/v1/vms", json={"share": {"port": 80, "is_public": True}})).json()["vm_id"]
    assert (await api.client.post("/execute", json={"vm_id": vm, "code": "1"})).status_code == 200
    assert (await api.client.post(f"/v1/vms/{vm}/pty/sessions", json={})).status_code == 201
    # What is written behind is one write, which may be under way.
    await api.world.control.later.flush(api.world.control)
    page = (await api.client.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(page)}
    rows = families["innkeeper_process_threads"].samples
    assert {tuple(sorted(row.labels.items())) for row in rows} == {
        (("process", "api"),),
        (("host", "scripted"), ("process", "host")),
    }
    instances = {tuple(row.labels.values()): row.value for row in families["innkeeper_instances"].samples}
    assert (instances["room", "ready"], instances["room", "failed"], instances["vm", "ready"]) == (1, 0, 1)
    shares = {row.labels["kind"]: row.value for row in families["innkeeper_shares"].samples}
    assert shares == {"public": 1, "private": 0}
    for name in ("cells", "terminals", "executions"):
        assert families[f"innkeeper_control_{name}"].samples[0].value == 1, name
    assert families["innkeeper_database_writes"].samples[0].value > 0
    assert families["innkeeper_database_writes_waiting"].samples[0].value == 0
    assert families["innkeeper_bus_calls_in_flight"].samples[0].value >= 1
    (reachable,) = families["innkeeper_host_reachable"].samples
    assert (reachable.labels, reachable.value) == ({"host": "scripted"}, 1.0)
    assert all(family.documentation for family in families.values())
    # Each family once: a second TYPE line of one name is no valid page.
    types = [line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")]
    assert len(types) == len(set(types))


async def test_metrics_without_a_host_that_answers(api: Any) -> None:
    del api.world.control.bus._links[api.world.host.id]
    page = (await api.client.get("/metrics")).text
    assert 'innkeeper_host_reachable{host="scripted"} 0.0' in page
    assert "innkeeper_start_seconds" not in page


async def test_the_capacity_report_says_what_each_profile_would_get_and_why_not_more(api: Any) -> None:
    await api.make_room()
    path = f"/v1/hosts/{api.world.host.id}/capacity"
    async with operator(api) as client:

        async def bounds() -> dict[str, tuple[int, str]]:
            report = (await client.get(path)).json()
            return {one["profile_name"]: (one["more"], one["bound_by"]) for one in report["profiles"]}

        report = (await client.get(path)).json()
        assert (report["memory_limit_mb"], report["instances"], report["draining"]) == (8_000, {"ready": 1}, False)
        memory_mb = next(one["memory_mb"] for one in report["profiles"] if one["profile_name"] == "base")
        # Warm guests make way: 8000 - (5000 - 1000) are left.
        assert (await bounds())["base"] == (4_000 // memory_mb, "memory")
        await client.patch("/v1/organizations/default", json={"max_instances": 3})
        assert (await bounds())["base"] == (2, "organization")
        await client.patch("/v1/organizations/default", json={"max_instances": None, "max_memory_mb": 2 * memory_mb})
        assert (await bounds())["base"] == (1, "organization")
        await client.patch("/v1/organizations/default", json={"max_memory_mb": None})
        api.world.host.capacity |= {"slots_used": 1_021}
        assert (await bounds())["base"] == (1, "slots")
        api.world.host.capacity |= {"disk_free_mb": 2_047}
        assert (await bounds())["base"] == (0, "disk")
        await client.post(path.replace("capacity", "drain"), json={"draining": True})
        assert (await bounds())["base"] == (0, "draining")
        assert (await client.get(path.replace(str(api.world.host.id), "x"))).status_code == 400


async def test_garbage_is_listed_and_only_removed_when_asked(api: Any) -> None:
    path = f"/v1/hosts/{api.world.host.id}/gc"
    async with operator(api) as client:
        listed = (await client.post(path, json={})).json()
        item = {"kind": "disk", "name": "d", "size_bytes": 4096}
        assert listed == {"removed": False, "items": [item], "total_bytes": 4096}
        assert (await client.post(path, json={"remove": True})).json()["removed"]
        asked = [one.remove for one in api.world.host.asked if isinstance(one, CollectGarbage)]
        assert asked == [False, True]
        assert (await client.post(path, json={"remove": "yes"})).status_code == 400
        events = (await client.get("/v1/audit")).json()["events"]
        assert [event["action"] for event in events].count("host.gc") == 1
        nobody = "/v1/hosts/00000000-0000-4000-8000-000000000000/gc"
        assert (await client.post(nobody, json={})).status_code == 404
