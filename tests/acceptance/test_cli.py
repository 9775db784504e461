"""The `inn` command as its user runs it, against the real server."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from server_fixture import INN, Room, Server, fresh, plain_environment


@pytest.fixture
def name(innkeeper: Server) -> str:
    return fresh("cli")


def test_a_rooms_life(innkeeper: Server, name: str, driver: str) -> None:
    made = innkeeper.inn("room", "create", "base", name, "--json")
    assert made.returncode == 0, made.stderr
    instance = json.loads(made.stdout)["instance_id"]
    assert name in innkeeper.inn("room", "list").stdout
    shown = innkeeper.inn("room", "show", "base", name)
    assert shown.returncode == 0 and instance in shown.stdout
    for word in (driver, "ready", "STEP"):
        assert word in shown.stdout, word
    assert innkeeper.inn("room", "rm", "base", name).returncode == 0
    again = innkeeper.inn("room", "rm", "base", name)
    assert again.returncode == 1 and again.stderr.startswith("inn: ")
    assert name not in innkeeper.inn("room", "list").stdout


def test_run_passes_output_status_and_changes_on(innkeeper: Server, name: str) -> None:
    done = innkeeper.inn("run", "base", name, "-c", "echo out; echo err >&2; echo 1 > made.txt; exit 7")
    assert (done.returncode, done.stdout) == (7, "out\nerr\n"), done.stderr
    assert "created" in done.stderr and "/home/user/made.txt" in done.stderr
    quoted = innkeeper.inn("run", "base", name, "--no-changes", "--", "printf", "%s|", "two words", "$HOME", "*")
    assert (quoted.returncode, quoted.stdout, quoted.stderr) == (0, "two words|$HOME|*|", "")
    piped = innkeeper.inn("run", "base", name, "--", "wc", "-c", stdin="12345")
    assert piped.stdout.strip() == "5"
    extras = innkeeper.inn("run", "base", name, "--cwd", "/usr", "--env", "A=b", "-c", "pwd; echo $A")
    assert extras.stdout == "/usr\nb\n"
    assert innkeeper.inn("run", "base", name, "--timeout", "1", "--", "sleep", "60").returncode == 124
    as_json = innkeeper.inn("run", "base", name, "--json", "--", "false")
    assert as_json.returncode == 1 and json.loads(as_json.stdout)["status"] == "error"
    innkeeper.inn("room", "rm", "base", name)


def test_run_streams(innkeeper: Server, name: str) -> None:
    innkeeper.inn("room", "create", "base", name)
    process = subprocess.Popen(
        [INN, "run", "base", name, "-c", "echo first; sleep 60"],
        env={**plain_environment(), "INNKEEPER_HOME": str(innkeeper.home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"first\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and b"goes on in the room" in said
    assert innkeeper.inn("run", "base", name, "--", "pgrep", "-x", "sleep").returncode == 0
    innkeeper.inn("room", "rm", "base", name)


def test_cp_in_and_out(innkeeper: Server, name: str, tmp_path: Path) -> None:
    innkeeper.inn("room", "create", "base", name)
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "one.txt").write_text("1\n")
    (tree / "sub" / "zwei ü.bin").write_bytes(bytes(range(256)))
    into = innkeeper.inn("cp", str(tree), f"base/{name}:/home/user/tree")
    assert into.returncode == 0, into.stderr
    listed = innkeeper.inn("run", "base", name, "--no-changes", "-c", "cd tree && find . -type f | sort")
    assert listed.stdout == "./one.txt\n./sub/zwei ü.bin\n"
    out = innkeeper.inn("cp", f"base/{name}:/home/user/tree", str(tmp_path / "back"))
    assert out.returncode == 0, out.stderr
    assert (tmp_path / "back" / "sub" / "zwei ü.bin").read_bytes() == bytes(range(256))
    one = innkeeper.inn("cp", f"base/{name}:/home/user/tree/one.txt", str(tmp_path / "single"))
    assert one.returncode == 0 and (tmp_path / "single").read_text() == "1\n"
    missing = innkeeper.inn("cp", f"base/{name}:/nowhere", str(tmp_path / "x"))
    assert missing.returncode == 1 and "not found" in missing.stderr
    innkeeper.inn("room", "rm", "base", name)


def test_profiles_and_a_room_of_one(innkeeper: Server, name: str) -> None:
    made = innkeeper.inn(
        "profile", "create", name, "--image", "base", "--env", "GREETING=hello", "--memory-mb", "512", "--json"
    )
    assert made.returncode == 0, made.stderr
    assert innkeeper.inn("run", name, "r", "--no-changes", "-c", "echo $GREETING").stdout == "hello\n"
    busy = innkeeper.inn("profile", "delete", name)
    assert busy.returncode == 1 and "room" in busy.stderr
    innkeeper.inn("room", "rm", name, "r")
    assert innkeeper.inn("profile", "delete", name).returncode == 0


def test_a_token_over_http(innkeeper: Server, name: str) -> None:
    made = innkeeper.inn("token", "create", name, "--dialect", "instavm")
    token = made.stdout.strip()
    assert made.returncode == 0 and token.startswith("instavm_sk_")
    remote = {"INNKEEPER_URL": innkeeper.url, "INNKEEPER_TOKEN": token}
    assert innkeeper.inn("run", "base", name, "--no-changes", "--", "echo", "remote", **remote).stdout == "remote\n"
    innkeeper.inn("room", "rm", "base", name, **remote)
    assert innkeeper.inn("token", "revoke", name).returncode == 0
    ended = innkeeper.inn("room", "list", **remote)
    assert ended.returncode == 1 and "INNKEEPER_TOKEN" in ended.stderr


def test_what_there_is(innkeeper: Server, shared: Room) -> None:
    shared.create()
    images = json.loads(innkeeper.inn("image", "list", "--json").stdout)
    assert {image["name"]: image["status"] for image in images} == dict.fromkeys(
        ("base", "node", "python-data-science"), "ready"
    )
    (host,) = json.loads(innkeeper.inn("host", "list", "--json").stdout)
    assert host["reachable"] and host["machines"] >= 1 and host["leaked"] == 0
    assert innkeeper.inn("version").stdout.strip()
    events = json.loads(innkeeper.inn("audit", "--json").stdout)
    assert any(event["action"] == "room.create" for event in events)


def test_doctor_says_that_this_host_can(innkeeper: Server) -> None:
    done = innkeeper.inn("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("runsc", "cgroup", "freez", "nft", "KVM", "disk"):
        assert word.lower() in done.stdout.lower(), word
    broken = innkeeper.inn("doctor", INNKEEPER_RUNSC="/no/such/runsc")
    assert broken.returncode != 0 and "FIX" in broken.stdout + broken.stderr
    refused = subprocess.run(
        [INN, "serve", "--home", f"{innkeeper.home}-none", "--port", "1"],
        env={**plain_environment(), "INNKEEPER_RUNSC": "/no/such/runsc"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    shutil.rmtree(f"{innkeeper.home}-none")
    assert refused.returncode == 1 and "FIX" in refused.stderr


def test_without_a_server(innkeeper: Server, tmp_path: Path) -> None:
    for variables in (
        {"INNKEEPER_HOME": str(tmp_path)},
        {"INNKEEPER_URL": "http://127.0.0.1:1", "INNKEEPER_TOKEN": "x"},
    ):
        done = innkeeper.inn("room", "list", **variables)
        assert done.returncode not in (0, 1) and "is the server running?" in done.stderr
        assert "Traceback" not in done.stderr
