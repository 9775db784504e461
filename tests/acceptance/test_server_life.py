"""One server from its start with a settings file to its end by SIGTERM: logs in files, levels, drain, looks into it, an orderly stop."""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
from collections.abc import Iterator

import pytest
from server_fixture import Server, fresh, server, until

KEY = base64.b64encode(os.urandom(32)).decode()


@pytest.fixture(scope="module")
def living(tmp_path_factory: pytest.TempPathFactory, driver: str) -> Iterator[Server]:
    file = tmp_path_factory.mktemp("etc") / "innkeeper.toml"
    file.write_text(
        f'log_file_mb = 1\nlog_files_kept = 2\nlog_format = "json"\nmaster_key = "{KEY}"\nstop_seconds = 30\n'
    )
    file.chmod(0o600)
    with server("base", driver=driver, INNKEEPER_CONFIG=str(file), INNKEEPER_KEEP_MACHINES="true") as running:
        yield running
        if running.process is not None:
            running.stop()
        # What ran on is taken away with the directory.
        running.start(INNKEEPER_KEEP_MACHINES="false")


def log_lines(running: Server, name: str) -> list[dict[str, object]]:
    lines = []
    for path in sorted((running.home / name / "log").glob("*.log*"), reverse=True):
        lines += [json.loads(line) for line in path.read_text().splitlines()]
    return lines


def test_the_file_decided_and_the_logs_of_both_processes_tell_one_story(living: Server) -> None:
    api = living.api()
    room = api.room(api.make_profile())
    answer = room.post("true")
    request_id = answer.headers["X-Request-Id"]
    internal = living.internal_id(room.create()["instance_id"])
    (line,) = [one for one in log_lines(living, "api") if one.get("request_id") == request_id]
    assert (line["instance_id"], line["status"], line["process"]) == (internal, 200, "api")
    # A daemon's line about a request's call carries the request's id.
    living.inn("diagnose", "level", "debug")
    broken = api.room(api.make_profile()).post("true", cwd="/nowhere")
    assert broken.status_code == 400
    living.inn("diagnose", "level", "info")
    for folder, name in (("api", "api.log"), ("host", "host.log")):
        path = living.home / folder / "log" / name
        assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert {one["process"] for one in log_lines(living, "host")} == {"host"}


def test_the_level_changes_while_it_runs(living: Server) -> None:
    assert living.process is not None
    before = living.inn("diagnose", "level", "--json")
    assert {one["process"]: one["level"] for one in json.loads(before.stdout)} == {"api": "info", "host": "info"}
    changed = json.loads(living.inn("diagnose", "level", "debug", "--json").stdout)
    assert {one["level"] for one in changed} == {"debug"}
    living.process.send_signal(signal.SIGUSR2)

    def levels() -> dict[str, str]:
        found = json.loads(living.inn("diagnose", "level", "--json").stdout)
        return {one["process"]: one["level"] for one in found}

    until(lambda: levels() == {"api": "debug", "host": "info"})
    os.kill(living.api_pid(), signal.SIGUSR2)
    until(lambda: levels() == {"api": "info", "host": "info"})


def test_the_operator_looks_into_both_processes(living: Server) -> None:
    stacks = living.inn("diagnose", "stacks", "--seconds", "0.3")
    assert stacks.returncode == 0 and "MainThread;" in stacks.stdout, stacks.stderr
    speedscope = json.loads(living.inn("diagnose", "stacks", "--seconds", "0.3", "--format", "speedscope").stdout)
    assert {profile["name"] for profile in speedscope["profiles"]} >= {"MainThread", "store-write"}
    (host,) = json.loads(living.inn("host", "list", "--json").stdout)
    tasks = living.inn("diagnose", "tasks", "--host", host["name"])
    assert "WarmPools.run" in tasks.stdout, tasks
    memory = living.inn("diagnose", "memory", "--host", host["id"], "--seconds", "0.2", "--json")
    assert json.loads(memory.stdout)["resident_kib"] > 10_000
    api = living.api()
    instance = api.room(api.make_profile()).create()["instance_id"]
    guest = living.inn("diagnose", "guest", instance)
    assert "goroutine " in guest.stdout and "main.(*agent).run" in guest.stdout, guest


def test_the_operator_sees_what_there_is_room_for(living: Server) -> None:
    api = living.api()
    profile = api.client.get(f"/api/profile/{api.make_profile(memory_mb=1024)}").json()
    report = json.loads(living.inn("capacity", "--json").stdout)
    (mine,) = [one for one in report["profiles"] if one["profile_id"] == profile["id"]]
    left = report["memory_limit_mb"] - (report["memory_committed_mb"] - report["memory_warm_mb"])
    assert mine["bound_by"] in ("memory", "slots") and mine["more"] <= left // 1024
    room = api.room(profile["id"])
    room.create()
    again = json.loads(living.inn("capacity", "--json").stdout)
    assert again["instances"]["ready"] == report["instances"].get("ready", 0) + 1
    assert again["slots_used"] > 0 and again["disk_free_mb"] > 0
    printed = living.inn("capacity")
    assert printed.returncode == 0 and profile["name"] in printed.stdout, printed


def test_garbage_is_listed_then_removed(living: Server) -> None:
    dead = living.home / "host" / "pool" / "disks" / "dead.img"
    dead.write_bytes(b"x" * 100_000)
    listed = json.loads(living.inn("gc", "--json").stdout)
    assert [(one["kind"], one["name"]) for one in listed["items"]] == [("disk", "dead")] and dead.exists()
    assert listed["total_bytes"] >= 100_000
    removed = living.inn("gc", "--yes")
    assert "dead" in removed.stdout and not dead.exists(), removed
    assert json.loads(living.inn("gc", "--json").stdout)["items"] == []


def test_a_drain_is_kept_over_a_restart_and_taken_back(living: Server) -> None:
    api = living.api()
    profile_id = api.make_profile()
    old = api.room(profile_id)
    old.create()
    assert living.inn("drain", "on", "--deadline-seconds", "600", "--wait-seconds", "20").returncode == 0
    living.stop()
    living.start()
    api = living.api()
    client = living.client(token=None)
    assert client.get("/healthz").json()["status"] == "draining"
    assert "draining:   yes" in living.inn("drain", "status").stdout
    refused = api.room(profile_id).client.post(api.room(profile_id).path)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "30")
    again = api.room(profile_id, old.room_id)
    assert again.output("echo still here") == "still here"
    assert living.inn("drain", "off").returncode == 0
    assert api.room(profile_id).create()["status"] == "ready"


def test_sigterm_lets_requests_end(living: Server) -> None:
    api = living.api()
    room = api.room(api.make_profile())
    room.create()
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(room.post("touch /tmp/begun; sleep 3; echo done")))
    waiting.start()
    other = living.api().room(room.profile_id, room.room_id)
    until(lambda: other.run("test -e /tmp/begun")["result"]["exit_code"] == 0)
    assert living.process is not None
    living.process.send_signal(signal.SIGTERM)
    waiting.join(60)
    assert answers and (answers[0].status_code, answers[0].json()["result"]["output"]) == (200, "done")
    assert living._gone() == 0
    living.start()


def test_no_secret_of_a_whole_life_is_in_any_log(living: Server) -> None:
    """Every kind of secret that a server is given, in every place that takes one, then everything that either process ever logged."""
    api = living.api()
    living.inn("diagnose", "level", "debug")
    secrets = {
        name: fresh("s3cret") for name in ("profile", "command", "stdin", "line", "file", "query", "header", "cookie")
    }
    made = api.client.post("/v1/tokens", json={"name": fresh("life")}).json()
    secrets |= {"token": made["token"], "first": living.token, "key": KEY}
    room = api.room(api.make_profile(env={"API_KEY": secrets["profile"]}))
    mine = type(room)(living.client(made["token"]), room.profile_id, room.room_id)
    mine.run(f"echo {secrets['line']} $OTHER; cat", env={"OTHER": secrets["command"]}, stdin=secrets["stdin"])
    mine.put("/tmp/" + secrets["file"], secrets["file"].encode())
    mine.file("/tmp/" + secrets["file"], x=secrets["query"])
    for path in ("/nowhere", "/api/profiles", f"{room.path}/command"):
        for headers in (
            {"Authorization": secrets["header"]},
            {"X-API-Key": secrets["header"]},
            {"Cookie": secrets["cookie"]},
        ):
            api.client.post(path, params={"token": made["token"]}, headers=headers, json={"command": [secrets["line"]]})
    api.client.post("/api/profiles", json={"name": "x", "env": {"A B": secrets["profile"]}})
    api.client.delete(f"/v1/tokens/{made['id']}")
    assert mine.post("true").status_code == 401
    assert living.process is not None
    living.kill_sandbox(living.machine_of(room.create()["instance_id"]))
    until(lambda: room.post("true").status_code == 200)
    room.delete()
    os.kill(living.api_pid(), signal.SIGKILL)
    until(lambda: living.inn("diagnose", "level").returncode == 0)
    living.inn("diagnose", "level", "info")
    said = living.log() + "".join(
        path.read_text() for folder in ("api", "host") for path in (living.home / folder / "log").iterdir()
    )
    assert said.count("request_id") > 20 and "the API process ended" in said
    for name, secret in secrets.items():
        assert secret not in said, name
