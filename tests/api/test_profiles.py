from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.anyio


async def test_profiles_from_making_to_removing(api: Any) -> None:
    listed = (await api.client.get("/api/profiles")).json()
    assert [profile["name"] for profile in listed] == ["base", "python-data-science", "node"]
    made = await api.client.post("/api/profiles", json={"name": "mine", "image": "base", "env": {"KEY": "hunter2"}})
    assert made.status_code == 201
    assert "hunter2" not in made.text
    profile = made.json()
    assert (profile["env"], profile["memory_mb"], profile["egress_policy"]) == (["KEY"], 1024, {"mode": "internet"})
    path = f"/api/profile/{profile['id']}"
    assert (await api.client.get(path)).json() == profile
    changed = await api.client.patch(
        path, json={"memory_mb": 2048, "idle_seconds": None, "env": {"KEY": None, "B": ""}}
    )
    assert changed.json() == {**profile, "memory_mb": 2048, "idle_seconds": None, "env": ["B"]}
    await api.client.post(f"{path}/room/r")
    rooms = (await api.client.get(f"{path}/rooms")).json()
    assert [(room["room_id"], room["status"]) for room in rooms] == [("r", "ready")]
    used = await api.client.delete(path)
    assert (used.status_code, used.json()["error"]) == (409, "conflict")
    await api.client.delete(f"{path}/room/r")
    assert (await api.client.delete(path)).status_code == 204
    gone = await api.client.get(path)
    assert (gone.status_code, gone.json()["error"]) == (404, "profile_not_found")


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "name"),
        ({"name": "x"}, "image"),
        ({"name": "x", "image": "base", "surely": 1}, "surely"),
        ({"name": "x", "image": "base", "memory_mb": "1024"}, "memory_mb"),
        ({"name": "x", "image": "base", "memory_mb": 1}, "memory_mb"),
        ({"name": "x", "image": "base", "memory_mb": None}, "memory_mb"),
        ({"name": "X Y", "image": "base"}, "name"),
        ({"name": "x", "image": "nope"}, "image"),
        ({"name": "x", "image": "base", "egress_policy": {"mode": "allow", "hosts": []}}, "egress_policy"),
        ({"name": "x", "image": "base", "env": {"A": 1}}, "env"),
    ],
)
async def test_a_bad_profile_names_the_field(api: Any, body: dict[str, Any], word: str) -> None:
    answer = await api.client.post("/api/profiles", json=body)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
    assert word in answer.json()["message"]


async def test_a_name_is_taken_once(api: Any) -> None:
    answer = await api.client.post("/api/profiles", json={"name": "base", "image": "base"})
    assert (answer.status_code, answer.json()["error"]) == (409, "conflict")


async def test_an_isolation_that_cannot_be_had_is_refused_with_what_is_offered(api: Any) -> None:
    offered = "offered: gvisor (gvisor, on systrap)"
    never = {"driver": "gvisor", "min_isolation": "microvm"}
    for fields, status, code, text in (
        ({"driver": "qemu"}, 503, "service_unavailable", f"driver: no host offers 'qemu' now; {offered}"),
        ({"min_isolation": "microvm"}, 503, "service_unavailable", f"min_isolation: no host offers 'microvm' now; {offered}"),
        (never, 400, "invalid_request", "min_isolation: 'microvm' is more than the driver 'gvisor' gives, which is 'gvisor'"),
    ):  # fmt: skip
        before = (await api.client.get("/api/profiles")).json()
        for method, path, body in (
            ("POST", "/api/profiles", {"name": "x", "image": "base", **fields}),
            ("PATCH", f"/api/profile/{api.profile_id}", fields),
        ):
            answer = await api.client.request(method, path, json=body)
            assert (answer.status_code, answer.json()) == (status, {"error": code, "message": text})
            assert ("retry-after" in answer.headers) == (status == 503)
        assert (await api.client.get("/api/profiles")).json() == before


async def test_a_room_whose_isolation_is_gone_is_refused_in_shape(api: Any) -> None:
    made = await api.client.patch(f"/api/profile/{api.profile_id}", json={"driver": "gvisor", "min_isolation": "none"})
    assert (made.json()["driver"], made.json()["min_isolation"]) == ("gvisor", "none")
    api.world.control.settings = api.world.settings.model_copy(update={"min_isolation": "microvm"})
    answer = await api.client.post(api.room)
    assert (answer.status_code, answer.json()["error"], answer.headers["retry-after"]) == (
        503,
        "service_unavailable",
        "30",
    )
    assert answer.json()["message"].startswith(
        "min_isolation: no host offers 'microvm', which is this server's minimum, now"
    )
    # What has nothing to do with it can still be changed.
    assert (await api.client.patch(f"/api/profile/{api.profile_id}", json={"memory_mb": 256})).status_code == 200
