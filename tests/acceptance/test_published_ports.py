"""Published ports: real servers in a VM that the unmodified `instavm` package made and shared, asked by programs and by a browser."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import http.server
import json
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import browser
import pytest
from instavm_client import Instavm
from server_fixture import Server, until

pytestmark = pytest.mark.microvms

PROGRAM = Path(__file__).with_name("guest_programs") / "published.py"
PIECE = bytes(range(256)) * 4096
# Pieces of 1 MiB.
LARGE = 100


@dataclass
class Published:
    """A share of the VM's port, by its URL; `token` goes with every request unless a test says otherwise."""

    server: Server
    vm_id: str
    session_id: str
    share_id: str
    host: str

    @property
    def token(self) -> dict[str, str]:
        return {"X-API-Key": self.server.token}

    @contextlib.contextmanager
    def asked(
        self, method: str, path: str, body: Any = None, *, fields: dict[str, str] | None = None, **more: str
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=120)
        with contextlib.closing(connection):
            fields = self.token if fields is None else fields
            connection.request(method, path, body, {"Host": self.host, **fields, **more})
            yield connection.getresponse()

    def status(self, path: str = "/", **fields: str) -> int:
        """The status of a GET with these fields alone."""
        with self.asked("GET", path, fields=fields) as answer:
            return answer.status


def make_vm(instavm: Instavm, client: Any) -> dict[str, Any]:
    """A VM of the SDK's in which the servers listen."""
    made: dict[str, Any] = instavm.sdk("answer = client.vms.create(vm_lifetime_seconds=3600, memory_mb=512)")
    put = client.put(f"/v1/vms/{made['vm_id']}/files/content?path=/tmp/published.py", content=PROGRAM.read_bytes())
    assert put.status_code < 300, put.text
    started = instavm.sdk(
        "client.session_id = words[0]\nanswer = client.execute(words[1], language='bash')",
        made["session_id"],
        "setsid python3 /tmp/published.py > /tmp/published.log 2>&1 & "
        "for i in $(seq 1200); do grep -q ':1F40 .* 0A ' /proc/net/tcp && echo listens && break; sleep 0.05; done",
    )
    assert "listens" in started["stdout"], started
    return made


@pytest.fixture(scope="module")
def port(instavm: Instavm, innkeeper: Server) -> Iterator[Published]:
    """A private share of the VM that the module has."""
    client = innkeeper.client()
    made = make_vm(instavm, client)
    share = instavm.sdk("answer = client.shares.create(8000, vm_id=words[0])", made["vm_id"])
    assert (share["is_public"], share["port"], share["vm_id"]) == (False, 8000, made["vm_id"])
    host = urlsplit(share["url"]).netloc
    assert host.endswith(f".localhost:{innkeeper.port}")
    yield Published(innkeeper, made["vm_id"], made["session_id"], share["share_id"], host)
    assert client.delete(f"/v1/vms/{made['vm_id']}").status_code == 200


def test_pages_and_whose_fields_reach_them(port: Published) -> None:
    with port.asked("GET", "/", Cookie="own=1; inn_share=x") as answer:
        seen = dict(eval(answer.read()))
    assert seen["host"] == port.host and seen["cookie"] == "own=1" and seen["x-forwarded-host"] == port.host
    assert "x-api-key" not in seen and port.server.token not in str(seen)


def test_large_bodies_both_ways(port: Published) -> None:
    with port.asked("GET", f"/large/{LARGE}") as answer:
        size, digest = 0, hashlib.sha256()
        while data := answer.read(1 << 20):
            size += len(data)
            digest.update(data)
    expected = hashlib.sha256()
    for _ in range(LARGE):
        expected.update(PIECE)
    assert (size, digest.digest()) == (LARGE << 20, expected.digest())
    content = [os.urandom(1 << 20) for _ in range(4)]
    sent = hashlib.sha256()

    def pieces() -> Iterator[bytes]:
        for number in range(LARGE):
            sent.update(content[number % 4])
            yield content[number % 4]

    with port.asked("POST", "/", pieces(), **{"Content-Length": str(LARGE << 20)}) as answer:
        assert answer.read().decode() == sent.hexdigest()


def test_events(port: Published) -> None:
    with port.asked("GET", "/events") as answer:
        assert answer.getheader("Content-Type") == "text/event-stream"
        assert answer.read() == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"


def test_a_websocket(port: Published) -> None:
    with socket.create_connection(("127.0.0.1", port.server.port), timeout=60) as client:
        fields = {
            "Host": port.host,
            **port.token,
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


def test_who_may_see_a_share(port: Published, instavm: Instavm) -> None:
    assert port.status() == 401
    assert port.status(**port.token) == 200
    assert port.status(**{"X-API-Key": "rk_live_" + "0" * 32}) == 401
    link = urlsplit(port.server.inn("share", "link", port.share_id).stdout.strip())
    assert link.netloc == port.host
    # A program is just answered; a browser is sent on, and keeps a cookie.
    assert port.status(f"/?{link.query}") == 200
    with port.asked("GET", f"/?{link.query}", fields={}, Accept="text/html") as answer:
        assert (answer.status, answer.getheader("Location")) == (303, f"http://{port.host}/")
        cookie = str(answer.getheader("Set-Cookie")).partition(";")[0]
    assert port.status(Cookie=cookie) == 200
    assert port.status(Cookie=cookie, Origin="http://other.localhost") == 401
    shown = instavm.sdk("answer = client.shares.update(words[0], is_public=True)", port.share_id)
    assert shown["is_public"] is True and port.status() == 200
    assert instavm.sdk("answer = client.shares.update(words[0], is_public=False)", port.share_id)["is_public"] is False
    assert port.status() == 401


def test_a_revoked_share_ends_what_comes_after(port: Published, instavm: Instavm) -> None:
    share = instavm.sdk("answer = client.shares.create(8000, session_id=words[0], is_public=True)", port.session_id)
    other = Published(port.server, port.vm_id, port.session_id, share["share_id"], urlsplit(share["url"]).netloc)
    with other.asked("GET", "/endless", fields={}) as answer:
        assert answer.readline() == b"data: 0\n"
        revoked = instavm.sdk("answer = client.shares.update(words[0], revoke=True)", other.share_id)
        assert revoked["status"] == "revoked"
        assert other.status() == 404 and other.status(**port.token) == 404
        # What was under way goes on.
        for _ in range(20):
            assert answer.readline()
    assert port.status(**port.token) == 200


def test_the_packages_and_inns_own_commands(port: Published, instavm: Instavm) -> None:
    share = instavm.json("share", "create", port.vm_id, "8000", "--public")
    assert share["is_public"] is True and share["port"] == 8000
    other = Published(port.server, port.vm_id, port.session_id, share["share_id"], urlsplit(share["url"]).netloc)
    assert other.status() == 200
    instavm.ok("share", "set-private", share["share_id"])
    assert other.status() == 401
    instavm.ok("share", "set-public", share["share_id"])
    assert other.status() == 200
    instavm.ok("share", "revoke", share["share_id"])
    assert other.status() == 404
    inn = port.server.inn
    made = json.loads(inn("share", port.vm_id, "80", "--json").stdout)
    assert made["is_public"] is False
    with port.asked("GET", "/", **{"Host": urlsplit(made["url"]).netloc}) as answer:
        assert (answer.status, answer.read()) == (502, b"502 Nothing listens on this port of the instance.\n")
    assert made["share_id"] in inn("share", "list", "--vm", port.vm_id).stdout
    assert inn("share", "rm", made["share_id"]).returncode == 0
    assert made["share_id"] not in inn("share", "list").stdout


def test_ports_and_app_urls(port: Published, instavm: Instavm) -> None:
    listening = port.server.client().get(f"/v1/vms/{port.vm_id}/ports").json()
    (row,) = [row for row in listening if row["port"] == 8000]
    assert (row["address"], row["command"]) == ("127.0.0.1", "python3") and row["pid"] > 1
    found = instavm.sdk("answer = client.get_session_app_url(words[0], port=8000)", port.session_id)
    assert (found["port"], found["vm_id"], found["session_id"]) == (8000, port.vm_id, port.session_id)
    assert found["url"] == found["app_url"] and found["vm_ip"] == "" and 0 < found["expires_in_seconds"] <= 3_600

    def ask(url: str, **fields: str) -> int:
        at = urlsplit(url)
        with port.asked("GET", f"{at.path}?{at.query}", fields={"Host": at.netloc, **fields}) as answer:
            return answer.status

    for url in (found["url"], found["direct_url"]):
        assert (ask(url), ask(url, **port.token)) == (401, 200), url
    assert ask(found["link_url"]) == 200
    plain = instavm.sdk("client.session_id = words[0]\nanswer = client.get_session_app_url()", port.session_id)
    assert plain["port"] == 80 and ask(plain["url"], **port.token) == 502
    refused = (
        "try:\n    client.get_session_app_url(words[0], port=0)\nexcept Exception as error:\n    answer = str(error)"
    )
    assert "422" in instavm.sdk(refused, port.session_id)


@pytest.fixture
def start_page(port: Published) -> Iterator[http.server.HTTPServer]:
    """A server on the API's host name that leaves a cookie there and sends on to `where`. Cookies know no ports."""

    class Handler(http.server.BaseHTTPRequestHandler):
        where = ""

        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Set-Cookie", "api_session=secret; Path=/; SameSite=Lax")
            self.send_header("Location", self.where)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_a_browser_at_a_private_share(port: Published, start_page: http.server.HTTPServer) -> None:
    link = port.server.inn("share", "link", port.share_id).stdout.strip()
    api = f"http://localhost:{port.server.port}"
    start_page.RequestHandlerClass.where = f"{link.replace('/?', '/page?')}#{quote(api, safe='')}"  # type: ignore[attr-defined]

    def told() -> Any:
        with port.asked("GET", "/reports") as answer:
            return json.loads(answer.read())

    with browser.showing(f"http://localhost:{start_page.server_address[1]}/") as process:
        until(lambda: told()[0] or process.poll() is not None)
        assert process.poll() is None, "the browser ended"
    (report,), cookies = told()
    # Page, script and WebSocket work by the cookie that the link left, which neither the page nor the guest sees, as little as the API's.
    assert (report["title"], report["socket"], report["cookies"]) == ("Published", "hello", "")
    assert [cookies[path] for path in ("/page", "/page.js")] == [[None], [None]] and cookies["/ws"][-1] is None
    # The API is there, and the page can neither read it nor ask it anything in the user's name.
    assert (report["reached"], report["read"], report["asked"]) == ("opaque", "TypeError", "TypeError")


def test_a_share_dies_with_its_vm(instavm: Instavm, innkeeper: Server) -> None:
    client = innkeeper.client()
    made = make_vm(instavm, client)
    share = client.post("/v1/shares", json={"vm_id": made["vm_id"], "port": 8000, "is_public": True}).json()
    found = instavm.sdk("answer = client.get_session_app_url(words[0], port=8000)", made["session_id"])
    port = Published(innkeeper, made["vm_id"], made["session_id"], share["share_id"], urlsplit(share["url"]).netloc)
    with port.asked("GET", "/endless", fields={}) as answer:
        assert answer.readline() == b"data: 0\n"
        assert instavm.sdk("answer = client.vms.delete(words[0])", made["vm_id"])["status"] == "killed"
        # Cut, not ended: a client sees that something is missing.
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            answer.read()
    assert port.status() == 404 and port.status(**port.token) == 404
    at = urlsplit(found["link_url"])
    with port.asked("GET", f"{at.path}?{at.query}", fields={"Host": at.netloc}) as answer:
        assert answer.status == 404
    assert client.get(f"/v1/sessions/app-url/{made['session_id']}").status_code == 404
    assert client.get(f"/v1/shares/{share['share_id']}").status_code == 404
