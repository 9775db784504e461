"""Runs in a guest: tries every [kind, address, port] of the JSON list in the file argv[1] and prints a JSON list of what came of each: `reached`, or the
error's name. Kinds: tcp (a connection), udp (an answer to a datagram), ping (an ICMP echo), name (an address for a name).
"""

import errno
import json
import os
import socket
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SECONDS = float(os.environ.get("SECONDS", "2"))


def tcp(address: str, port: int) -> str:
    socket.create_connection((address, port), timeout=SECONDS).close()
    return "reached"


def udp(address: str, port: int) -> str:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(SECONDS)
        if address.endswith(".255") or address.startswith("22"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sock.sendto(b"x", (address, port))
        else:
            sock.connect((address, port))
            sock.send(b"x")
        sock.recv(2048)
    return "reached"


def ping(address: str, _: int) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP) as sock:
        sock.settimeout(SECONDS)
        sock.connect((address, 0))
        sock.send(struct.pack("!BBHHH", 8, 0, 0, 0, 1) + b"x" * 8)
        return "reached" if sock.recv(2048)[0] == 0 else "refused"


def name(text: str, _: int) -> str:
    return ",".join(
        sorted({str(row[4][0]) for row in socket.getaddrinfo(text, 80, socket.AF_INET, socket.SOCK_STREAM)})
    )


def attempt(target: list[Any]) -> str:
    kind, address, port = target
    try:
        return {"tcp": tcp, "udp": udp, "ping": ping, "name": name}[kind](address, port)
    except TimeoutError:
        return "timeout"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)


with Path(sys.argv[1]).open() as file, ThreadPoolExecutor(24) as pool:
    print(json.dumps(list(pool.map(attempt, json.load(file)))))
