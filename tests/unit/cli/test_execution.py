"""`inn exec` and `inn py`: what they ask for, what they write where, how they end, and what Ctrl-C does."""

import json
import signal
import subprocess
import sys
import time

import pytest
from scripted_server import EXECUTION, INSTANCE, VM

STREAM = f"/v1/executions/{EXECUTION}/stream"


def asked(server):
    """The request that began it."""
    return server.seen[0].json


def command(server, *argv):
    code = "from innkeeper.cli.main import main; main()"
    env = {"INNKEEPER_HOME": str(server.socket.parent.parent), "PATH": "/usr/bin:/bin"}
    return {"args": [sys.executable, "-c", code, *argv], "env": env}


def piped(server, *argv, **options):
    return subprocess.run(**command(server, *argv), capture_output=True, timeout=60, check=False, **options)


def test_a_program_and_its_outputs(inn, server):
    server.output, server.errors, server.exit_code = ["one\n", "two\n"], ["wrong\n"], 7
    ended = inn("exec", VM, "--", "ls", "-la", "a b")
    assert (ended.status, ended.out, ended.err) == (7, "one\ntwo\n", "wrong\n")
    assert server.seen[0].path == f"/v1/vms/{VM}/exec"
    assert asked(server) == {"argv": ["ls", "-la", "a b"], "timeout": 60, "background": True}
    assert [one.path for one in server.seen[1:]] == [STREAM]


def test_a_shell_line_with_options(inn, server, monkeypatch):
    monkeypatch.setenv("FROM_HERE", "v")
    options = ("--timeout", "5", "--user", "nobody", "--cwd", "/w", "--env", "A=1", "--env", "FROM_HERE")
    assert inn("exec", VM, "-c", "echo $A | cat", *options).status == 0
    assert asked(server) == {
        "command": "echo $A | cat", "timeout": 5, "user": "nobody", "cwd": "/w", "env": {"A": "1", "FROM_HERE": "v"}, "background": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    "argv",
    [
        ("exec", VM), ("exec", VM, "-c", "x", "--", "y"), ("exec", VM, "--env", "NOT_SET_ANYWHERE", "--", "x"), ("py",),
        ("py", VM, "--session", "s"), ("py", VM, "-c", "1", "--file", "f"), ("py", VM, "--file", "/no/such/file"),
    ],
)  # fmt: skip
def test_incomplete_command_lines(inn, server, argv):
    assert inn(*argv).status == 2
    assert server.seen == []


def test_in_the_background(inn, server):
    assert inn("exec", VM, "--background", "--", "sleep", "9").out == f"{EXECUTION}\n"
    assert len(server.seen) == 1
    assert json.loads(inn("exec", VM, "--background", "--json", "--", "true").out)["execution_id"] == EXECUTION


def test_json_is_the_servers_answer(inn, server):
    server.output, server.exit_code = ["x"], 300
    ended = inn("exec", VM, "--json", "--", "true")
    assert (ended.status, json.loads(ended.out)["stdout"]) == (300 & 0xFF, "x")
    assert "background" not in asked(server)


def test_standard_input(server):
    server.output = ["ok"]
    ended = piped(server, "exec", VM, "--", "cat", input="h\u00e9\n".encode())
    assert (ended.returncode, ended.stdout, asked(server)["stdin"]) == (0, b"ok", "h\u00e9\n")
    for argv, options in (
        (("--no-stdin",), {"input": b"x"}),
        ((), {"stdin": subprocess.DEVNULL}),
    ):
        server.seen.clear()
        assert piped(server, "exec", VM, *argv, "--", "cat", **options).returncode == 0
        assert "stdin" not in asked(server)
    server.seen.clear()
    ended = piped(server, "exec", VM, "--", "cat", input=b"\xff")
    assert ended.returncode == 2 and b"inn cp" in ended.stderr and server.seen == []


def test_ends_without_a_result(inn, server):
    server.output, server.cut = ["half"], True
    ended = inn("exec", VM, "--", "true")
    assert (ended.status, ended.out) == (1, "half")
    assert "without a result" in ended.err and EXECUTION in ended.err
    server.cut, server.lost = False, "The guest was started again"
    ended = inn("exec", VM, "--", "true")
    assert (ended.status, ended.err) == (1, "inn: The guest was started again\n")
    server.lost, server.error_event = None, ("service_unavailable", "The host is away")
    ended = inn("py", VM, "-c", "1")
    assert (ended.status, ended.err) == (1, "inn: The host is away\n")


def test_what_ended_it_is_said(inn, server):
    server.exit_code, server.timed_out = 124, True
    ended = inn("exec", VM, "--timeout", "1", "--", "sleep", "9")
    assert (ended.status, ended.err) == (124, "inn: it was stopped at its time limit (--timeout)\n")
    server.exit_code, server.timed_out, server.kernel = 137, False, {"fresh": False, "lost": True}
    ended = inn("py", VM, "-c", "1")
    assert (ended.status, ended.err) == (137, "inn: the interpreter ended, and what it held is gone\n")
    # A program may end so by itself.
    server.exit_code, server.kernel = 124, None
    ended = inn("exec", VM, "--", "true")
    assert (ended.status, ended.err) == (124, "")


def test_python_by_vm_or_session(inn, server, tmp_path):
    server.output, server.exit_code = ["42\n"], 1
    ended = inn("py", VM, "-c", "6 * 7")
    assert (ended.status, ended.out, server.seen[0].path) == (1, "42\n", "/execute_async")
    assert asked(server) == {"vm_id": VM, "code": "6 * 7", "timeout": 600}
    server.seen.clear()
    (tmp_path / "cell.py").write_text("x = 1\n")
    inn("py", "--session", str(INSTANCE), "--file", str(tmp_path / "cell.py"), "--timeout", "3")
    assert asked(server) == {"session_id": str(INSTANCE), "code": "x = 1\n", "timeout": 3}
    server.seen.clear()
    assert piped(server, "py", VM, input=b"y = 2\n").returncode == 1
    assert asked(server)["code"] == "y = 2\n"


@pytest.mark.parametrize("argv", [("exec", VM, "--no-stdin", "--", "sleep", "9"), ("py", VM, "-c", "x")])
def test_ctrl_c_interrupts_it_and_what_was_seen_is_not_written_again(server, argv):
    server.output, server.exit_code, server.ends_after_signals = ["begun\n"], 130, 1
    running = begun(server, *argv)
    running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=60) == ("", "")
    assert running.returncode == 130
    _, stream, interrupt, again = server.seen
    assert (interrupt.path, interrupt.json) == (f"/v1/executions/{EXECUTION}/signal", {"signal": "INT"})
    assert (stream.headers["last-event-id"], again.headers["last-event-id"]) == ("0", "1")


def test_a_second_ctrl_c_leaves_it_alone(server):
    server.output, server.ends_after_signals = ["begun\n"], 2
    running = begun(server, "exec", VM, "--no-stdin", "--", "sleep", "9")
    running.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 60
    while len(server.seen) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and EXECUTION in errors
    assert sum(one.path.endswith("/signal") for one in server.seen) == 1
    server.ends_after_signals = 0


def begun(server, *argv):
    """The command in a process of its own, which has written what there is so far."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = subprocess.Popen(**command(server, *argv), **pipes, text=True)
    assert running.stdout.readline() == "begun\n"
    return running
