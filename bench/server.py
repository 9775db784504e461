"""A server of the bench's own: state directory, port, token, and the requests that the rows are made of."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

from innkeeper.host.linux.cgroup import CgroupTree, Group
from innkeeper.settings import Settings

READY_SECONDS = 60
STOP_SECONDS = 60
# Well below the time after which the server closes a connection that nothing is asked on.
KEPT_SECONDS = 10.0
REPORT_END = "Stop with Ctrl-C"
MEMORY_MB = 512
VCPU_COUNT = 1


class RefusedError(Exception):
    """The server answered something else than 2xx."""


class Server:
    """`inn serve` on a state directory whose image store is filled already."""

    def __init__(self, home: Path, *, platform: str | None = None, **settings: str) -> None:
        self.home = home
        self._given = settings
        self._platform = platform or "auto"
        self.settings = Settings(home=home)
        with socket.socket() as probe, socket.socket() as other:
            probe.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            self.port, self.ssh_port = int(probe.getsockname()[1]), int(other.getsockname()[1])
        self.log = home / "bench-server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._http: http.client.HTTPConnection | None = None
        self._used_at = 0.0

    # --- life ------------------------------------------------------------------------------------------------------

    def start(self) -> float:
        """Start it; returns the seconds until its report, which ends with a command run in a new room."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("INNKEEPER_")},
            "INNKEEPER_IMAGES": "base",
            "INNKEEPER_KEEP_MACHINES": "false",
            "INNKEEPER_LOG_LEVEL": "warning",
            "INNKEEPER_SSH_PORT": str(self.ssh_port),
            "INNKEEPER_RUNSC_PLATFORM": self._platform,
            "PYTHONUNBUFFERED": "1",
            **self._given,
        }
        argv = [str(Path(sys.prefix) / "bin" / "inn"), "serve", "--home", str(self.home), "--port", str(self.port)]
        began = time.perf_counter()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, env=environment, start_new_session=True)
        while REPORT_END not in (text := self.log.read_text(errors="replace")):
            if self._process.poll() is not None or time.perf_counter() - began > READY_SECONDS:
                self.stop()
                raise SystemExit(f"the server did not start:\n{text}")
            time.sleep(0.005)
        took = time.perf_counter() - began
        if "could not be used" in text:
            raise SystemExit(text)
        self._http = self.connect()
        self._token = (self.home / "first-token").read_text().strip()
        return took

    def stop(self) -> None:
        """Stop it; its guests, mounts and namespaces go with it."""
        if self._http is not None:
            self._http.close()
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_SECONDS)

    def remove(self) -> None:
        """Remove the state directory."""
        self.stop()
        shutil.rmtree(self.home)

    # --- requests --------------------------------------------------------------------------------------------------

    def raw(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """One request on the kept connection. Raises RefusedError."""
        assert self._http is not None
        if time.monotonic() - self._used_at > KEPT_SECONDS:
            self._http.close()
            self._http.connect()
        try:
            return self.raw_on(self._http, method, path, body)
        finally:
            self._used_at = time.monotonic()

    def connect(self) -> http.client.HTTPConnection:
        """One more connection, for a client of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.connect()
        return connection

    def raw_on(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None
    ) -> bytes:
        """One request on that connection. Raises RefusedError."""
        headers = {"Authorization": f"Bearer {self._token}"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            raise
        if response.status >= 300:
            raise RefusedError(f"{method} {path}: {response.status} {content[:300].decode(errors='replace')}")
        return content

    @property
    def token(self) -> str:
        """The first token."""
        return self._token

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """One request with JSON both ways."""
        content = self.raw(method, path, None if body is None else json.dumps(body).encode())
        return json.loads(content) if content else None

    def upload(self, path: str, piece: bytes, pieces: int) -> int:
        """PUT `pieces` times `piece` as a file; returns the bytes sent."""
        self._stream("PUT", path, piece, pieces)
        return len(piece) * pieces

    def upload_form(self, fields: dict[str, str], piece: bytes, pieces: int) -> int:
        """POST `pieces` times `piece` to /upload; returns the bytes of the file."""
        parts = [f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{fields[name]}\r\n' for name in fields]
        head = "".join([*parts, '--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n']).encode()
        self._stream("POST", "/upload", piece, pieces, head, b"\r\n--b--\r\n", "multipart/form-data; boundary=b")
        return len(piece) * pieces

    def download(self, path: str) -> int:
        """GET a file's content; returns the bytes received."""
        return self._stream("GET", path, b"", 0)

    def download_form(self, form: str) -> int:
        """POST a form to /download; returns the bytes received, which are base64."""
        return self._stream("POST", "/download", b"", 0, form.encode(), b"", "application/x-www-form-urlencoded")

    def _stream(
        self, method: str, path: str, piece: bytes, pieces: int, head: bytes = b"", tail: bytes = b"", kind: str = ""
    ) -> int:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)) as connection:
            connection.putrequest(method, path)
            connection.putheader("Authorization", f"Bearer {self._token}")
            connection.putheader("Content-Length", str(len(head) + len(piece) * pieces + len(tail)))
            if kind:
                connection.putheader("Content-Type", kind)
            connection.endheaders()
            for part in (head, *([piece] * pieces), tail):
                if part:
                    connection.send(part)
            response = connection.getresponse()
            if response.status >= 300:
                raise RefusedError(f"{method} {path}: {response.status} {response.read(300).decode(errors='replace')}")
            buffer = bytearray(1_048_576)
            received = 0
            while size := response.readinto(buffer):
                received += size
        return received

    def profile(self, name: str, **fields: Any) -> str:
        """A new profile's path."""
        answer = self.request(
            "POST",
            "/api/profiles",
            {
                "name": name,
                "image": "base",
                "vcpu_count": VCPU_COUNT,
                "memory_mb": MEMORY_MB,
                "disk_mb": 4096,
                **fields,
            },
        )
        return f"/api/profile/{answer['id']}"

    def admin(self, path: str) -> Any:
        """GET over the operator's unix socket, on a connection of its own."""
        with contextlib.closing(_UnixConnection(self.settings.api_dir / "inn.sock")) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            content = response.read()
            if response.status >= 300:
                raise RefusedError(f"GET {path}: {response.status}")
            return json.loads(content)

    def host(self) -> Any:
        """What the only host says of itself."""
        return self.admin("/v1/hosts")[0]

    def wait_pools(self, at_least: int = 0) -> None:
        """Wait until every pool is full (and there is one of `at_least` guests), and a moment more for the last freeze."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            pools = self.host()["pools"] or []
            if all(pool["ready"] == pool["size"] for pool in pools) and any(p["size"] >= at_least for p in pools):
                time.sleep(0.1)
                return
            time.sleep(0.05)
        raise TimeoutError(f"the pools did not fill: {pools}")

    # --- what the host has of it -----------------------------------------------------------------------------------

    @property
    def machines_dir(self) -> Path:
        """One folder per machine."""
        return self.settings.host_dir / "machines"

    def internal_id(self, room: Room) -> str:
        """The instance's id that only the server knows."""
        public_id = UUID(room.create()["instance_id"])
        with contextlib.closing(sqlite3.connect(self.settings.api_dir / "innkeeper.db")) as database:
            row = database.execute("SELECT id FROM instances WHERE public_id = ?", (public_id.hex,)).fetchone()
        return str(UUID(row[0]))

    def machine_of(self, room: Room) -> str:
        """The id of a room's machine. The public id leads to no machine, on purpose; the database knows the instance's own."""
        instance_id = self.internal_id(room)
        claims = self.machines_dir.glob("*/claim.json")
        return next(claim.parent.name for claim in claims if instance_id in claim.read_text())

    def machine_ids(self) -> set[str]:
        """The ids of all machines, claimed or not."""
        return {path.name for path in self.machines_dir.iterdir()}

    def group(self, machine_id: str) -> Group:
        """A machine's control group."""
        return CgroupTree.detect().server_root(f"innkeeper-{self.settings.server_id}").child(machine_id)

    def processes(self) -> dict[str, int]:
        """Pids by name: `daemon`, `api`."""
        assert self._process is not None
        daemon = self._process.pid
        for child in _children(daemon):
            if b"innkeeper.launch_api" in Path(f"/proc/{child}/cmdline").read_bytes():
                return {"daemon": daemon, "api": child}
        raise LookupError("the API process")


class Room:
    """A room by its path."""

    def __init__(self, server: Server, profile: str, name: str) -> None:
        self._server = server
        self.path = f"{profile}/room/{quote(name)}"

    def create(self) -> Any:
        """Get or create."""
        return self._server.request("POST", self.path)

    def run(self, command: str, **extras: Any) -> Any:
        """Run a command; returns its result. A status other than 0 raises."""
        result = self._server.request("POST", f"{self.path}/command", {"command": command, **extras})["result"]
        if result["exit_code"] != 0:
            raise RefusedError(f"{command}: exit code {result['exit_code']}: {result['output'][:300]}")
        return result

    def destroy(self) -> None:
        """Destroy it."""
        self._server.request("DELETE", self.path)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=120)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(self._path))


def _children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
