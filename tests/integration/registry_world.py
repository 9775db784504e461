"""A network of the tests' own: a host, and beyond it registries, web servers and a name server under public and private addresses."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import socketserver
import ssl
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dnslib import QTYPE, RCODE, RR, A, DNSRecord

from innkeeper.host.linux import netns

PUBLIC = "8.8.8.1"
OTHER_PUBLIC = "8.8.8.3"
PRIVATE = "10.9.9.9"
HOST_ADDRESS = "8.8.8.2"


@dataclass
class Beyond:
    """Two namespaces: `host` stands for the host, `there` answers under a public and a private address."""

    host: str
    there: str
    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def registry(
        self,
        port: int,
        *,
        address: str = PUBLIC,
        htpasswd: str | None = None,
        tls: Path | None = None,
        auth: dict[str, Any] | None = None,
    ) -> str:
        """Debian's docker-registry at a port, serving; its host:port. `tls` is a file of a key and its certificate, `auth` its own words."""
        settings: dict[str, Any] = {
            "version": "0.1",
            "log": {"level": "warn"},
            "storage": {"filesystem": {"rootdirectory": str(self.folder / f"storage-{port}")}},
            "http": {"addr": f"{address}:{port}", "secret": "s" * 32},
        }
        if htpasswd is not None:
            (self.folder / f"htpasswd-{port}").write_text(htpasswd + "\n")
            settings["auth"] = {"htpasswd": {"realm": "test", "path": str(self.folder / f"htpasswd-{port}")}}
        if tls is not None:
            settings["http"]["tls"] = {"certificate": str(tls), "key": str(tls)}
        if auth is not None:
            settings["auth"] = auth
        path = self.folder / f"registry-{port}.yml"
        path.write_text(json.dumps(settings))
        with (self.folder / f"registry-{port}.log").open("wb") as log:
            process = subprocess.Popen(
                ["nsenter", f"--net={netns.path_of(self.there)}", "--", "docker-registry", "serve", str(path)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        self.processes.append(process)
        deadline = time.monotonic() + 30
        while not netns.call_inside(self.there, lambda: _answers(address, port)):
            assert process.poll() is None and time.monotonic() < deadline, path.with_suffix(".log").read_text()
            time.sleep(0.05)
        return f"{address}:{port}"

    def push(self, layout: Path, reference: str, *options: str) -> None:
        """Copy the layout's image to a registry, from where the registry is."""
        command = ["nsenter", f"--net={netns.path_of(self.there)}", "--", "skopeo", "--insecure-policy", "copy", "--all"]  # fmt: skip
        done = subprocess.run(
            [*command, "--dest-tls-verify=false", *options, f"oci:{layout}", f"docker://{reference}"],
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr.decode()

    @contextlib.contextmanager
    def web(
        self,
        port: int,
        handler: type[BaseHTTPRequestHandler],
        *,
        address: str = PUBLIC,
        tls: ssl.SSLContext | None = None,
    ) -> Iterator[str]:
        """A web server of the test's own there."""
        server = netns.call_inside(self.there, lambda: _Web((address, port), handler))
        if tls is not None:
            # The handshake happens in the request's own thread.
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        with _serving(server):
            yield f"{address}:{port}"

    @contextlib.contextmanager
    def names(self, zone: dict[str, Callable[[], list[str]]]) -> Iterator[list[str]]:
        """A name server there, on PUBLIC: name -> what its addresses are this time. Yields the names as they are asked for."""
        asked: list[str] = []

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                packet, sock = self.request
                record = DNSRecord.parse(packet)
                name, reply = str(record.q.qname).rstrip("."), record.reply()
                if name not in zone:
                    reply.header.rcode = RCODE.NXDOMAIN
                elif record.q.qtype == QTYPE.A:
                    asked.append(name)
                    reply.add_answer(*(RR(name, QTYPE.A, rdata=A(address), ttl=1) for address in zone[name]()))
                sock.sendto(reply.pack(), self.client_address)

        with _serving(netns.call_inside(self.there, lambda: socketserver.UDPServer((PUBLIC, 53), Handler))):
            yield asked


class _Web(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away or distrusts the certificate is its own business."""


@contextlib.contextmanager
def _serving(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _answers(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
        return True
    return False


@contextlib.asynccontextmanager
async def beyond(folder: Path) -> AsyncIterator[Beyond]:
    """The two namespaces, wired; everything in them ends with the context."""
    made = Beyond(f"iko{os.getpid()}h", f"iko{os.getpid()}r", folder)
    try:
        await netns.ip_batch([f"netns add {made.host}", f"netns add {made.there}"])
        wire = [
            f"link add wan type veth peer name wan netns {made.there}",
            "link set lo up",
            f"addr add {HOST_ADDRESS}/24 dev wan",
            "link set wan up",
            f"route add default via {PUBLIC}",
        ]
        await netns.ip_batch(wire, inside=made.host)
        there = [
            "link set lo up",
            f"addr add {PUBLIC}/24 dev wan",
            "link set wan up",
            *(f"addr add {one}/32 dev lo" for one in (OTHER_PUBLIC, PRIVATE)),
        ]
        await netns.ip_batch(there, inside=made.there)
        yield made
    finally:
        for process in made.processes:
            process.kill()
            process.wait()
        for name in (made.host, made.there):
            await netns.delete(name)


class Registry(BaseHTTPRequestHandler):
    """A registry of the test's own: subclasses say what it answers."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_GET  # noqa: N815

    def answer(self) -> None:
        raise NotImplementedError

    def say(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


def serving(files: dict[str, bytes], **blobs: Any) -> type[Registry]:
    """A registry with the image of `files` (a Layout's), whose blobs are answered by `blobs["answer"]`."""
    index = json.loads(files["index.json"])["manifests"][0]
    manifest = files["blobs/sha256/" + index["digest"].partition(":")[2]]

    class Made(Registry):
        def answer(self) -> None:
            if self.path == "/v2/":
                self.say(200, b"{}")
            elif "/manifests/" in self.path:
                digest = "sha256:" + hashlib.sha256(manifest).hexdigest()
                self.say(200, manifest, index["mediaType"], Docker_Content_Digest=digest)
            else:
                blobs["answer"](self, files.get("blobs/sha256/" + self.path.rpartition(":")[2], b""))

    return Made
