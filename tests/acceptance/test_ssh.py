"""The SSH gateway, by OpenSSH's own clients: commands, terminals, file transfers, forwarding, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from documented_steps import DOCS, run_steps, steps_of
from server_fixture import INN, Server, free_port, fresh, plain_environment, until

SECONDS = 60.0
UNKNOWN = "vm_" + "a" * 26


@dataclass
class Client:
    """OpenSSH with one key, at one server."""

    port: int
    key: Path
    vm: str
    log_level: str = "ERROR"

    def options(self) -> list[str]:
        options = ("IdentitiesOnly=yes", "BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", f"LogLevel={self.log_level}")  # fmt: skip
        return ["-F", "none", "-i", str(self.key), *(word for option in options for word in ("-o", option))]

    def argv(self, *words: str, user: str | None = None) -> list[str]:
        return ["ssh", "-p", str(self.port), *self.options(), "-l", user or self.vm, "127.0.0.1", *words]

    def run(self, *words: str, stdin: bytes = b"", user: str | None = None) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(self.argv(*words, user=user), input=stdin, capture_output=True, timeout=SECONDS)

    def output(self, command: str) -> str:
        ran = self.run(command)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.decode()

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.argv(*words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )


def make_key(folder: Path, name: str) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    return folder / name


def register(api: httpx2.Client, key: Path) -> int:
    answer = api.post("/v1/ssh-keys", json={"public_key": key.with_suffix(".pub").read_text()})
    assert answer.status_code == 200, answer.text
    return int(answer.json()["id"])


@pytest.fixture(scope="module")
def folder(innkeeper: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the keys for one server: each driver has one of its own."""
    return tmp_path_factory.mktemp("ssh")


@pytest.fixture(scope="module")
def client(innkeeper: Server, folder: Path) -> Iterator[Client]:
    api = innkeeper.client()
    number = register(api, make_key(folder, "id"))
    vm = made_vm(api)
    yield Client(int(innkeeper.settings["INNKEEPER_SSH_PORT"]), folder / "id", vm)
    api.delete(f"/v1/vms/{vm}")
    api.delete(f"/v1/ssh-keys/{number}")


def made_vm(api: httpx2.Client) -> str:
    answer = api.post("/v1/vms", json={"memory_mb": 512, "vm_lifetime_seconds": 3600}, params={"wait": "true"})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["vm_id"])


@pytest.mark.microvms
def test_a_commands_output_status_and_input(client: Client) -> None:
    ran = client.run("cat; echo wrong >&2; exit 7", stdin=b"abc\x00\xff")
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, b"abc\x00\xff", b"wrong\n")
    assert client.run("no-such-program").returncode == 127
    # Ended by a signal, which has no status: OpenSSH's client then says 255.
    assert client.run("kill -TERM $$").returncode == 255
    assert client.run(stdin=b"echo $((6 * 7)); tty").stdout == b"42\nnot a tty\n"


def test_every_byte_arrives(client: Client) -> None:
    """More than is kept of a command's output, and than any window takes."""
    content = os.urandom(1 << 20) * 24
    ran = client.run("cat", stdin=content)
    assert hashlib.sha256(ran.stdout).digest() == hashlib.sha256(content).digest()


@pytest.mark.microvms
def test_a_terminal_has_the_windows_size(client: Client) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 101, 0, 0))
    environment = {**plain_environment(), "TERM": "vt220", "LC_ALL": "C.UTF-8"}
    argv = ["setsid", "--ctty", *client.argv("-tt", "-o", "SendEnv=LC_*")]
    shell = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    try:
        seen = Screen(master)
        seen.type("echo $TERM-$LC_ALL-$(stty size | tr ' ' x)\n")
        seen.until("vt220-C.UTF-8-33x101")
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 90, 0, 0))
        os.kill(ssh_of(shell.pid), signal.SIGWINCH)
        seen.type("until stty size | grep '20 90'; do sleep 0.05; done; echo size-$((40 + 2)); sleep 1000\n")
        seen.until("size-42")
        # Ctrl-C ends the sleep, and the shell goes on.
        seen.type("\x03")
        assert end_of(shell, lambda: seen.type("exit 9\n")) == 9
    finally:
        shell.kill()
        shell.wait()
        os.close(master)


def end_of(shell: subprocess.Popen[bytes], ask: Callable[[], None]) -> int:
    """The exit code of a shell that is asked to end, and again: what is typed in the moment of a Ctrl-C, it throws away."""
    for _ in range(30):
        ask()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return shell.wait(2)
    raise AssertionError("the shell did not end")


def ssh_of(pid: int) -> int:
    """`setsid` becomes ssh, or its parent."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else pid


class Screen:
    """What a terminal shows."""

    def __init__(self, master: int) -> None:
        self.master = master
        self.seen = b""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, text: str) -> None:
        deadline = time.monotonic() + SECONDS
        while text.encode() not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 0.5)[0]:
                self.seen += os.read(self.master, 65_536)


@pytest.mark.parametrize("protocol", ["-O", "-s"])
def test_scp_both_ways(client: Client, folder: Path, protocol: str) -> None:
    """By the protocol of old, which InstaVM's command line uses, and by SFTP."""
    sent, back = folder / "sent", folder / f"back{protocol}"
    sent.write_bytes(os.urandom(3_000_001))
    sent.chmod(0o750)
    there = f"{client.vm}@127.0.0.1:/tmp/a file{protocol}"
    target = there.replace(" ", "\\ ") if protocol == "-O" else there
    scp = ["scp", protocol, "-q", "-p", "-P", str(client.port), *client.options()]
    for one, other in ((str(sent), target), (target, str(back))):
        ran = subprocess.run([*scp, one, other], capture_output=True, timeout=SECONDS)
        assert ran.returncode == 0, ran.stderr
    assert back.read_bytes() == sent.read_bytes()
    assert client.output(f"stat -c %a '/tmp/a file{protocol}'") == "750\n"
    assert back.stat().st_mtime == int(sent.stat().st_mtime)


@pytest.mark.microvms
def test_sftp(client: Client, folder: Path) -> None:
    (folder / "local").write_text("content")
    lines = [
        "mkdir work", f"put {folder}/local work/one", "rename work/one work/two", "chmod 600 work/two", "ln -s two work/link", "ls -l work",
        f"get work/link {folder}/fetched", "-rm work/none", "rm work/link", "rm work/two", "rmdir work", "-ls work", "-get /etc/shadow2",
    ]  # fmt: skip
    sftp = ["sftp", "-b", "-", "-P", str(client.port), *client.options(), f"{client.vm}@127.0.0.1"]
    ran = subprocess.run(sftp, input="\n".join(lines).encode(), capture_output=True, timeout=SECONDS)
    assert ran.returncode == 0, ran.stderr
    shown = ran.stdout.decode()
    assert "-rw-------" in shown and "lrwxrwxrwx" in shown and " 7 " in shown
    assert (folder / "fetched").read_text() == "content"


@pytest.mark.microvms
def test_a_port_of_the_guests_loopback_is_forwarded_and_nothing_else(client: Client, folder: Path) -> None:
    client.output("cd /tmp; setsid python3 -m http.server 8123 --bind 127.0.0.1 >/dev/null 2>&1 </dev/null & sleep 0")
    client.output("until curl -s -o /dev/null http://127.0.0.1:8123/; do sleep 0.05; done")
    near, closed, far, path = free_port(), free_port(), free_port(), folder / "s.sock"
    forwards = (f"{near}:localhost:8123", f"{closed}:127.0.0.1:8124", f"{far}:192.0.2.1:80", f"{path}:/run/other.sock")
    telling = dataclasses.replace(client, log_level="INFO")
    ssh = telling.start("-N", *(word for forward in forwards for word in ("-L", forward)))
    try:
        until(path.exists)
        assert "Directory listing" in httpx2.get(f"http://127.0.0.1:{near}/", timeout=SECONDS, trust_env=False).text
        for port in (closed, far):
            assert said_by(("127.0.0.1", port)) == b""
        assert said_by(str(path)) == b""
    finally:
        ssh.kill()
        _, errors = ssh.communicate(timeout=SECONDS)
    # Of the gateway's own network there is none: not even an address that would answer.
    assert b"open failed: administratively prohibited: Only ports of the VM's own loopback" in errors
    assert errors.count(b"open failed") == 3


def said_by(address: str | tuple[str, int]) -> bytes:
    """What a forwarded connection says until it ends."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as connection:
        connection.settimeout(SECONDS)
        connection.connect(address)
        with contextlib.suppress(ConnectionResetError):
            return connection.recv(100)
        return b""


def test_what_leads_into_the_client_or_the_gateway_is_refused(client: Client, folder: Path) -> None:
    for forward in (f"{free_port()}:localhost:1", f"/tmp/{fresh('remote')}.sock:localhost:1"):
        ran = client.run("-o", "ExitOnForwardFailure=yes", "-R", forward, "echo in")
        assert (ran.returncode, ran.stdout) == (255, b"") and b"remote port forwarding failed" in ran.stderr
    agent = subprocess.run(["ssh-agent", "-s"], capture_output=True, text=True, check=True).stdout
    variables = dict(word.split("=", 1) for word in agent.replace(";", "\n").split() if "=" in word)
    try:
        ran = subprocess.run(
            client.argv("-A", "-X", "echo [$SSH_AUTH_SOCK][$DISPLAY]; ls -d /tmp/ssh-* /tmp/.X11-unix; true"),
            env={**os.environ, **variables, "DISPLAY": ":77"},
            capture_output=True,
            timeout=SECONDS,
        )
    finally:
        os.kill(int(variables["SSH_AGENT_PID"]), signal.SIGTERM)
    assert (ran.returncode, ran.stdout) == (0, b"[][]\n")


def test_a_stranger_learns_nothing(innkeeper: Server, client: Client, folder: Path) -> None:
    """A VM that never was, another organization's, and a key of nobody's: the same words."""
    name = fresh("other")
    assert innkeeper.inn("organization", "create", name).returncode == 0
    made = innkeeper.inn("token", "create", "t", "--organization", name)
    assert made.returncode == 0, made.stderr
    other = Client(client.port, make_key(folder, "other"), client.vm)
    stranger = Client(client.port, make_key(folder, "stranger"), client.vm)
    register(innkeeper.client(made.stdout.strip().splitlines()[-1]), other.key)
    said = set()
    for who, vm in (
        (client, UNKNOWN),
        (other, client.vm),
        (stranger, client.vm),
        (stranger, UNKNOWN),
        (client, "root"),
    ):
        ran = who.run("true", user=vm)
        said.add((ran.returncode, ran.stdout, ran.stderr.replace(vm.encode(), b"VM")))
    assert said == {(255, b"", b"VM@127.0.0.1: Permission denied (publickey).\r\n")}


def test_a_connection_ends_with_its_key_its_vm_and_its_client(innkeeper: Server, client: Client, folder: Path) -> None:
    api = innkeeper.client()
    mine = Client(client.port, make_key(folder, "short"), made_vm(api))
    number = register(api, mine.key)
    # A client that goes away takes its program along.
    gone = mine.start("echo begun; sleep 1234")
    assert gone.stdout is not None and gone.stdout.readline() == b"begun\n"
    gone.kill()
    gone.communicate()
    until(lambda: mine.output("pgrep -fc '[s]leep 1234' || true") == "0\n")
    first = mine.start("echo begun; sleep 1000")
    assert first.stdout is not None and first.stdout.readline() == b"begun\n"
    assert api.delete(f"/v1/ssh-keys/{number}").status_code == 200
    assert first.wait(SECONDS) == 255
    first.communicate()
    assert mine.run("true").returncode == 255
    again = register(api, mine.key)
    second = mine.start("echo begun; sleep 1000")
    assert second.stdout is not None and second.stdout.readline() == b"begun\n"
    assert api.delete(f"/v1/vms/{mine.vm}").status_code == 200
    assert second.wait(SECONDS) == 255
    second.communicate()
    told = api.get("/v1/audit/events", params={"event_type": "ssh.login", "limit": 50}).json()["items"]
    assert {row["vm_id"] for row in told} >= {mine.vm, client.vm}
    assert all(row["actor_type"] == "ssh_key" and row["event_payload"]["address"] == "127.0.0.1" for row in told)
    api.delete(f"/v1/ssh-keys/{again}")


@pytest.mark.microvms
def test_it_wakes_a_suspended_vm_and_only_one_that_may_be_woken(innkeeper: Server, client: Client) -> None:
    api = innkeeper.client()
    mine = Client(client.port, client.key, made_vm(api))
    assert mine.output("sleep 4321 > /dev/null 2>&1 & echo kept > /dev/shm/memory") == ""
    assert api.post(f"/v1/vms/{mine.vm}/suspend").json()["status"] == "suspended"
    assert mine.output("cat /dev/shm/memory; pgrep -fc '[s]leep 4321'") == "kept\n1\n"
    found = api.get(f"/v1/vms/{mine.vm}").json()
    assert found["status"] == "active" and found["woken_by"].startswith("ssh_key:"), found
    assert api.patch(f"/v1/vms/{mine.vm}", json={"auto_resume": False}).status_code == 200
    assert api.post(f"/v1/vms/{mine.vm}/suspend").json()["status"] == "suspended"
    assert mine.run("true").returncode == 255
    assert api.get(f"/v1/vms/{mine.vm}").json()["status"] == "suspended"
    api.delete(f"/v1/vms/{mine.vm}")


def test_no_command_is_in_the_log(innkeeper: Server, client: Client) -> None:
    secret = fresh("secret")
    assert client.output(f"echo {secret}") == f"{secret}\n"
    assert secret not in innkeeper.log()


def test_inn_ssh(innkeeper: Server, client: Client) -> None:
    environment = {**plain_environment(), "INNKEEPER_HOME": str(innkeeper.home)}
    argv = [INN, "ssh", client.vm, "--", "-F", "none", "-o", "BatchMode=yes", "-i", str(client.key), "echo in; exit 5"]
    ran = subprocess.run(argv, env=environment, capture_output=True, stdin=subprocess.DEVNULL, timeout=SECONDS)
    assert (ran.returncode, ran.stdout) == (5, b"in\n"), ran.stderr
    line = innkeeper.inn("ssh", "--known-hosts").stdout
    told = innkeeper.client().get("/v1/ssh").json()
    assert line == f"[127.0.0.1]:{client.port} {told['host_key']}\n"
    key = innkeeper.home / "api" / "ssh-host-key"
    assert key.stat().st_mode & 0o777 == 0o600


def test_the_page(innkeeper: Server, tmp_path: Path) -> None:
    steps = steps_of(DOCS / "ssh.md")
    printed = run_steps(steps, innkeeper, tmp_path)
    for step, said in zip(steps, printed, strict=True):
        assert step.fits(said), f"{step.commands}\n-- the page says\n{step.printed}\n-- it prints\n{said}"
