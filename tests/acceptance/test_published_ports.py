"""Published ports: real servers in a real guest, and the `instavm` package's own commands for shares."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

import httpx2
import pytest
from instavm_client import Instavm
from server_fixture import Room, Server

# Pages, a large file, events and a WebSocket that sends everything back, by the standard library alone.
SERVERS = r"""
import base64, hashlib, http.server, threading, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        if self.path == "/large":
            self.send_response(200); self.send_header("Content-Length", str(32 << 20)); self.end_headers()
            for _ in range(32): self.wfile.write(bytes(range(256)) * 4096)
        elif self.path == "/events":
            self.send_response(200); self.send_header("Content-Type", "text/event-stream"); self.end_headers()
            for number in range(3):
                self.wfile.write(b"data: %d\n\n" % number); self.wfile.flush(); time.sleep(0.1)
            self.close_connection = True
        elif self.path == "/ws":
            key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            self.send_response(101); self.send_header("Upgrade", "websocket"); self.send_header("Connection", "Upgrade")
            self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
            self.end_headers(); self.wfile.flush()
            while True:
                head = self.rfile.read(2)
                if len(head) < 2 or head[0] & 15 == 8: break
                mask = self.rfile.read(4); data = self.rfile.read(head[1] & 127)
                plain = bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))
                self.wfile.write(bytes([0x81, len(plain)]) + plain); self.wfile.flush()
            self.close_connection = True
        else:
            body = repr(sorted((name.lower(), value) for name, value in self.headers.items())).encode()
            self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def do_POST(self):
        left, digest = int(self.headers["Content-Length"]), hashlib.sha256()
        while left:
            data = self.rfile.read(min(left, 1 << 16)); left -= len(data); digest.update(data)
        body = digest.hexdigest().encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"""


@dataclass
class Published:
    """A port of a guest by its host name."""

    server: Server
    host: str

    @property
    def fields(self) -> dict[str, str]:
        return {"Host": self.host, "X-API-Key": self.server.token}

    @contextlib.contextmanager
    def asked(
        self, method: str, path: str, body: bytes | None = None, **more: str
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, {**self.fields, **more})
            yield connection.getresponse()


@pytest.fixture(scope="module")
def port(innkeeper: Server, shared: Room) -> Published:
    """The servers in a guest of a room, which has no network at all to be reached by."""
    shared.put("/home/user/servers.py", SERVERS.encode())
    shared.output(
        "setsid python3 servers.py > servers.log 2>&1 & "
        "for i in $(seq 600); do grep -q ':1F40 .* 0A ' /proc/net/tcp && exit; sleep 0.05; done; cat servers.log; exit 1"
    )
    internal = UUID(innkeeper.internal_id(shared.create()["instance_id"]))
    label = base64.b32encode(internal.bytes).decode().rstrip("=").lower()
    return Published(innkeeper, f"{label}-8000.localhost")


def test_pages_and_whose_fields_reach_them(port: Published) -> None:
    with port.asked("GET", "/", Cookie="own=1; inn_share=x") as answer:
        seen = dict(eval(answer.read()))
    assert seen["host"] == port.host and seen["cookie"] == "own=1" and seen["x-forwarded-host"] == port.host
    assert "x-api-key" not in seen and port.server.token not in str(seen)


def test_large_bodies(port: Published) -> None:
    with port.asked("GET", "/large") as answer:
        assert hashlib.sha256(answer.read()).digest() == hashlib.sha256(bytes(range(256)) * 131_072).digest()
    content = os.urandom(1 << 20) * 16
    with port.asked("POST", "/", content) as answer:
        assert answer.read().decode() == hashlib.sha256(content).hexdigest()


def test_events(port: Published) -> None:
    with port.asked("GET", "/events") as answer:
        assert answer.getheader("Content-Type") == "text/event-stream"
        assert answer.read() == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"


def test_a_websocket(port: Published) -> None:
    with socket.create_connection(("127.0.0.1", port.server.port), timeout=60) as client:
        fields = {
            **port.fields,
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        }
        client.sendall(b"GET /ws HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items()).encode() + b"\r\n")
        stream = client.makefile("rb")
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += stream.readline()
        assert head.startswith(b"HTTP/1.1 101 ") and b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head
        for text in (b"hello", b"again"):
            client.sendall(b"\x81" + bytes([0x80 | len(text)]) + bytes(4) + text)
            assert stream.read(2 + len(text)) == b"\x81" + bytes([len(text)]) + text


def test_shares_by_the_package_and_by_inn(instavm: Instavm, innkeeper: Server) -> None:
    client = innkeeper.client()
    vm = client.post("/v1/vms", json={"image_variant": "base", "memory_mb": 512}).json()["vm_id"]
    try:
        share = instavm.json("share", "create", vm, "8000", "--public")
        assert share["is_public"] is True and share["port"] == 8000
        host = httpx2.URL(share["url"]).netloc.decode()
        assert host.endswith(f".localhost:{innkeeper.port}")
        anybody = innkeeper.client(token=None)
        nobody_listens = anybody.get("/", headers={"Host": host})
        assert (nobody_listens.status_code, nobody_listens.text) == (
            502,
            "502 Nothing listens on this port of the instance.\n",
        )
        instavm.ok("share", "set-private", share["share_id"])
        assert anybody.get("/", headers={"Host": host}).status_code == 401
        link = innkeeper.inn("share", "link", share["share_id"]).stdout.strip()
        assert anybody.get(httpx2.URL(link).raw_path.decode(), headers={"Host": host}).status_code == 502
        instavm.ok("share", "set-public", share["share_id"])
        assert anybody.get("/", headers={"Host": host}).status_code == 502
        instavm.ok("share", "revoke", share["share_id"])
        assert anybody.get("/", headers={"Host": host}).status_code == 404
        made = json.loads(innkeeper.inn("share", vm, "80", "--json").stdout)
        assert made["is_public"] is False
        assert made["share_id"] in innkeeper.inn("share", "list", "--vm", vm).stdout
        assert innkeeper.inn("share", "rm", made["share_id"]).returncode == 0
        assert made["share_id"] not in innkeeper.inn("share", "list").stdout
    finally:
        client.delete(f"/v1/vms/{vm}")
