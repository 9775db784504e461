"""Runs as root in a guest: tries what would let it send packets of its own making, and prints what came of each as JSON."""

import fcntl
import json
import socket
import struct
from collections.abc import Callable

SOURCE_ROUTE = b"\x83\x07\x04\x08\x08\x08\x01\x00"
ADDRESS = struct.pack("16sH14s", b"eth0", socket.AF_INET, b"\0\0" + bytes([8, 8, 8, 77]) + bytes(8))
said: dict[str, str] = {}


def attempt(name: str, action: Callable[[], object]) -> None:
    try:
        action()
        said[name] = "done"
    except OSError as error:
        said[name] = error.strerror or "failed"


attempt("packet socket", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x300))
attempt("cooked packet socket", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0x300))
for protocol in (socket.IPPROTO_RAW, socket.IPPROTO_ICMP, socket.IPPROTO_TCP, socket.IPPROTO_UDP):
    attempt(
        f"raw socket {protocol}", lambda protocol=protocol: socket.socket(socket.AF_INET, socket.SOCK_RAW, protocol)
    )
attempt("raw socket 6", lambda: socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW))
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    # gVisor takes options that it then ignores; what counts is whether the address can be used.
    for option, value in ((19, struct.pack("i", 1)), (15, struct.pack("i", 1)), (4, SOURCE_ROUTE)):
        try:
            sock.setsockopt(socket.IPPROTO_IP, option, value)
        except OSError:
            continue
    for address in ("8.8.8.77", "8.8.8.2", "10.44.0.1"):
        attempt(f"bind {address}", lambda address=address: sock.bind((address, 0)))
    for request, name in (
        (0x8916, "address"),
        (0x8914, "flags"),
        (0x8924, "mac"),
        (0x890B, "route"),
        (0x8955, "arp entry"),
    ):
        attempt(f"set {name}", lambda request=request: fcntl.ioctl(sock, request, ADDRESS))
print(json.dumps(said))
