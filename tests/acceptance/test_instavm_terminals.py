"""The `instavm` package, unmodified, at terminals of a real server: its SDK, and `instavm pty` typed at a real pseudo terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator

import pytest
from instavm_client import CLIENTS, Instavm

pytestmark = pytest.mark.microvms
SECONDS = 60.0
LIFE = """
vm = words[0]
made = client.pty.create_for_vm(vm, cols=100, rows=30, pty_id="mine")
listed = client.pty.list_for_vm(vm)
resized = client.pty.resize_for_vm(vm, made["session_id"], 90, 20)
from websockets.sync.client import connect
with connect(client.pty.ws_url_for_vm(vm, "mine")) as socket:
    socket.send(b"stty size; exit 6\\n")
    seen, said = b"", []
    for message in socket:
        if isinstance(message, bytes):
            seen += message
        else:
            said.append(json.loads(message))
ended = client.pty.get_for_vm(vm, "mine")
client.pty.kill_for_vm(vm, "mine")
answer = [made["session_id"], [row["id"] for row in listed], resized["cols"], b"20 90" in seen, said, ended["alive"], ended["exit_code"]]
"""
SESSION = """
session = client.start_session() or client.session_id
made = client.pty.create(session, login_command="export A=b && echo $A-c; cat")
from websockets.sync.client import connect
with connect(client.pty.ws_url(session, made["session_id"])) as socket:
    seen = b""
    while b"b-c" not in seen:
        seen += socket.recv(timeout=60)
client.pty.kill(session, made["session_id"])
answer = [row["id"] for row in client.pty.list(session)]
"""


@pytest.fixture(scope="module")
def vm(instavm: Instavm) -> Iterator[str]:
    made = instavm.sdk("answer = client.vms.create(wait=True, memory_mb=512)['vm_id']")
    yield str(made)
    instavm.sdk("client.vms.delete(words[0])", made)


def test_the_sdk(instavm: Instavm, vm: str) -> None:
    assert instavm.sdk(LIFE, vm) == ["mine", ["mine"], 90, True, [{"type": "exit", "exit_code": 6}], False, 6]
    assert instavm.sdk(SESSION) == []


def test_the_command_line_at_a_terminal(instavm: Instavm, vm: str) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 31, 99, 0, 0))
    process = subprocess.Popen(
        [CLIENTS / "instavm", "pty", vm], stdin=slave, stdout=slave, stderr=slave, env=instavm.environment()
    )
    seen, deadline = b"", time.monotonic() + SECONDS

    def until(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            assert time.monotonic() < deadline, seen[-2_000:]
            if select.select([master], [], [], 0.2)[0]:
                seen += os.read(master, 65_536)

    try:
        until(b"# ")
        os.write(master, b"stty size; echo over-$((1+1))\r")
        until(b"over-2")
        assert b"31 99" in seen
        os.write(master, b"exit 4\r")
        while process.poll() is None:
            assert time.monotonic() < deadline, seen[-2_000:]
            if select.select([master], [], [], 0.05)[0]:
                seen += os.read(master, 65_536)
        assert process.returncode == 4
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)
    assert instavm.sdk("answer = client.pty.list_for_vm(words[0])", vm) == []


def test_a_key_that_is_not_known(instavm: Instavm, vm: str) -> None:
    script = """
from websockets.sync.client import connect
with connect(client.pty.ws_url_for_vm(words[0], "x").replace(client.api_key, "nobody")) as socket:
    for message in socket:
        pass
answer = None
"""
    with pytest.raises(AssertionError, match="4401"):
        instavm.sdk(script, vm)
