"""A real `inn serve` in a state directory of its own, and the rooms of it as tests talk to them: over HTTP, as any client does."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID, uuid4

import httpx2
from image_fixture import put_into
from tests import guest_drivers
from tests.guest_kernel import put_kernel

from innkeeper.core.vm import parse_vm_id
from innkeeper.host.linux import loop_device, mounts, netns
from innkeeper.settings import Settings

INN = Path(sys.executable).with_name("inn")
READY = "Innkeeper is ready"
START_SECONDS = 120
STOP_SECONDS = 60
PATIENCE_SECONDS = 60
CONTROL_GROUPS = Path("/sys/fs/cgroup")


@dataclass
class Server:
    """One state directory and the server that runs on it, now or again."""

    home: Path
    port: int
    settings: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    clients: list[httpx2.Client] = field(default_factory=list)

    # --- its life --------------------------------------------------------------------------------------------------

    @property
    def log_path(self) -> Path:
        return self.home.with_name(self.home.name + ".log")

    @property
    def server_id(self) -> str:
        return Settings(home=self.home).server_id

    def start(self, **settings: str) -> None:
        """Start it as a user does, and wait until it says that it is ready."""
        self.settings |= settings
        before = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [INN, "serve", "--home", self.home, "--port", str(self.port)],
                env={**plain_environment(), **self.settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_SECONDS
        while READY not in (said := self.log_path.read_bytes()[before:].decode("utf-8", "replace")):
            assert self.process.poll() is None, f"inn serve ended with {self.process.returncode}:\n{said}"
            assert time.monotonic() < deadline, f"inn serve is not ready:\n{said}"
            time.sleep(0.02)

    def stop(self) -> int:
        """SIGTERM, as Ctrl-C or systemd; its exit status."""
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGTERM)
        return self._gone()

    def kill(self) -> None:
        """`kill -9` of the daemon; the API process goes with it."""
        assert self.process is not None
        api = self.api_pid()
        self.process.kill()
        self._gone()
        until(lambda: ended(api))

    def died(self) -> None:
        """Take note that somebody killed the daemon; the API process may still be on its way out."""
        self._gone()

    def _gone(self) -> int:
        assert self.process is not None
        status = self.process.wait(STOP_SECONDS)
        self.process = None
        for client in self.clients:
            client.close()
        self.clients.clear()
        return status

    def api_pid(self) -> int:
        """The API process: the daemon's only child that runs the API's module."""
        assert self.process is not None
        found = [pid for pid in children(self.process.pid) if b"innkeeper.launch_api" in command_line(pid)]
        assert len(found) == 1, found
        return found[0]

    def sandbox_pids(self, machine_id: str) -> list[int]:
        """The processes of one guest: its sandbox and its gofer, or its QEMU."""
        needle, programs = machine_id.encode(), (b"runsc", b"qemu")
        lines = {pid: command_line(pid) for pid in all_pids()}
        return [pid for pid, line in lines.items() if needle in line and any(program in line for program in programs)]

    def kill_sandbox(self, machine_id: str) -> None:
        """`kill -9` of all processes of one guest; the first one's end may be the others'."""
        pids = self.sandbox_pids(machine_id)
        assert pids, f"no sandbox of {machine_id}"
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: all(ended(pid) for pid in pids))

    def machine_of(self, instance_id: str) -> str:
        """The machine's id on the host, by the room's instance id as /v1 shows it."""
        return self._machine(self.internal_id(instance_id))

    def machine_of_vm(self, name: str) -> str:
        """The machine's id on the host, by a VM's id."""
        parsed = parse_vm_id(name)
        assert parsed is not None, name
        return self._machine(str(parsed[0]))

    def _machine(self, internal: str) -> str:
        for record in (self.home / "host" / "machines").glob("*/*.json"):
            text = record.read_text()
            if internal in text and json.loads(text).get("instance_id") == internal:
                return record.parent.name
        raise AssertionError(f"no machine of {internal}")

    def internal_id(self, instance_id: str) -> str:
        """The id that only the server knows: the public one is derivable from nothing."""

        with contextlib.closing(sqlite3.connect(self.home / "api" / "innkeeper.db")) as database:
            query = "select id from instances where public_id = ?"
            ((found,),) = database.execute(query, (UUID(instance_id).hex,)).fetchall()
        return str(UUID(found))

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    # --- talking to it ---------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        """The token that the first start left in the state directory."""
        return (self.home / "first-token").read_text().strip()

    def client(self, token: str | None = "", *, timeout_seconds: float = 150, **headers: str) -> httpx2.Client:
        """A client with a token ("": the first one; None: without)."""
        if token is not None:
            headers["Authorization"] = f"Bearer {token or self.token}"
        limits = httpx2.Limits(max_connections=100)
        client = httpx2.Client(
            base_url=self.url, headers=headers, timeout=timeout_seconds, limits=limits, trust_env=False
        )
        self.clients.append(client)
        return client

    def inn(self, *argv: str, stdin: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        """The `inn` command as its operator runs it, over the unix socket."""
        return subprocess.run(
            [INN, *argv],
            env={**plain_environment(), "INNKEEPER_HOME": str(self.home), **variables},
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def api(self) -> Api:
        return Api(self.client())


@dataclass
class Api:
    """The API with one token."""

    client: httpx2.Client

    def profile(self, name: str) -> str:
        """The id of a profile by its name."""
        profiles = self.client.get("/api/profiles").json()
        return next(str(profile["id"]) for profile in profiles if profile["name"] == name)

    def make_profile(self, image: str = "base", **fields: Any) -> str:
        """A new profile without a warm pool, unless `fields` say otherwise; its id."""
        body = {"name": fresh("p"), "image": image, "warm_pool_size": 0, "memory_mb": 512, **fields}
        answer = self.client.post("/api/profiles", json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def room(self, profile_id: str, room_id: str | None = None) -> Room:
        """A room that may or may not exist."""
        return Room(self.client, profile_id, room_id or fresh("room"))


@dataclass
class Room:
    """A room by its address."""

    client: httpx2.Client
    profile_id: str
    room_id: str

    @property
    def path(self) -> str:
        return f"/api/profile/{self.profile_id}/room/{quote(self.room_id, safe='')}"

    def create(self, **body: Any) -> dict[str, Any]:
        """Get or create it: the whole answer."""
        answer = self.client.post(self.path, json=body or None)
        assert answer.status_code == 200, answer.text
        made: dict[str, Any] = answer.json()
        return made

    def post(self, command: str, **extras: Any) -> httpx2.Response:
        return self.client.post(f"{self.path}/command", json={"command": command, **extras})

    def run(self, command: str, **extras: Any) -> dict[str, Any]:
        """Run a command and give the whole answer; whatever it did, the HTTP status is 200."""
        answer = self.post(command, **extras)
        assert answer.status_code == 200, answer.text
        said: dict[str, Any] = answer.json()
        return said

    def output(self, command: str, **extras: Any) -> str:
        """The output of a command that has to succeed."""
        answer = self.run(command, **extras)
        assert answer["result"]["exit_code"] == 0, answer
        return str(answer["result"]["output"])

    def changes(self, command: str, **extras: Any) -> dict[str, str]:
        """{path: status} of what a command that has to succeed changed."""
        answer = self.run(command, **extras)
        assert answer["result"]["exit_code"] == 0, answer
        return {row["path"]: row["status"] for row in answer["result"]["files_changed"]}

    def file(self, path: str, **params: Any) -> httpx2.Response:
        return self.client.get(f"{self.path}/file{quote(path)}", params=params)

    def put(self, path: str, content: bytes) -> httpx2.Response:
        return self.client.put(f"{self.path}/file{quote(path)}", content=content)

    def delete(self) -> httpx2.Response:
        return self.client.delete(self.path)


@contextlib.contextmanager
def server(*images: str, driver: str = guest_drivers.GVISOR, **settings: str) -> Iterator[Server]:
    """A server with these shipped images whose guests run with that driver, in a directory with a short path. Nothing of it is left afterwards."""
    home = Path(tempfile.mkdtemp(prefix="ika", dir="/var/tmp"))
    put_into(home / "host", *images)
    if driver == guest_drivers.QEMU:
        put_kernel(home / "host")
    (home / "host").chmod(0o700)
    home.chmod(0o755)
    running = Server(
        home,
        free_port(),
        {
            "INNKEEPER_IMAGES": ",".join(images),
            "INNKEEPER_KEEP_MACHINES": "false",
            "INNKEEPER_POOL_DISK_MB": "20480",
            **guest_drivers.SETTINGS[driver],
            **settings,
        },
    )
    try:
        running.start()
        yield running
    finally:
        if running.process is not None:
            running.stop()
        left = leftovers(running)
        shutil.rmtree(home, ignore_errors=True)
    assert left == [], f"the server left behind: {left}"
    running.log_path.unlink(missing_ok=True)


def leftovers(stopped: Server) -> list[str]:
    """What a stopped server should have taken with it, after a moment for copies of mounts in other programs' namespaces."""

    def look() -> list[str]:
        found = [f"mount {target}" for target in mounts.mounts_under(stopped.home)]
        found += [f"loop device {device}" for device in loop_device.devices_backed_by(stopped.home)]
        found += [f"netns {name}" for name in netns.names(f"ik{stopped.server_id}")]
        # Not glob: it fails when a group of somebody else goes meanwhile.
        groups = (name for _, names, _ in os.walk(CONTROL_GROUPS) for name in names)
        found += [name for name in groups if name.startswith(f"innkeeper-{stopped.server_id}")]
        found += [f"process {pid}" for pid in all_pids() if os.fsencode(stopped.home) in command_line(pid)]
        tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True).stdout
        return [*found, *(["nft table"] if stopped.server_id in tables else [])]

    with contextlib.suppress(AssertionError):
        until(lambda: not look())
    return look()


def plain_environment() -> dict[str, str]:
    """What a login of root has, and none of the settings of whoever runs the tests."""
    return {"PATH": os.environ["PATH"], "HOME": "/root", "LANG": "C.UTF-8"}


def ended(pid: int) -> bool:
    """Whether a process is gone. A zombie is: tests in this process may have made it a subreaper, which then has the orphans to collect."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(true: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def fresh(prefix: str) -> str:
    """A name that nobody else uses."""
    return f"{prefix}-{uuid4().hex[:10]}"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *children(child)]
    return found
