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
