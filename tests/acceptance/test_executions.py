"""Code and programs in VMs and sessions, with the real InstaVM client, the `inn` command and plain HTTP."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator

import pytest
from instavm_client import Instavm
from server_fixture import INN, Server, plain_environment, until

pytestmark = pytest.mark.microvms


@pytest.fixture(scope="module")
def vm(innkeeper: Server) -> Iterator[dict[str, str]]:
    """A VM, for tests that leave nothing behind."""
    with innkeeper.client() as client:
        made = client.post("/v1/vms", json={}).json()
        yield made
        client.delete(f"/v1/vms/{made['vm_id']}")


def test_the_instavm_client_runs_code(instavm: Instavm) -> None:
    program = """
vm = client
vm.start_session()
first = vm.execute("x = 20")
second = vm.execute("import sys; print('err', file=sys.stderr); x + 1")
shell = vm.execute("echo $0; exit 3", language="bash", timeout=20)
wrong = vm.execute("1/0")
limited = vm.execute("while True: pass", timeout=2)
kept = vm.execute("x")
task = vm.execute_async("import time; time.sleep(1); print('later', x)")
result = vm.get_task_result(task["task_id"], timeout=60)
answer = [first, second, shell, wrong, limited, kept, result]
vm.kill()
"""
    first, second, shell, wrong, limited, kept, result = instavm.sdk(program)
    assert (first["stdout"], first["exit_code"], first["kernel"]["fresh"]) == ("", 0, True)
    assert (second["stdout"], second["stderr"], second["kernel"]["fresh"]) == ("21\n", "err\n", False)
    assert (shell["stdout"], shell["exit_code"]) == ("bash\n", 3)
    assert (wrong["exit_code"], wrong["stderr"].splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")
    assert (limited["exit_code"], limited["timed_out"], limited["kernel"]["lost"]) == (124, True, False)
    assert kept["stdout"] == "20\n"
    assert (result["stdout"], result["stderr"]) == ("later 20\n", "")
    assert result["execution_time"] >= 1 and result["cpu_time"] is not None and result["created_at"]


def test_staged_variables_reach_every_program_that_begins_after(innkeeper: Server, instavm: Instavm) -> None:
    program = """
client.start_session()
vm = client.vms.create(wait=True, session_id=client.session_id)["vm_id"]
before = client.execute("import os, subprocess; print(os.environ.get('STAGED'))")
client.vms.stage_env(vm, {"STAGED": "it's \\u00e4 value"})
answer = [vm, before] + [client.execute(*words) for words in (
    ("print(os.environ['STAGED'], subprocess.getoutput('echo $STAGED'))",), ("echo $STAGED", "bash"))]
"""
    vm, before, *after = instavm.sdk(program)
    try:
        assert before["stdout"] == "None\n"
        assert [one["stdout"] for one in after] == ["it's ä value it's ä value\n", "it's ä value\n"]
        assert innkeeper.inn("exec", vm, "--", "printenv", "STAGED").stdout == "it's ä value\n"
        assert "it's ä value" in innkeeper.inn("terminal", vm, "-c", "echo $STAGED").stdout
    finally:
        instavm.sdk("client.vms.delete(words[0])", vm)


def test_the_instavm_command_line_runs_code(instavm: Instavm) -> None:
    assert instavm.json("exec", "--cmd", "print(6 * 7)")["stdout"] == "42\n"


def test_inn_exec(innkeeper: Server, vm: dict[str, str]) -> None:
    done = innkeeper.inn("exec", vm["vm_id"], "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")
    assert innkeeper.inn("exec", vm["vm_id"], "--", "cat", stdin="typed\n").stdout == "typed\n"
    assert innkeeper.inn("exec", vm["vm_id"], "--user", "nobody", "-c", "id -un").stdout == "nobody\n"
    missing = innkeeper.inn("exec", vm["vm_id"], "--", "no-such-program")
    assert missing.returncode == 1 and "no-such-program" in missing.stderr
    identity = innkeeper.inn("exec", vm["vm_id"], "--background", "-c", "sleep 0.3; echo done").stdout.strip()
    with innkeeper.client() as client:
        until(lambda: client.get(f"/v1/executions/{identity}").json()["is_complete"])
        assert client.get(f"/v1/executions/{identity}").json()["serialized_stdout"] == "done\n"


def test_inn_py(innkeeper: Server, vm: dict[str, str]) -> None:
    assert innkeeper.inn("py", vm["vm_id"], "-c", "names = ['a', 'b']").returncode == 0
    assert innkeeper.inn("py", "--session", vm["session_id"], stdin="len(names)\n").stdout == "2\n"
    wrong = innkeeper.inn("py", vm["vm_id"], "-c", "1/0")
    assert wrong.returncode == 1 and wrong.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_ctrl_c_interrupts_what_runs(innkeeper: Server, vm: dict[str, str]) -> None:
    code = "import time\nkept = 1\nprint('begun')\ntime.sleep(100)"
    running = subprocess.Popen(
        [INN, "py", vm["vm_id"], "-c", code],
        env={**plain_environment(), "INNKEEPER_HOME": str(innkeeper.home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "begun\n"
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and "KeyboardInterrupt" in errors
    assert innkeeper.inn("py", vm["vm_id"], "-c", "kept").stdout == "1\n"
