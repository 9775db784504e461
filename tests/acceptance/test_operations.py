"""What the people who run the server see: health, metrics, one shape of errors, logs and processes without secrets."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
from server_fixture import Api, Room, Server, all_pids, children, fresh

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


def test_health_needs_no_token(innkeeper: Server) -> None:
    answer = innkeeper.client(token=None).get("/healthz")
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")


def test_metrics_from_loopback_or_with_a_token(innkeeper: Server, shared: Room) -> None:
    shared.output("true")
    nobody = innkeeper.client(token=None)
    text = nobody.get("/metrics").text
    for name in (
        "innkeeper_http_requests_total",
        "innkeeper_http_request_seconds_bucket",
        "innkeeper_host_machines",
        "innkeeper_host_leaked",
        "innkeeper_control_instances_created",
    ):
        assert re.search(rf"^{name}", text, re.MULTILINE), name
    assert re.search(r'^innkeeper_host_leaked{host="[^"]+"} 0\.0$', text, re.MULTILINE)
    # Behind a front the client is somebody else.
    elsewhere = {"X-Forwarded-For": "192.0.2.9"}
    assert nobody.get("/metrics", headers=elsewhere).status_code == 401
    assert innkeeper.client().get("/metrics", headers=elsewhere).status_code == 200
    # The table in the docs is this page: names, types and what they mean.
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    helps = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE))
    table = re.findall(r"^\| `(innkeeper_\w+)` \| (\w+) \| [^|]* \| (.+) \|$", OPERATIONS.read_text(), re.MULTILINE)
    assert {name: (kind, meaning) for name, kind, meaning in table} == {
        name: (types[name], helps[name]) for name in types
    }
    # No label has values without end.
    assert shared.room_id not in text and shared.create()["instance_id"] not in text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/api/nowhere", 404, "not_found"),
        ("POST", "/healthz", 405, "method_not_allowed"),
        ("PUT", "/api/profiles", 405, "method_not_allowed"),
        ("PATCH", "/api/profile/{profile}/room/r", 405, "method_not_allowed"),
        ("GET", "/api/profile/{profile}/room/r/command", 405, "method_not_allowed"),
        ("DELETE", "/api/profile/{profile}/room/r/file/x", 405, "method_not_allowed"),
    ],
)
def test_errors_have_one_shape(api: Api, base: str, method: str, path: str, status: int, code: str) -> None:
    answer = api.client.request(method, path.format(profile=base))
    assert (answer.status_code, answer.json()["error"]) == (status, code), answer.text
    assert set(answer.json()) == {"error", "message"} and answer.json()["message"]
    if status == 405:
        assert answer.headers["Allow"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b'{"command": "ls"', 400),
        (b'{"command": "ls", "command2": 1}', 400),
        (b"[" * 100_000, 400),
        (b'{"command": "ls"}' + b" " * (5 << 20), 413),
    ],
    ids=range(6),
)
def test_bodies_that_are_wrong(shared: Room, body: bytes, status: int) -> None:
    answer = shared.client.post(f"{shared.path}/command", content=body, headers={"Content-Type": "application/json"})
    code = {400: "invalid_request", 413: "payload_too_large"}[status]
    assert (answer.status_code, answer.json()["error"]) == (status, code), answer.text


def test_what_is_not_http_is_answered_all_the_same(innkeeper: Server) -> None:
    with socket.create_connection(("127.0.0.1", innkeeper.port), timeout=10) as sock:
        sock.sendall(b"nonsense\r\n\r\n")
        assert b" 400 " in sock.recv(1000).split(b"\r\n")[0]
    assert innkeeper.client(token=None).get("/healthz").status_code == 200


def test_the_document_describes_the_endpoints(innkeeper: Server) -> None:
    document = innkeeper.client(token=None).get("/openapi.json").json()
    room = "/api/profile/{profile_id}/room/{room_id}"
    assert {"post", "delete"} <= set(document["paths"][room])
    for path in (f"{room}/command", f"{room}/file/{{path}}", f"{room}/tools", "/vm/{instance_id}/file/{path}"):
        assert path in document["paths"], path
    # FastAPI's own form of an error is InstaVM's, and nobody else's.
    assert "422" not in {
        status
        for path, item in document["paths"].items()
        if path.startswith(("/api/", "/vm/"))
        for one in item.values()
        for status in one["responses"]
    }


def test_the_api_process_is_not_root_and_has_no_capability(innkeeper: Server) -> None:
    status = Path(f"/proc/{innkeeper.api_pid()}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    assert "0" not in fields["Uid"].split() + fields["Gid"].split()
    assert {fields[name].strip() for name in ("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb")} == {"0" * 16}
    assert fields["NoNewPrivs"] == "1"


def test_what_lies_in_the_state_directory_is_not_for_everyone(innkeeper: Server) -> None:
    for name, mode in (("first-token", 0o600), ("host", 0o700), ("api", 0o700), ("api/inn.sock", 0o600)):
        assert (innkeeper.home / name).stat().st_mode & 0o777 == mode, name


def test_no_secret_is_in_a_log_or_in_a_process(innkeeper: Server, api: Api) -> None:
    in_profile, in_command, in_stdin, in_line = (fresh("s3cret") for _ in range(4))
    made = api.client.post("/v1/tokens", json={"name": fresh("leak")}).json()["token"]
    room = api.room(api.make_profile(env={"API_KEY": in_profile}))
    with_token = Room(innkeeper.client(made), room.profile_id, room.room_id)
    background = "echo $API_KEY > key.txt; nohup sleep 100 & cat"
    assert with_token.output(background, env={"OTHER_KEY": in_command}, stdin=in_stdin) == in_stdin
    # A mistake is logged without what was mistaken.
    with_token.client.post(f"{room.path}/command", json={"command": "ls", "env": {"A": in_line, "B C": in_line}})
    with_token.client.get("/nowhere", headers={"Authorization": f"Basic {in_line}"})
    secrets = [made, innkeeper.token, in_profile, in_command, in_stdin, in_line]
    log = innkeeper.log()
    assert "request_id=" in log, "the log says nothing at all"
    for secret in secrets:
        assert secret not in log
    assert innkeeper.process is not None
    pids = {innkeeper.process.pid, *children(innkeeper.process.pid)}
    pids |= set(innkeeper.sandbox_pids(innkeeper.machine_of(room.create()["instance_id"])))
    pids &= set(all_pids())
    assert len(pids) >= 4
    for pid in pids:
        for name in ("cmdline", "environ"):
            try:
                content = Path(f"/proc/{pid}/{name}").read_bytes()
            except OSError:
                continue
            for secret in secrets:
                assert secret.encode() not in content, f"/proc/{pid}/{name}"
    room.delete()


def test_no_secret_is_in_the_state_directory(innkeeper: Server, api: Api) -> None:
    secret = fresh("s3cret")
    room = api.room(api.make_profile(env={"API_KEY": secret}))
    room.output("true", env={"OTHER": f"{secret}-too"})
    looked_at = 0
    for path in (*innkeeper.home.glob("api/**/*"), *innkeeper.home.glob("host/machines/**/*")):
        if path.is_file() and path.stat().st_size < 50_000_000:
            looked_at += 1
            assert secret.encode() not in path.read_bytes(), path
    assert looked_at > 3
    room.delete()
