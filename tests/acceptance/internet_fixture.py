"""The tests' own internet, in two network namespaces: a host, and beyond it one machine that answers under public and under forbidden addresses.

It is a name server, a package index, an npm registry, a Debian repository and a git server behind a certificate authority of its own. The server
under test is told that the first namespace is its host, so its guests can reach nothing else, and no packet leaves the machine.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import secrets
import socket
import socketserver
import ssl
import subprocess
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from dnslib import QTYPE, RR, A, DNSRecord
from tests.acceptance.debian_fixture import APT_HOST, apt_repository

from innkeeper.host.linux import netns

ADDRESS = "8.8.8.1"
HOST_ADDRESS = "8.8.8.2"
HOST_ADDRESSES = (HOST_ADDRESS, "8.8.4.4", "10.44.0.1")
# They really answer beyond the host, so that "refused" is never just "nobody there".
# None that a server may choose for its guests: of the carriers' range the one part that it never takes.
FORBIDDEN = ("10.9.9.9", "100.100.1.1", "169.254.169.254", "172.20.0.1", "192.0.0.192", "192.168.77.1", "198.18.0.1")
NAMES = ("index.test", "registry.test", "github.com", "plain.test", APT_HOST)
REBOUND = "rebound.test"
HOST_PORT = 8080
GREETING = b"hello from the internet\n"


@dataclass
class Internet:
    """What a test needs to know: `host` is the namespace for the server, `ca_pem` what guests have to trust."""

    host: str
    beyond: str
    ca_pem: bytes
    address: str = ADDRESS
    questions: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextlib.contextmanager
def internet() -> Iterator[Internet]:
    """The two namespaces with everything that runs in them."""
    # Not by the process: the security tests' world may still be there when the acceptance tests make theirs.
    name = f"ika{secrets.token_hex(4)}"
    host, beyond = f"{name}h", f"{name}i"
    with tempfile.TemporaryDirectory(prefix="ika") as directory, contextlib.ExitStack() as stack:
        folder = Path(directory)
        context, ca_pem = certificates(folder)
        there = Internet(host, beyond, ca_pem)
        stack.callback(lambda: asyncio.run(_delete(host, beyond)))
        asyncio.run(_wire(host, beyond))
        pages = {**package_index(), **npm_registry(), **apt_repository()}
        repository = git_repository(folder)
        stack.enter_context(_web(beyond, 443, there, pages, repository, context))
        stack.enter_context(_web(beyond, 80, there, pages, repository, None))
        stack.enter_context(_web(host, HOST_PORT, there, pages, repository, None))
        stack.enter_context(_names(beyond, there))
        yield there


async def _wire(host: str, beyond: str) -> None:
    await netns.ip_batch([f"netns add {host}", f"netns add {beyond}"])
    first, *others = HOST_ADDRESSES
    await netns.ip_batch(
        [
            f"link add wan type veth peer name wan netns {beyond}",
            "link set lo up",
            f"addr add {first}/24 dev wan",
            *(f"addr add {address}/32 dev lo" for address in others),
            "link set wan up",
            f"route add default via {ADDRESS}",
        ],
        inside=host,
    )
    await netns.ip_batch(
        [
            "link set lo up",
            f"addr add {ADDRESS}/24 dev wan",
            "link set wan up",
            *(f"addr add {address}/32 dev lo" for address in FORBIDDEN),
        ],
        inside=beyond,
    )


async def _delete(*names: str) -> None:
    for name in names:
        await netns.delete(name)


# --- what it serves --------------------------------------------------------------------------------------------------


def package_index() -> dict[str, bytes]:
    """A simple index with one tiny wheel: {host and path: content}."""
    name, info = "tinywheel-1.0-py3-none-any.whl", "tinywheel-1.0.dist-info"
    files = {
        "tinywheel.py": b"def greet():\n    return 'hello from a wheel'\n",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tinywheel\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(content)}")
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,\n"]).encode()
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    link = f'<!DOCTYPE html><a href="/files/{name}#sha256={hashlib.sha256(wheel.getvalue()).hexdigest()}">{name}</a>'
    return {"index.test/simple/tinywheel/": link.encode(), f"index.test/files/{name}": wheel.getvalue()}


def npm_registry() -> dict[str, bytes]:
    """A registry with one tiny package called express: {host and path: content}."""
    manifest = {"name": "express", "version": "5.0.0", "main": "index.js"}
    files = {
        "package/package.json": json.dumps(manifest).encode(),
        "package/index.js": b"module.exports = () => 'a tiny express';\n",
    }
    tarball = io.BytesIO()
    with tarfile.open(fileobj=tarball, mode="w:gz") as archive:
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
    integrity = base64.b64encode(hashlib.sha512(tarball.getvalue()).digest()).decode()
    dist = {"tarball": "https://registry.test/express/-/express-5.0.0.tgz", "integrity": f"sha512-{integrity}"}
    versions = {"5.0.0": {**manifest, "dist": dist}}
    packument = {"name": "express", "dist-tags": {"latest": "5.0.0"}, "versions": versions}
    return {
        "registry.test/express": json.dumps(packument).encode(),
        "registry.test/express/-/express-5.0.0.tgz": tarball.getvalue(),
        "registry.test/-/npm/v1/security/advisories/bulk": b"{}",
    }


def git_repository(folder: Path) -> Path:
    """A bare repository for the simplest of git's protocols, whose one package needs express."""
    work, bare = folder / "work", folder / "repo.git"
    work.mkdir()
    (work / "package.json").write_text(
        json.dumps({"name": "repo", "version": "1.0.0", "dependencies": {"express": "^5.0.0"}})
    )
    identity = ["-c", "user.name=Tests", "-c", "user.email=tests@localhost", "-c", "init.defaultBranch=main"]
    for argv in (
        ["git", "-C", work, *identity, "init", "--quiet"],
        ["git", "-C", work, "add", "."],
        ["git", "-C", work, *identity, "commit", "--quiet", "--message", "First"],
        ["git", "clone", "--quiet", "--bare", work, bare],
        ["git", "-C", bare, "update-server-info"],
    ):
        subprocess.run(argv, check=True, capture_output=True)
    return bare


def certificates(folder: Path, names: Sequence[str] = NAMES) -> tuple[ssl.SSLContext, bytes]:
    """A server context with a certificate for every name, kept with its key as `server.pem`, and the authority's certificate."""
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Authority of the tests")])
    authority = _certificate(issuer, issuer, authority_key, authority_key, names=None)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    leaf = _certificate(subject, issuer, key, authority_key, names=names)
    chain = folder / "server.pem"
    chain.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + leaf.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    return context, authority.public_bytes(serialization.Encoding.PEM)


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    *,
    names: Sequence[str] | None,
) -> x509.Certificate:
    """For servers of these names, or of an authority."""
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=names is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if names is not None:
        alternatives = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        builder = builder.add_extension(alternatives, critical=False)
    return builder.sign(signer, hashes.SHA256())


# --- how it serves ---------------------------------------------------------------------------------------------------


class _WebServer(ThreadingHTTPServer):
    """On a socket that was made in a namespace; the TLS handshake happens in the request's own thread."""

    daemon_threads = True

    def __init__(self, listener: socket.socket, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("", 0), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.server_address = listener.getsockname()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away or distrusts the certificate is its own business."""


@contextlib.contextmanager
def _web(
    inside: str,
    port: int,
    there: Internet,
    pages: dict[str, bytes],
    repository: Path,
    context: ssl.SSLContext | None,
) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(self._content())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", "0")))
            self._answer(self._content())

        def _content(self) -> bytes | None:
            host, path = self.headers.get("Host", "").partition(":")[0], self.path.partition("?")[0]
            there.requests.append(host + path)
            prefix = "/user/repo.git/"
            if host == "github.com" and path.startswith(prefix) and ".." not in path:
                file = repository / path.removeprefix(prefix)
                return file.read_bytes() if file.is_file() else None
            return pages.get(host + path, GREETING if path == "/" else None)

        def _answer(self, content: bytes | None) -> None:
            self.send_response(404 if content is None else 200)
            kind = {b"{": "application/json", b"<": "text/html"}.get((content or b"")[:1], "application/octet-stream")
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

    listener = netns.call_inside(inside, lambda: socket.create_server(("0.0.0.0", port)))
    if context is not None:
        listener = context.wrap_socket(listener, server_side=True, do_handshake_on_connect=False)
    with _serving(_WebServer(listener, Handler)):
        yield


@contextlib.contextmanager
def _names(inside: str, there: Internet) -> Iterator[None]:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            packet, sock = self.request
            record = DNSRecord.parse(packet)
            name = str(record.q.qname).rstrip(".").lower()
            there.questions.append(name)
            reply = record.reply()
            if name in NAMES or name == REBOUND:
                if record.q.qtype == QTYPE.A:
                    address = FORBIDDEN[0] if name == REBOUND else ADDRESS
                    reply.add_answer(RR(record.q.qname, QTYPE.A, rdata=A(address), ttl=60))
            else:
                reply.header.rcode = 3
            sock.sendto(reply.pack(), self.client_address)

    def bind() -> socketserver.UDPServer:
        return socketserver.ThreadingUDPServer(("0.0.0.0", 53), Handler)

    with _serving(netns.call_inside(inside, bind)):
        yield


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


def answers_from(namespace: str, address: str, port: int) -> bool:
    """Whether something listens there, seen from a namespace: what proves that a guest's refusal is the firewall's doing."""

    def connect() -> bool:
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=2):
            return True
        return False

    ask: Callable[[], bool] = connect
    return netns.call_inside(namespace, ask)
