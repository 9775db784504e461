"""Tokens: their four forms, their scopes, their end; and what one organization sees of another."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx2
import pytest
from server_fixture import Api, Room, Server, fresh, until

FORMS = {
    "gentility": r"rk_live_[0-9a-f]{32}",
    "instavm": r"instavm_sk_[A-Za-z0-9_-]{43}",
    "gentity": r"gn_live_[A-Za-z0-9_-]{43}",
    "starpod": r"sp_live_[A-Za-z0-9_-]{43}",
}


def make(api: Api, **fields: Any) -> dict[str, Any]:
    answer = api.client.post("/v1/tokens", json={"name": fresh("token"), **fields})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


@pytest.mark.parametrize("dialect", FORMS)
def test_a_token_in_each_products_form_works_everywhere(api: Api, innkeeper: Server, dialect: str) -> None:
    made = make(api, dialect=dialect)
    assert re.fullmatch(FORMS[dialect], made["token"])
    assert innkeeper.client(made["token"]).get("/api/profiles").status_code == 200
    assert innkeeper.client(made["token"]).get("/v1/rooms").status_code == 200


def test_a_test_token(api: Api) -> None:
    assert re.fullmatch(r"rk_test_[0-9a-f]{32}", make(api, test=True)["token"])


def test_the_text_is_shown_once_and_kept_nowhere(api: Api, innkeeper: Server) -> None:
    made = make(api)
    assert made["token"] not in api.client.get("/v1/tokens").text
    for file in (innkeeper.home / "api").iterdir():
        if file.is_file():
            assert made["token"].encode() not in file.read_bytes(), file


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer rk_live_00000000000000000000000000000000",
        "Basic dXNlcjpwYXNz",
        "Bearer " + "x" * 10_000,
        "Token abc",
    ],
)
def test_without_a_valid_token(innkeeper: Server, base: str, header: str | None) -> None:
    client = innkeeper.client(token=None)
    headers = {} if header is None else {"Authorization": header}
    for method, path in ENDPOINTS:
        answer = client.request(method, path.format(profile=base, room="r", execution=uuid4()), headers=headers)
        assert answer.status_code == 401, (method, path, answer.text)
        code = answer.json()["error"] if path.startswith("/api") else answer.json()["code"]
        assert code == "unauthorized" and answer.headers["WWW-Authenticate"].startswith("Bearer")


ROOM = "/api/profile/{profile}/room/{room}"
ENDPOINTS = [
    ("POST", ROOM),
    ("DELETE", ROOM),
    ("POST", f"{ROOM}/command"),
    ("GET", f"{ROOM}/command/{{execution}}/output"),
    ("GET", f"{ROOM}/command/{{execution}}/files_changed"),
    ("GET", f"{ROOM}/file/etc/hostname"),
    ("GET", f"{ROOM}/file/etc/hostname?raw=1"),
    ("PUT", f"{ROOM}/file/home/user/x"),
    ("GET", f"{ROOM}/files/etc"),
    ("GET", f"{ROOM}/tools"),
    ("GET", "/api/profile/{profile}/rooms"),
    ("GET", "/api/profile/{profile}"),
    ("PATCH", "/api/profile/{profile}"),
    ("DELETE", "/api/profile/{profile}"),
    ("GET", "/api/profiles"),
    ("POST", "/api/profiles"),
    ("GET", "/v1/tokens"),
    ("POST", "/v1/tokens"),
    ("GET", "/v1/organizations"),
    ("POST", "/v1/organizations"),
    ("PATCH", "/v1/organizations/default"),
    ("GET", "/v1/rooms"),
    ("GET", "/v1/images"),
    ("GET", "/v1/audit"),
]


def test_a_scope_opens_its_own_endpoints_only(api: Api, innkeeper: Server, base: str) -> None:
    rooms_only = innkeeper.client(make(api, scopes=["rooms"])["token"])
    room = Room(rooms_only, base, fresh("scoped"))
    assert room.output("echo allowed") == "allowed"
    room.delete()
    for method, path, body in (
        ("POST", "/api/profiles", {"name": fresh("p"), "image": "base"}),
        ("PATCH", f"/api/profile/{base}", {}),
        ("DELETE", f"/api/profile/{base}", None),
        ("GET", "/v1/tokens", None),
        ("POST", "/v1/tokens", {"name": "more"}),
        ("GET", "/v1/audit", None),
        ("GET", "/v1/hosts", None),
    ):
        answer = rooms_only.request(method, path, json=body)
        assert answer.status_code == 403, (method, path, answer.text)
        assert "forbidden" in answer.json().values()
    profiles_only = innkeeper.client(make(api, scopes=["profiles"])["token"])
    assert profiles_only.get("/api/profiles").status_code == 200
    refused = profiles_only.post(f"/api/profile/{base}/room/r")
    assert (refused.status_code, refused.json()["error"]) == (403, "forbidden")


def test_nobody_gives_a_scope_they_lack(api: Api, innkeeper: Server) -> None:
    assert api.client.post("/v1/tokens", json={"name": "root", "scopes": ["admin"]}).status_code == 403
    giver = innkeeper.client(make(api, scopes=["tokens"])["token"])
    assert giver.post("/v1/tokens", json={"name": "x", "scopes": ["rooms"]}).status_code == 403
    assert giver.post("/v1/tokens", json={"name": "x", "scopes": ["tokens"]}).status_code == 201
    assert giver.post("/v1/tokens", json={"name": "x", "scopes": []}).status_code == 400
    assert giver.post("/v1/tokens", json={"name": "x", "scopes": ["everything"]}).status_code == 400


def test_a_revoked_token_ends_at_once(api: Api, innkeeper: Server) -> None:
    made = make(api)
    client = innkeeper.client(made["token"])
    assert client.get("/api/profiles").status_code == 200
    for _ in range(2):
        assert api.client.delete(f"/v1/tokens/{made['id']}").status_code == 204
    assert client.get("/api/profiles").status_code == 401
    (listed,) = [token for token in api.client.get("/v1/tokens").json() if token["id"] == made["id"]]
    assert listed["revoked_at"] is not None
    assert api.client.delete(f"/v1/tokens/{uuid4()}").status_code == 404


def test_the_last_use_is_known(api: Api, innkeeper: Server) -> None:
    made = make(api)

    def last_used() -> Any:
        return next(one for one in api.client.get("/v1/tokens").json() if one["id"] == made["id"])["last_used_at"]

    assert last_used() is None
    innkeeper.client(made["token"]).get("/api/profiles")
    until(last_used, seconds=30)


def test_the_audit_names_what_was_done_and_by_whom(api: Api, room: Room) -> None:
    made = make(api)
    room.create()
    room.delete()

    def actions() -> dict[str, str]:
        events = api.client.get("/v1/audit", params={"limit": 200}).json()["events"]
        return {event["action"]: event["actor"] for event in events}

    until(lambda: {"token.create", "room.create", "room.destroy"} <= set(actions()))
    assert actions()["token.create"].startswith("token:rk_live_")
    assert made["token"] not in api.client.get("/v1/audit", params={"limit": 1000}).text


# --- organizations ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(innkeeper: Server) -> Iterator[Room]:
    """A room of another organization, which the operator made and may have one room."""
    made = innkeeper.inn("organization", "create", "others", "--max-instances", "1")
    assert made.returncode == 0, made.stderr
    token = innkeeper.inn("token", "create", "theirs", "--organization", "others")
    assert token.returncode == 0, token.stderr
    api = Api(innkeeper.client(token.stdout.strip()))
    profile = api.profile("base")
    small = api.client.patch(f"/api/profile/{profile}", json={"memory_mb": 512, "warm_pool_size": 0})
    assert small.status_code == 200, small.text
    room = Room(api.client, profile, "private")
    room.create()
    yield room
    room.delete()


def test_nothing_of_another_organization_is_there(api: Api, theirs: Room) -> None:
    execution = theirs.run("echo secret > secret.txt")["result"]["execution_id"]
    instance = theirs.create()["instance_id"]
    for method, path in ENDPOINTS:
        if "{profile}" not in path:
            continue
        body = {"command": "true"} if path.endswith("/command") else {} if method == "PATCH" else None
        url = path.format(profile=theirs.profile_id, room=theirs.room_id, execution=execution)
        answer = api.client.request(method, url, json=body)
        assert (answer.status_code, answer.json()["error"]) == (404, "profile_not_found"), (method, url, answer.text)
    assert api.client.get(f"/v1/rooms/{instance}").status_code == 404
    assert theirs.profile_id not in api.client.get("/api/profiles").text
    for path in ("/v1/rooms", "/v1/audit?limit=1000"):
        assert instance not in api.client.get(path).text
    (token,) = theirs.client.get("/v1/tokens").json()
    assert token["id"] not in api.client.get("/v1/tokens").text
    assert api.client.delete(f"/v1/tokens/{token['id']}").status_code == 404
    assert theirs.output("cat secret.txt") == "secret"


def test_names_are_an_organizations_own(api: Api, theirs: Room) -> None:
    def profiles(client: httpx2.Client) -> dict[str, str]:
        return {profile["name"]: profile["id"] for profile in client.get("/api/profiles").json()}

    shipped = {"base", "python-data-science", "node"}
    assert set(profiles(theirs.client)) == shipped
    assert all(profiles(api.client)[name] != profiles(theirs.client)[name] for name in shipped)


def test_an_organizations_limit_holds(theirs: Room) -> None:
    theirs.create()
    second = Room(theirs.client, theirs.profile_id, "second")
    answer = second.client.post(second.path)
    assert (answer.status_code, answer.json()["error"]) == (429, "rate_limited"), answer.text
    assert int(answer.headers["Retry-After"]) >= 1 and "1 instances" in answer.json()["message"]
    assert second.delete().status_code == 404


def test_the_operator_changes_a_limit(innkeeper: Server, theirs: Room) -> None:
    theirs.create()
    second = Room(theirs.client, theirs.profile_id, "second")

    def limit(*options: str) -> None:
        ended = innkeeper.inn("organization", "limit", "others", *options)
        assert ended.returncode == 0, ended.stderr

    try:
        limit("--max-instances", "none", "--max-memory-mb", "1023")
        answer = second.client.post(second.path)
        assert (answer.status_code, answer.json()["error"]) == (429, "rate_limited"), answer.text
        assert "1023 MiB of memory" in answer.json()["message"]
        limit("--max-memory-mb", "1024")
        second.create()
        # What is there already outlives a limit that it exceeds.
        limit("--max-instances", "1")
        assert second.output("echo still here") == "still here"
    finally:
        second.delete()
        limit("--max-instances", "1", "--max-memory-mb", "none")
    rows = {row["name"]: row for row in json.loads(innkeeper.inn("organization", "list", "--json").stdout)}
    assert (rows["others"]["max_instances"], rows["others"]["max_memory_mb"]) == (1, None)
    assert (rows["default"]["max_instances"], rows["default"]["max_memory_mb"]) == (None, None)


def test_a_tenant_is_no_operator(innkeeper: Server, theirs: Room) -> None:
    for method, path, body in (
        ("GET", "/v1/organizations", None),
        ("POST", "/v1/organizations", {"name": "more"}),
        ("PATCH", "/v1/organizations/others", {"max_instances": None}),
        ("POST", "/v1/tokens", {"name": "x", "organization": "default"}),
    ):
        answer = theirs.client.request(method, path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), (method, path, answer.text)
    ended = innkeeper.inn("organization", "create", "others")
    assert ended.returncode == 1 and "already" in ended.stderr
