"""Profiles over HTTP: made, shown, changed, removed; their limits; their secrets."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest
from server_fixture import Api, Server, fresh

FIELDS = {
    "id",
    "name",
    "image",
    "vcpu_count",
    "memory_mb",
    "disk_mb",
    "env",
    "user",
    "workdir",
    "egress_policy",
    "driver",
    "min_isolation",
    "warm_pool_size",
    "idle_seconds",
    "command_timeout_seconds",
    "public_files",
}


def test_an_organization_begins_with_three(api: Api) -> None:
    listed = api.client.get("/api/profiles").json()
    assert isinstance(listed, list) and set(listed[0]) >= FIELDS
    assert {"base", "python-data-science", "node"} <= {profile["name"] for profile in listed}


def test_only_name_and_image_are_required(api: Api) -> None:
    name = fresh("small")
    made = api.client.post("/api/profiles", json={"name": name, "image": "base"})
    assert made.status_code == 201
    profile = made.json()
    assert UUID(profile["id"]) and (profile["name"], profile["image"], profile["env"]) == (name, "base", [])
    assert (profile["warm_pool_size"], profile["idle_seconds"], profile["command_timeout_seconds"]) == (2, 86_400, 120)
    assert (profile["driver"], profile["egress_policy"], profile["public_files"]) == (
        "auto",
        {"mode": "internet"},
        "reported",
    )
    assert api.client.get(f"/api/profile/{profile['id']}").json() == profile
    again = api.client.post("/api/profiles", json={"name": name, "image": "base"})
    assert (again.status_code, again.json()["error"]) == (409, "conflict")
    assert api.client.delete(f"/api/profile/{profile['id']}").status_code == 204
    assert api.client.delete(f"/api/profile/{profile['id']}").json()["error"] == "profile_not_found"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "Upper"),
        ("name", None),
        ("image", "no-such-image"),
        ("image", "../base"),
        ("vcpu_count", 0),
        ("vcpu_count", 65),
        ("vcpu_count", "2"),
        ("vcpu_count", 1.5),
        ("vcpu_count", True),
        ("memory_mb", 127),
        ("memory_mb", 262_145),
        ("disk_mb", 63),
        ("env", {"A=B": "1"}),
        ("env", {"A": 1}),
        ("env", {"A": "x" * 33_000}),
        ("env", {"A": "a\0b"}),
        ("user", "Root User"),
        ("workdir", "relative"),
        ("egress_policy", {"mode": "allowlist"}),
        ("egress_policy", {"mode": "internet", "more": 1}),
        ("egress_policy", "none"),
        ("driver", "firecracker"),
        ("min_isolation", "strong"),
        ("warm_pool_size", -1),
        ("warm_pool_size", 1001),
        ("idle_seconds", 59),
        ("command_timeout_seconds", 0),
        ("command_timeout_seconds", 3601),
        ("public_files", "some"),
        ("unknown", 1),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(api: Api, field: str, value: Any) -> None:
    answer = api.client.post("/api/profiles", json={"name": fresh("bad"), "image": "base", field: value})
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request"), answer.text
    assert field in answer.json()["message"]


@pytest.mark.gvisor_only(reason="a server with microVMs offers them")
def test_an_isolation_that_no_host_offers_is_refused_with_what_is_offered(api: Api) -> None:
    answer = api.client.post("/api/profiles", json={"name": fresh("bad"), "image": "base", "driver": "qemu"})
    assert (answer.status_code, answer.json()["error"]) == (503, "service_unavailable"), answer.text
    offered = "driver: no host offers 'qemu' now; offered: gvisor (gvisor, on systrap); qemu cannot run ("
    assert answer.json()["message"].startswith(offered)


@pytest.mark.gvisor_only(reason="a server with microVMs offers them")
@pytest.mark.parametrize("asked", [{}, {"driver": "gvisor"}], ids=["by-default", "by-name"])
def test_more_isolation_than_the_driver_gives_is_refused(api: Api, asked: dict[str, str]) -> None:
    wanted = {"name": fresh("bad"), "image": "base", "min_isolation": "microvm", **asked}
    answer = api.client.post("/api/profiles", json=wanted)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request"), answer.text
    assert answer.json()["message"].startswith("min_isolation: 'microvm' is more than the ")


def test_a_policy_that_is_not_there_yet_is_named(api: Api) -> None:
    body = {"name": fresh("bad"), "image": "base", "egress_policy": {"mode": "allowlist"}}
    assert "allowlist" in api.client.post("/api/profiles", json=body).json()["message"]


def test_a_patch_changes_what_it_names(api: Api) -> None:
    profile = api.make_profile(idle_seconds=600)
    changed = api.client.patch(f"/api/profile/{profile}", json={"memory_mb": 256, "idle_seconds": None})
    assert changed.status_code == 200
    assert (changed.json()["memory_mb"], changed.json()["idle_seconds"], changed.json()["image"]) == (256, None, "base")
    refused = api.client.patch(f"/api/profile/{profile}", json={"memory_mb": 1})
    assert (refused.status_code, refused.json()["error"]) == (400, "invalid_request")
    assert api.client.get(f"/api/profile/{profile}").json()["memory_mb"] == 256
    taken = api.client.patch(f"/api/profile/{profile}", json={"name": "base"})
    assert (taken.status_code, taken.json()["error"]) == (409, "conflict")
    assert api.client.delete(f"/api/profile/{profile}").status_code == 204


def test_ids_that_are_none_or_unknown(api: Api) -> None:
    for method in ("GET", "PATCH", "DELETE"):
        wrong = api.client.request(method, "/api/profile/base", json={} if method == "PATCH" else None)
        assert (wrong.status_code, wrong.json()["error"]) == (400, "invalid_request")
        missing = api.client.request(method, f"/api/profile/{uuid4()}", json={} if method == "PATCH" else None)
        assert (missing.status_code, missing.json()["error"]) == (404, "profile_not_found")


def test_environment_user_and_directory_reach_the_guest(api: Api, innkeeper: Server) -> None:
    secret = fresh("s3cret")
    profile = api.make_profile(env={"API_KEY": secret, "OTHER": "2"}, user="root", workdir="/usr/share")
    shown = api.client.get(f"/api/profile/{profile}")
    assert shown.json()["env"] == ["API_KEY", "OTHER"] and secret not in shown.text
    room = api.room(profile)
    assert room.output("echo $API_KEY; whoami; pwd") == f"{secret}\nroot\n/usr/share"
    assert room.output("echo $API_KEY", env={"API_KEY": "over"}) == "over"
    patched = api.client.patch(f"/api/profile/{profile}", json={"env": {"OTHER": None, "NEW": "3"}})
    assert patched.json()["env"] == ["API_KEY", "NEW"]
    later = api.room(profile)
    assert later.output("echo $API_KEY-${OTHER-gone}-$NEW") == f"{secret}-gone-3"
    assert secret.encode() not in (innkeeper.home / "api" / "innkeeper.db").read_bytes()
    for one in (room, later):
        one.delete()


def test_sizes_reach_the_guest(api: Api) -> None:
    room = api.room(api.make_profile(memory_mb=256, disk_mb=200, vcpu_count=1))
    assert 200 <= int(room.output("free -m | awk '/^Mem/ {print $2}'")) <= 300
    full = room.run("head -c 400M /dev/zero > big; echo $?; ls -s --block-size=1M big | cut -d' ' -f1")
    status, size = full["result"]["output"].split()[-2:]
    assert status != "0" and int(size) <= 200, full
    refused = room.put("/home/user/more", b"x" * 60_000_000)
    assert (refused.status_code, refused.json()["error"]) == (409, "conflict"), refused.text
    room.delete()


def test_a_warm_room_has_its_profiles_environment(api: Api) -> None:
    profile = api.make_profile(env={"WARM": "yes"}, warm_pool_size=1)
    room = api.room(profile)
    assert room.output("echo $WARM; hostname") != ""
    other = api.room(profile)
    assert other.output("echo $WARM") == "yes"
    for one in (room, other):
        one.delete()
    api.client.delete(f"/api/profile/{profile}")
