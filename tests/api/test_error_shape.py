"""Every route x everything that can be wrong with a request: one shape per dialect, and FastAPI's own never."""

from __future__ import annotations

import re
from typing import Any
from uuid import uuid4

import pytest

pytestmark = pytest.mark.anyio

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
BODIES = {"POST", "PUT", "PATCH"}


def routes(api: Any) -> list[tuple[str, set[str]]]:
    document = api.document
    return [
        (path, {m.upper() for m in item if m != "head"})
        for path, item in document["paths"].items()
        # A page for people, whose errors are pages, too.
        if not path.startswith("/cli-login/")
    ]


def fill(api: Any, template: str, **values: str) -> str:
    defaults = {
        "profile_id": str(api.profile_id),
        "room_id": "r",
        "execution_id": str(uuid4()),
        "path": "tmp/a",
        "instance_id": str(uuid4()),
        "token_id": str(uuid4()),
        "name": "default",
        "registry": "r.example",
        "build_id": str(uuid4()),
        "host_id": str(uuid4()),
        "pid": "shell",
        "key_id": "999",
        "ssh_key_id": "999",
        "event_id": str(uuid4()),
        "vm_id": "vm_" + "a" * 26,
        "session": str(uuid4()),
        "share_id": str(uuid4()),
        "snapshot_id": str(uuid4()),
        "task_id": str(uuid4()),
        "volume_id": str(uuid4()),
        "checkpoint_id": str(uuid4()),
    }
    return re.sub(r"{(\w+)}", lambda m: {**defaults, **values}[m[1]], template)


V1 = ("/v1/", "/execute", "/kill", "/upload", "/download")
LOGIN = "/api/cli-auth/"
# Gentity's errors have no code.
GENTITY = "/api/tokens"
# InstaVM's endpoints: a request that is not valid is 422, with a list.
LISTED = (
    "/v1/vms",
    "/v1/executions/",
    "/v1/sessions/",
    "/v1/shares",
    "/v1/snapshots",
    "/v1/volumes",
    "/v1/retention",
    "/execute",
    "/kill",
    "/upload",
    "/download",
)


def check(answer: Any, path: str, status: int | set[int], code: str | None = None) -> None:
    expected = {status} if isinstance(status, int) else status
    if path.startswith(LISTED) and 400 in expected and answer.status_code not in expected - {400}:
        assert answer.status_code == 422, (path, answer.text)
        assert answer.json().keys() == {"detail"}
        for problem in answer.json()["detail"]:
            assert problem.keys() == {"loc", "msg", "type"} and problem["loc"] and problem["msg"]
        return
    assert answer.status_code in expected, (path, answer.status_code, answer.text)
    keys = {"detail", "code"} if path.startswith((*V1, LOGIN)) else {"error", "message"}
    if path.startswith(GENTITY):
        keys = {"error"}
    body = answer.json()
    assert set(body) == keys, (path, body)
    assert all(isinstance(value, str) and value for value in body.values())
    assert answer.headers["content-type"] == "application/json"
    assert re.fullmatch(r"[0-9a-f]{16}", answer.headers["x-request-id"])
    if code is not None and not path.startswith(GENTITY):
        assert body["code" if path.startswith((*V1, LOGIN)) else "error"] == code
    if answer.status_code == 401:
        assert answer.headers["www-authenticate"].startswith("Bearer")
    if answer.status_code in (429, 503):
        assert int(answer.headers["retry-after"]) >= 1


# Bodies that are taken as they are.
# Clients send these without a body, and without a content type.
BODILESS = ("/suspend", "/resume")
STREAMED = ("/file/{path}", "/context", "/archive", "/content", "/upload", "/download")


def needs_token(path: str) -> bool:
    return path.startswith(("/api/", *V1)) and not path.startswith(LOGIN)


async def test_no_token_and_bad_tokens(api: Any) -> None:
    bad: list[list[tuple[str, str]]] = [
        [],
        [("Authorization", "Bearer rk_live_" + "0" * 32)],
        [("Authorization", "Bearer ")],
        [("Authorization", "Basic abc")],
        [("Authorization", "rk_live_" + "0" * 32)],
        [("Authorization", "Bearer " + "x" * 4000)],
        [("Authorization", f"Bearer {api.token}"), ("Authorization", f"Bearer {api.token}")],
        [("Authorization", b"Bearer \xff\xfe".decode("latin-1"))],
    ]
    async with api.anonymous() as client:
        for template, methods in routes(api):
            if not needs_token(template):
                continue
            for method in methods:
                for headers in bad:
                    encoded = [(k.encode(), v.encode("latin-1")) for k, v in headers]
                    answer = await client.request(method, fill(api, template), headers=encoded)
                    check(answer, template, 401, "unauthorized")
    assert not api.world.control.live.find((api.profile_id, "r"))


async def test_wrong_methods_name_the_right_ones(api: Any) -> None:
    for template, methods in routes(api):
        for method in (*METHODS, "OPTIONS", "TRACE", "BREW"):
            if method in methods:
                continue
            answer = await api.client.request(method, fill(api, template))
            check(answer, template, 405, "method_not_allowed")
            assert methods <= set(answer.headers["allow"].split(", ")), template


async def test_bad_bodies(api: Any) -> None:
    json_type = ("Content-Type", "application/json")
    bad: list[tuple[bytes, list[tuple[str, str]]]] = [
        (b"{", [json_type]),
        (b"\xff", [json_type]),
        (b"[]", [json_type]),
        (b"null", [json_type]),
        (b'"x"', [json_type]),
        (b'{"surely_unknown": 1}', [json_type]),
        (b"[" * 50_000, [json_type]),
        (b"{}", [json_type, json_type]),
        (b"{}", []),
        (b"{}", [("Content-Type", "text/plain")]),
        (b"{}", [("Content-Type", "application/json; charset=utf-16")]),
        (b'{"name": "\\ud800", "image": "base", "command": "\\ud800"}', [json_type]),
    ]
    for template, methods in routes(api):
        for method in methods & BODIES:
            if template.endswith((*STREAMED, *BODILESS)):
                continue
            for body, headers in bad:
                answer = await api.client.request(method, fill(api, template), content=body, headers=headers)
                check(answer, template, 400, "invalid_request")


async def test_too_large_bodies(api: Any) -> None:
    async def endless() -> Any:
        while True:
            yield b" " * 65_536

    for template, methods in routes(api):
        for method in methods & BODIES:
            if template.endswith(STREAMED):
                continue
            headers = {"Content-Type": "application/json"}
            declared = {**headers, "Content-Length": str(1 << 33)}
            answer = await api.client.request(method, fill(api, template), content=b"{}", headers=declared)
            check(answer, template, 413, "payload_too_large")
            streamed = await api.client.request(method, fill(api, template), content=endless(), headers=headers)
            check(streamed, template, 413, "payload_too_large")


async def test_unknown_ids(api: Any) -> None:
    for template, methods in routes(api):
        for method in methods:
            for name in re.findall(r"{(\w+)}", template):
                if (
                    name in ("room_id", "path")
                    or (name == "registry" and method == "PUT")
                    or (template.endswith("/archive") and template.startswith("/v1/images"))
                ):
                    # These make what they name.
                    continue
                path = fill(api, template, **{name: str(uuid4())})
                answer = await api.client.request(method, path, **body_for(template, method))
                if template.startswith(("/v1/organizations", "/v1/hosts")):
                    # Who is not the operator does not learn which of them there are either.
                    check(answer, template, 403, "forbidden")
                    continue
                check(answer, template, 404)
                path = fill(api, template, **{name: "not-a-uuid"})
                answer = await api.client.request(method, path, **body_for(template, method))
                check(answer, template, {400, 404})


def body_for(template: str, method: str) -> dict[str, Any]:
    if template.startswith("/v1/shares/"):
        return {"json": {"is_public": True} if method == "PATCH" else {}} if method in BODIES else {}
    if "/files" in template and template.startswith("/v1/volumes"):
        if template.endswith("/upload"):
            return {"data": {"path": "a"}, "files": {"file": b"x"}}
        return {"json": {"path": "a"}} if method == "POST" else {"params": {"path": "a"}}
    if "/files" in template and template.startswith("/v1/vms"):
        query = {"params": {"path": "/a", "pattern": "x", "query": "x"}}
        return (
            {"json": {"path": "/a", "to": "/b"} if not template.endswith("/mkdir") else {"path": "/a"}}
            if method == "POST"
            else query
        )
    if template.startswith("/v1/snapshots/") and method == "PATCH":
        return {"json": {"name": "x"}}
    if template.startswith("/v1/volumes/") and method == "PATCH":
        return {"json": {"name": "x"}}
    if template == "/v1/vms/{vm_id}/volumes" and method == "POST":
        return {"json": {"volume_id": str(uuid4()), "mount_path": "/data"}}
    if template.endswith(("/snapshot", "/verify", "/checkpoints", "/clone", "/fork")) and method == "POST":
        return {"json": {}}
    if method == "PATCH":
        return {"json": {"description": "x"} if template.startswith("/v1/api-keys") else {}}
    if template.endswith(("/cancel", "/gc", "/backup")) and method == "POST":
        return {"json": {}}
    if template.endswith("/pty/sessions") and method == "POST":
        return {"json": {}}
    if template.endswith("/resize"):
        return {"json": {"cols": 80, "rows": 24}}
    if template.endswith("/signal"):
        return {"json": {"signal": 15}}
    if template.endswith("/exec"):
        return {"json": {"command": "true"}}
    if template.endswith("/hold"):
        return {"json": {"seconds": 1}}
    if template.endswith("/stage-env"):
        return {"json": {"entries": []}}
    if template.endswith("/drain"):
        return {"json": {"draining": True}}
    if template.endswith("/command"):
        return {"json": {"command": "true"}}
    if template.endswith("/file/{path}") and method == "PUT":
        return {"content": b"x"}
    return {}


@pytest.mark.parametrize(
    "path",
    ["/", "/nope", "/api", "/api/", "/api/profiles/", "/api/profile/x/room", "/v1", "/v1/", "/v1/tokens/", "/docs", "/vm", "/metrics/x",
     "/api/profile/%FF", "/v1/%FF", "//", "/%2e%2e/", "/api/%00"],
)  # fmt: skip
async def test_unknown_paths(api: Any, path: str) -> None:
    for method in METHODS:
        check(await api.client.request(method, path), path, {400, 404, 405})


async def test_bad_room_ids(api: Any) -> None:
    for room in ("", "%FF", "%00", "x" * 256, "%ED%A0%80", "%4", "%zz"):
        answer = await api.client.post(f"{api.profile}/room/{room}")
        check(answer, "/api/", 400, "invalid_request")


async def test_what_goes_wrong_inside_stays_inside(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the password is hunter2")

    monkeypatch.setattr("innkeeper.control.rooms.ready_entry", broken)
    answer = await api.client.post(api.room)
    check(answer, "/api/", 500, "internal_error")
    assert "hunter2" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["message"]


async def test_no_answer_of_the_documentation_is_fastapis(api: Any) -> None:
    text = str(api.document)
    assert "HTTPValidationError" not in text
    assert all(
        ("422" in operation["responses"]) == path.startswith(LISTED)
        for path, item in api.document["paths"].items()
        for method, operation in item.items()
        if method in ("get", "put", "post", "patch", "delete")
    )
