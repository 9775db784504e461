"""What the tests publish from a guest, by the standard library alone: pages, large bodies, events, a WebSocket that sends everything back."""

import base64
import hashlib
import http.server
import json
import time

PAGE = b"""<!doctype html><title>Published</title><script src="/page.js"></script>"""
# Tells what it could do and what it could not. The address of the API comes in the page's fragment.
SCRIPT = b"""
const api = decodeURIComponent(location.hash.slice(1));
const socket = () => new Promise((done) => {
    const one = new WebSocket(`ws://${location.host}/ws`);
    one.onopen = () => one.send("hello");
    one.onmessage = (message) => done(message.data);
    one.onerror = () => done("error");
});
const read = (path, options) => fetch(api + path, options).then((answer) => answer.type, (error) => error.name);
(async () => {
    const report = {
        title: document.title,
        cookies: document.cookie,
        socket: await socket(),
        reached: await read("/healthz", {mode: "no-cors"}),
        read: await read("/healthz", {}),
        asked: await read("/v1/vms", {credentials: "include", headers: {"X-API-Key": "guessed"}}),
    };
    await fetch("/report", {method: "POST", body: JSON.stringify(report)});
})();
"""
PIECE = bytes(range(256)) * 4096
# What the page said, and the cookies that each path was asked with.
reports, cookies = [], {}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, body, kind="text/plain"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0]
        cookies.setdefault(path, []).append(self.headers["Cookie"])
        if path == "/page":
            self.answer(PAGE, "text/html")
        elif path == "/page.js":
            self.answer(SCRIPT, "text/javascript")
        elif path == "/reports":
            self.answer(json.dumps([reports, cookies]).encode())
        elif path.startswith("/large/"):
            count = int(path.removeprefix("/large/"))
            self.send_response(200)
            self.send_header("Content-Length", str(count * len(PIECE)))
            self.end_headers()
            for _ in range(count):
                self.wfile.write(PIECE)
        elif path == "/events":
            self.events(3)
        elif path == "/endless":
            self.events(100_000)
        elif path == "/ws":
            self.websocket()
        else:
            self.answer(repr(sorted((name.lower(), value) for name, value in self.headers.items())).encode())

    def do_POST(self):
        left, digest, body = int(self.headers["Content-Length"]), hashlib.sha256(), b""
        while left:
            data = self.rfile.read(min(left, 1 << 18))
            left -= len(data)
            digest.update(data)
            if self.path == "/report":
                body += data
        if body:
            reports.append(json.loads(body))
        self.answer(digest.hexdigest().encode())

    def events(self, count):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for number in range(count):
            self.wfile.write(b"data: %d\n\n" % number)
            self.wfile.flush()
            time.sleep(0.1)
        self.close_connection = True

    def websocket(self):
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        self.wfile.flush()
        while True:
            head = self.rfile.read(2)
            if len(head) < 2 or head[0] & 15 == 8:
                break
            mask = self.rfile.read(4)
            data = self.rfile.read(head[1] & 127)
            plain = bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))
            self.wfile.write(bytes([0x81, len(plain)]) + plain)
            self.wfile.flush()
        self.close_connection = True


http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
