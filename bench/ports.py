"""Rows about a guest's published port, beside a connection that goes straight to the guest over its network."""

from __future__ import annotations

import base64
import http.client
import json
import os
import subprocess
import sys
from uuid import UUID

from bench.rows import Budget, Row
from bench.server import RefusedError, Room, Server

SIZE_MB = 128
PORT = 8000
# Sends and takes memory: neither a disk nor a slow server is in the way.
SERVER = """
import socket, threading
piece = bytes(1 << 18)
def serve(c):
    with c:
        head = b""
        while b"\\r\\n\\r\\n" not in head:
            head += c.recv(65536)
        line, size = head.split(b" ")[1][1:], 0
        if head.startswith(b"GET"):
            size = int(line)
            c.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % size)
            while size > 0:
                size -= len(piece); c.sendall(piece)
        else:
            left, buffer = int(line) - len(head.partition(b"\\r\\n\\r\\n")[2]), bytearray(1 << 18)
            while left > 0:
                left -= c.recv_into(buffer)
            c.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
listener = socket.create_server(("0.0.0.0", 8000), backlog=64)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
# The same client for both, so that only the way differs: address, port, Host, token, method, bytes.
CLIENT = """
import http.client, json, sys, time
address, port, host, token, method, size = json.load(sys.stdin)
connection = http.client.HTTPConnection(address, port)
began = time.perf_counter()
connection.putrequest(method, f"/{size}", skip_host=True)
for name, value in (("Host", host), ("X-API-Key", token)):
    connection.putheader(name, value)
if method == "POST":
    connection.putheader("Content-Length", str(size))
connection.endheaders()
piece = bytes(1 << 18)
for _ in range(size // len(piece) if method == "POST" else 0):
    connection.send(piece)
answer = connection.getresponse()
assert answer.status == 200, answer.read()
buffer, got = bytearray(1 << 18), 0
while count := answer.readinto(buffer):
    got += count
assert method == "POST" or got == size
print(time.perf_counter() - began)
"""


def measure(server: Server, *, tries: int) -> list[Row]:
    """Bodies of 128 MB out of a guest and into it, and a small request; MB are 10^6 bytes."""
    down = Row(
        "share throughput",
        f"{SIZE_MB} MB out of a published port",
        "MB/s",
        Budget(at_least=True, ratios={"direct": 0.3}),
    )
    up = Row(
        "share upload", f"{SIZE_MB} MB into a published port", "MB/s", Budget(at_least=True, ratios={"direct": 0.3})
    )
    small = Row("share request", "a small request to a published port")
    room = Room(server, server.profile("bench-ports", warm_pool_size=0), "ports")
    room.create()
    server.upload(f"{room.path}/file/home/user/server.py", SERVER.encode(), 1)
    room.run("setsid python3 server.py > log 2>&1 & until grep -q ':1F40 .* 0A ' /proc/net/tcp; do sleep 0.1; done")
    address = room.run("hostname -I")["output"].split()[0]
    label = base64.b32encode(UUID(server.internal_id(room)).bytes).decode().rstrip("=").lower()
    host = f"{label}-{PORT}.localhost"
    router = f"ik{server.settings.server_id}-router"
    # Nothing may open a connection to a guest; for the peer's sake answers of this port get through.
    inside = ["ip", "netns", "exec", router]
    subprocess.run(
        [*inside, "nft", "insert", "rule", "ip", "innkeeper", "local", "tcp", "sport", str(PORT), "accept"], check=True
    )

    def carry(row: Row, method: str, *, size: int, direct: bool) -> float | None:
        where = (address, PORT) if direct else ("127.0.0.1", server.port)
        done = subprocess.run(
            [*(inside if direct else ()), sys.executable, "-c", CLIENT],
            input=json.dumps([*where, host, "" if direct else server.token, method, size]),
            capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]},
        )  # fmt: skip
        if done.returncode:
            row.failures.append(done.stderr.strip().rpartition("\n")[2])
            return None
        return float(done.stdout)

    try:
        for _ in range(tries):
            for row, method in ((down, "GET"), (up, "POST")):
                for direct in (False, True):
                    target = row.peer("direct") if direct else row
                    took = carry(target, method, size=SIZE_MB * 1_048_576, direct=direct)
                    if took is not None:
                        target.values.append(SIZE_MB * 1.048576 / took)
        for _ in range(tries * 5):
            small.take(lambda: _ask(server, host))
    finally:
        room.destroy()
    return [down, up, small]


def _ask(server: Server, host: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/0", headers={"Host": host, "X-API-Key": server.token})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    if answer.status != 200:
        raise RefusedError(str(answer.status))
