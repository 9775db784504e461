"""`POST /api/profile/{profile_id}/room/{room_id}`: get or create."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote
from uuid import UUID, uuid4

import pytest
from server_fixture import Api, Room, Server, fresh, until
from tests.guest_drivers import GVISOR

pytestmark = pytest.mark.microvms


def test_the_answer_has_all_documented_fields(api: Api, base: str, room: Room) -> None:
    made = room.create()
    assert list(made) == ["instance_id", "profile_id", "room_id", "status", "host", "profile"]
    assert UUID(made["instance_id"]).version == 4
    assert (made["profile_id"], made["room_id"], made["status"]) == (base, room.room_id, "ready")
    assert UUID(made["host"]["id"]) and made["host"]["name"] == os.uname().nodename
    assert made["profile"] == {"id": base, "name": "base"}


@pytest.mark.parametrize("body", [None, b"", b"  ", b"{}", b'{"host_id": null}'], ids=repr)
def test_the_body_may_be_absent_or_empty(shared: Room, body: bytes | None) -> None:
    headers = {"Content-Type": "application/json"} if body else {}
    answer = shared.client.post(shared.path, content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["instance_id"] == shared.create()["instance_id"]


def test_the_same_pair_is_the_same_instance_also_under_50_first_requests(api: Api, base: str, room: Room) -> None:
    with ThreadPoolExecutor(50) as many:
        answers = list(many.map(lambda _: room.create(), range(50)))
    assert len({answer["instance_id"] for answer in answers}) == 1
    assert {answer["status"] for answer in answers} == {"ready"}
    rooms = api.client.get(f"/api/profile/{base}/rooms").json()
    assert sum(one["room_id"] == room.room_id for one in rooms) == 1


def test_other_rooms_and_other_profiles_are_other_instances(api: Api, base: str, shared: Room) -> None:
    other = api.room(api.make_profile(), shared.room_id)
    assert other.create()["instance_id"] != shared.create()["instance_id"]
    assert other.delete().status_code == 204


ROOM_IDS = [
    "ai-session-123",
    "a/b/../c",
    "..",
    "a b+c%2F",
    "?query#fragment",
    "日本語 🏠",
    "e\N{COMBINING ACUTE ACCENT}",
    "\n\t\x01",
    "x" * 255,
    "\N{HOUSE BUILDING}" * 255,
]


@pytest.mark.parametrize("room_id", ROOM_IDS, ids=range(len(ROOM_IDS)))
def test_a_room_id_is_any_unicode_after_decoding(innkeeper: Server, base: str, room_id: str) -> None:
    # Raw, because clients tidy paths: dots are encoded too.
    encoded = quote(room_id, safe="").replace(".", "%2E")
    room = Room(innkeeper.client(), base, room_id)
    path = f"/api/profile/{base}/room/{encoded}"
    made = room.client.post(path)
    assert made.status_code == 200, made.text
    assert made.json()["room_id"] == room_id
    said = room.client.post(f"{path}/command", json={"command": "echo hello"}).json()
    assert (said["result"]["output"], said["instance_id"]) == ("hello", made.json()["instance_id"])
    assert room.client.delete(path).status_code == 204


def test_two_spellings_of_a_character_are_two_rooms(api: Api, base: str) -> None:
    one, two = api.room(base, "\N{LATIN SMALL LETTER E WITH ACUTE}"), api.room(base, "e\N{COMBINING ACUTE ACCENT}")
    assert one.create()["instance_id"] != two.create()["instance_id"]
    assert {one.delete().status_code, two.delete().status_code} == {204}


@pytest.mark.parametrize("encoded", ["x" * 256, "%F0%9F%8F%A0" * 256, "%FF", "%00", "%zz", ""])
def test_a_room_id_that_is_not_one_is_refused(api: Api, base: str, encoded: str) -> None:
    answer = api.client.post(f"/api/profile/{base}/room/{encoded}")
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request"), answer.text


def test_a_profile_that_is_no_uuid_or_unknown(api: Api) -> None:
    for method, tail in (("POST", ""), ("POST", "/command"), ("GET", "/file/x"), ("GET", "/tools"), ("DELETE", "")):
        wrong = api.client.request(method, f"/api/profile/base/room/r{tail}", json={"command": "true"})
        assert (wrong.status_code, wrong.json()["error"]) == (400, "invalid_request"), (method, tail, wrong.text)
        missing = api.client.request(method, f"/api/profile/{uuid4()}/room/r{tail}", json={"command": "true"})
        if (method, tail) == ("POST", ""):
            continue  # its body has other fields
        assert (missing.status_code, missing.json()["error"]) == (404, "profile_not_found"), (method, tail)
    missing = api.client.post(f"/api/profile/{uuid4()}/room/r")
    assert (missing.status_code, missing.json()["error"]) == (404, "profile_not_found")


def test_the_room_on_the_host_that_was_asked_for(api: Api, base: str, shared: Room) -> None:
    host = shared.create()["host"]["id"]
    assert shared.create(host_id=host)["host"]["id"] == host
    elsewhere = shared.client.post(shared.path, json={"host_id": str(uuid4())})
    assert (elsewhere.status_code, elsewhere.json()["error"]) == (409, "host_mismatch")
    unknown = api.room(base)
    answer = unknown.client.post(unknown.path, json={"host_id": str(uuid4())})
    assert answer.status_code == 503 and int(answer.headers["Retry-After"]) >= 1
    assert answer.json() == {
        "error": "service_unavailable",
        "message": "No available hosts for instance provisioning",
    }
    assert unknown.delete().status_code == 404, "a refused room was made all the same"


@pytest.mark.parametrize("body", [{"host_id": "here"}, {"host_id": 5}, {"unknown": 1}, [], "text", 5], ids=str)
def test_a_body_that_is_wrong_is_refused(shared: Room, body: object) -> None:
    answer = shared.client.post(shared.path, json=body)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request"), answer.text


def test_a_destroyed_room_is_gone_and_its_name_begins_anew(room: Room) -> None:
    first = room.create()["instance_id"]
    room.output("echo kept > kept.txt")
    assert room.delete().status_code == 204
    assert room.delete().json()["error"] == "instance_not_found"
    assert room.file("/home/user/kept.txt").json()["error"] == "instance_not_found"
    assert room.create()["instance_id"] != first
    assert room.run("cat kept.txt")["result"]["exit_code"] == 1


def test_a_failed_room_restarts_on_its_disk(innkeeper: Server, api: Api, room: Room) -> None:
    instance = room.create()["instance_id"]
    room.output("echo kept > kept.txt; sync")
    innkeeper.kill_sandbox(innkeeper.machine_of(instance))
    until(lambda: api.client.get(f"/v1/rooms/{instance}").json()["status"] == "failed")
    # Only asking for the room wakes it: a look at a file says what happened.
    refused = room.file("/home/user/kept.txt")
    assert (refused.status_code, refused.json()["error"]) == (503, "instance_failed")
    assert int(refused.headers["Retry-After"]) >= 1
    again = room.create()
    assert (again["status"], again["instance_id"]) == ("ready", instance)
    assert room.output("cat kept.txt") == "kept"


def test_a_failed_room_is_restarted_by_a_command_too(innkeeper: Server, api: Api, room: Room) -> None:
    instance = room.create()["instance_id"]
    room.output("echo kept > kept.txt; sync")
    innkeeper.kill_sandbox(innkeeper.machine_of(instance))
    until(lambda: api.client.get(f"/v1/rooms/{instance}").json()["status"] == "failed")
    assert room.output("cat kept.txt") == "kept"


def test_the_rooms_of_a_profile_are_listed(api: Api) -> None:
    profile = api.make_profile()
    rooms = [api.room(profile, fresh("listed")) for _ in range(2)]
    made = [room.create() for room in rooms]
    listed = api.client.get(f"/api/profile/{profile}/rooms").json()
    assert [(one["room_id"], one["instance_id"], one["status"]) for one in listed] == [
        (one["room_id"], one["instance_id"], "ready") for one in made
    ]
    busy = api.client.delete(f"/api/profile/{profile}")
    assert (busy.status_code, busy.json()["error"]) == (409, "conflict")
    for room in rooms:
        room.delete()
    assert api.client.delete(f"/api/profile/{profile}").status_code == 204
    assert api.client.get(f"/api/profile/{profile}").json()["error"] == "profile_not_found"


def test_a_room_shows_its_boot_trace_and_its_isolation(api: Api, shared: Room, driver: str) -> None:
    shown = api.client.get(f"/v1/rooms/{shared.create()['instance_id']}").json()
    steps = [step["step"] for step in shown["boot_trace"]]
    assert steps == ["network_allocated", "ftap_created", "image_generated", "vm_started", "vm_booted", "ready"] or (
        steps[0] == "active" and steps[-1] == "ready"
    )
    times = [step["at_ms"] for step in shown["boot_trace"]]
    assert times == sorted(times) and times[-1] > 0
    isolation = shown["isolation"]
    if driver == GVISOR:
        assert (isolation["driver"], isolation["platform"], isolation["accelerator"]) == (GVISOR, "systrap", None)
    else:
        assert (isolation["driver"], isolation["platform"]) == (driver, isolation["accelerator"])
        assert (isolation["level"], isolation["accelerator"] in ("kvm", "tcg")) == ("microvm", True)
