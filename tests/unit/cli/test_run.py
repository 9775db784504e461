import json
import subprocess
import sys

import pytest

from innkeeper.api.dialects.gentility.schemas import FileChange


def test_output_status_and_changes(inn, server):
    server.output = ["one\n", "t\N{LINE SEPARATOR}wo\n"]
    server.exit_code = 3
    server.changes = [
        FileChange(path="/tmp/a\x1b[2J\nb", status="created", size=1234, mime_type="text/plain", public_url="/x"),
        FileChange(path="/tmp/old", status="deleted", size=0, mime_type=None, public_url=None),
    ]
    server.changes_total = 5
    ended = inn("run", "base", "r", "--", "ls", "-la", "a b")
    assert ended.status == 3
    assert ended.out == "one\nt\N{LINE SEPARATOR}wo\n"
    lines = ended.err.splitlines()
    assert lines[0] == "created  /tmp/a\\x1b[2J\\nb  (1.2 kB)" and lines[1] == "deleted  /tmp/old"
    assert "3 more" in lines[2]
    assert server.seen[-1].json == {"command": "ls -la 'a b'"}


def test_a_shell_line_with_options(inn, server, monkeypatch):
    monkeypatch.setenv("FROM_HERE", "v")
    ended = inn(
        "run",
        "base",
        "r",
        "-c",
        "echo $A | cat",
        "--timeout",
        "5",
        "--cwd",
        "/w",
        "--env",
        "A=1",
        "--env",
        "FROM_HERE",
        "--no-changes",
    )
    assert (ended.status, ended.err) == (0, "")
    assert server.seen[-1].json == {
        "command": "echo $A | cat",
        "timeout": 5,
        "cwd": "/w",
        "env": {"A": "1", "FROM_HERE": "v"},
    }


@pytest.mark.parametrize("argv", [("base", "r"), ("base", "r", "-c", "x", "--", "y")])
def test_exactly_one_command(inn, server, argv):
    assert inn("run", *argv).status == 2
    assert server.seen == []


def test_json_is_the_servers_answer(inn, server):
    server.output, server.exit_code = ["x"], 4
    ended = inn("run", "base", "r", "--json", "--", "true")
    assert ended.status == 4
    assert json.loads(ended.out)["result"]["output"] == "x"


def test_an_error_event_is_the_servers_message(inn, server):
    server.error_event = ("instance_failed", "The instance failed.")
    ended = inn("run", "base", "r", "--", "true")
    assert (ended.status, ended.err) == (1, "inn: The instance failed.\n")


def test_a_stream_without_a_result_is_no_success(inn, server):
    server.output, server.cut = ["half"], True
    ended = inn("run", "base", "r", "--", "true")
    assert (ended.status, ended.out) == (1, "half")
    assert "without a result" in ended.err and "execution" in ended.err


def _subprocess(server, *argv: str, **options) -> subprocess.CompletedProcess[bytes]:
    code = "from innkeeper.cli.main import main; main()"
    env = {"INNKEEPER_HOME": str(server.socket.parent.parent), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, "-c", code, *argv], env=env, capture_output=True, timeout=20, check=False, **options
    )


def test_piped_stdin_is_passed_on(server):
    server.output = ["ok"]
    ended = _subprocess(server, "run", "base", "r", "--", "cat", input="h\u00e9\n".encode())
    assert (ended.returncode, ended.stdout) == (0, b"ok")
    assert server.seen[-1].json["stdin"] == "h\u00e9\n"


def test_no_stdin_and_devnull_are_not_passed_on(server):
    assert _subprocess(server, "run", "base", "r", "--no-stdin", "--", "cat", input=b"x").returncode == 0
    assert "stdin" not in server.seen[-1].json
    assert _subprocess(server, "run", "base", "r", "--", "cat", stdin=subprocess.DEVNULL).returncode == 0
    assert "stdin" not in server.seen[-1].json


def test_stdin_that_is_not_text_is_refused(server):
    ended = _subprocess(server, "run", "base", "r", "--", "cat", input=b"\xff")
    assert ended.returncode == 2 and b"inn cp" in ended.stderr
    assert server.seen == []
