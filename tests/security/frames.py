"""Frames of an attacker's own making, and the ears that hear whether one arrived."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tests.integration import network_world as nw

from innkeeper.host.linux import netns
from innkeeper.host.network.addressing import Slot

ETHERNET_IP, ETHERNET_ARP, ETHERNET_VLAN, ETHERNET_SIX = 0x0800, 0x0806, 0x8100, 0x86DD
UDP, ICMP, TCP, IGMP, IPIP, GRE, SCTP, SIX_IN_FOUR, ESP = 17, 1, 6, 2, 4, 47, 132, 41, 50
BROADCAST = "ff:ff:ff:ff:ff:ff"
ALL = 0x0003
Frames = dict[str, list[bytes]]


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packet(
    source: object,
    target: object,
    protocol: int,
    body: bytes,
    *,
    options: bytes = b"",
    ttl: int = 64,
    fragment: int = 0,
    ident: int = 1,
) -> bytes:
    options += b"\0" * (-len(options) % 4)
    first = 0x40 | (20 + len(options)) // 4
    head = struct.pack("!BBHHHBBH", first, 0, 20 + len(options) + len(body), ident, fragment, ttl, protocol, 0)
    head += socket.inet_aton(str(source)) + socket.inet_aton(str(target)) + options
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body


def udp(payload: bytes, port: int = 5000) -> bytes:
    return struct.pack("!HHHH", 40_000, port, 8 + len(payload), 0) + payload


def icmp(kind: int, code: int, rest: bytes) -> bytes:
    return struct.pack("!BBH", kind, code, checksum(struct.pack("!BBH", kind, code, 0) + rest)) + rest


def frame(
    slot: Slot, content: bytes, *, to: str | None = None, source: str | None = None, kind: int = ETHERNET_IP
) -> bytes:
    addresses = (to or slot.gateway_mac) + (source or slot.mac)
    return bytes.fromhex(addresses.replace(":", "")) + struct.pack("!H", kind) + content


@contextmanager
def listening(*places: tuple[str, str], leaving: Sequence[tuple[str, str]] = ()) -> Iterator[list[bytes]]:
    """Every frame that arrives at these (namespace, interface), and that leaves through those of `leaving`, while the block runs."""

    def open_in(interface: str) -> Callable[[], socket.socket]:
        def make() -> socket.socket:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL))
            sock.bind((interface, ALL))
            sock.settimeout(0.1)
            return sock

        return make

    heard: list[bytes] = []
    over = threading.Event()
    ears = [
        (netns.call_inside(namespace, open_in(interface)), outgoing)
        for outgoing, where in ((False, places), (True, leaving))
        for namespace, interface in where
    ]

    def listen(sock: socket.socket, outgoing: bool) -> None:
        while not over.is_set():
            try:
                data, address = sock.recvfrom(65535)
            except TimeoutError:
                continue
            if (address[2] == socket.PACKET_OUTGOING) == outgoing:
                heard.append(data)

    threads = [threading.Thread(target=listen, args=ear) for ear in ears]
    for thread in threads:
        thread.start()
    try:
        yield heard
    finally:
        over.set()
        for thread in threads:
            thread.join()
        for sock, _ in ears:
            sock.close()


def attacks(slot: Slot, other: Slot, mark: bytes) -> Frames:
    """Every attack by its name; whatever of `mark` arrives anywhere is a hole."""
    own, server, host = slot.guest_ip, nw.SERVER, nw.HOST

    def route(kind: int, *hops: str) -> bytes:
        """A source route option: loose (0x83), strict (0x89) or the recording kind (0x07)."""
        return bytes([kind, 3 + 4 * len(hops), 4]) + b"".join(map(socket.inet_aton, hops))

    def to(target: object, **extras: object) -> bytes:
        return frame(slot, packet(own, target, UDP, udp(mark), **extras))  # type: ignore[arg-type]

    inner = packet("8.8.8.77", other.guest_ip, UDP, udp(mark))
    arp = (
        struct.pack("!HHBBH", 1, ETHERNET_IP, 6, 4, 2)
        + bytes.fromhex(other.mac.replace(":", ""))
        + socket.inet_aton(str(other.guest_ip))
        + b"\0" * 10
    )
    dhcp = struct.pack("!BBBBIHH", 2, 1, 6, 0, 7, 0, 0) + mark
    return {
        "loose source route to the host": [to(server, options=route(0x83, host, "10.9.9.9"))],
        "strict source route to a neighbour": [to(other.gateway_ip, options=route(0x89, str(other.guest_ip)))],
        "loose source route past the host": [to(host, options=route(0x83, server))],
        "forged sources": [
            frame(slot, packet(source, server, UDP, udp(mark)))
            for source in (other.guest_ip, slot.gateway_ip, host, "127.0.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "8.8.8.77", server)
        ],
        "forged hardware address": [frame(slot, packet(own, server, UDP, udp(mark)), source=other.mac)],
        "a neighbour's whole identity": [frame(slot, packet(other.guest_ip, server, UDP, udp(mark)), source=other.mac)],
        "land": [frame(slot, packet(slot.gateway_ip, slot.gateway_ip, UDP, udp(mark, 53)))],
        "loopback from outside": [to("127.0.0.1"), frame(slot, packet("127.0.0.1", "127.0.0.1", UDP, udp(mark)))],
        "to a neighbour": [to(other.guest_ip), frame(slot, packet(own, other.guest_ip, UDP, udp(mark)), to=other.mac)],
        "broadcast and multicast": [
            frame(slot, packet(own, target, UDP, udp(mark, port)), to=mac)
            for target, port, mac in (
                ("255.255.255.255", 67, BROADCAST), ("224.0.0.251", 5353, "01:00:5e:00:00:fb"), ("239.255.255.250", 1900, "01:00:5e:7f:ff:fa"),
                (str(other.guest_ip), 5000, BROADCAST), (host, 8080, BROADCAST), (str(slot.gateway_ip + 2), 67, BROADCAST),
            )
        ],
        "DHCP offers": [frame(slot, packet(own, "255.255.255.255", UDP, struct.pack("!HHHH", 67, 68, 8 + len(dhcp), 0) + dhcp), to=BROADCAST)],
        "router advertisement": [
            frame(slot, b"\x60\0\0\0" + struct.pack("!HBB", 16 + len(mark), 58, 255) + bytes(16) + socket.inet_pton(socket.AF_INET6, "ff02::1")
                  + b"\x86\0\0\0\x40\0\x07\x08" + bytes(8) + mark, to="33:33:00:00:00:01", kind=ETHERNET_SIX)
        ],
        "ICMP redirect": [
            frame(slot, packet(own, target, ICMP, icmp(5, 1, socket.inet_aton(str(own)) + packet(target, server, UDP, udp(mark))[:40])))
            for target in (slot.gateway_ip, other.guest_ip, host)
        ],
        "other ICMP": [frame(slot, packet(own, server, ICMP, icmp(kind, 0, b"\0\1\0\1" + mark))) for kind in (0, 3, 4, 9, 10, 11, 12, 13, 17)],
        "other protocols": [frame(slot, packet(own, server, protocol, mark)) for protocol in (IGMP, ESP, SCTP, 89, 112, 255)],
        "tunnels to a neighbour": [
            frame(slot, packet(own, target, protocol, head + inner))
            for target in (server, host, slot.gateway_ip)
            for protocol, head in ((IPIP, b""), (GRE, b"\0\0\x08\0"), (SIX_IN_FOUR, b""))
        ],
        "VLAN tags": [frame(slot, struct.pack("!HH", 1, ETHERNET_IP) + packet(own, other.guest_ip, UDP, udp(mark)), kind=ETHERNET_VLAN)],
        "gratuitous ARP": [frame(slot, arp + mark, to=BROADCAST, source=other.mac, kind=ETHERNET_ARP)],
        "a port hidden in a later fragment": [
            frame(slot, packet(own, server, TCP, bytes(8), fragment=0x2000, ident=78)),
            frame(slot, packet(own, server, TCP, mark + bytes(16), fragment=0x0001, ident=78)),
        ],
        "DNS in fragments to another server": [
            frame(slot, packet(own, server, UDP, udp(mark + bytes(40), 53)[:16], fragment=0x2000, ident=79)),
            frame(slot, packet(own, server, UDP, udp(mark + bytes(40), 53)[16:], fragment=0x0002, ident=79)),
        ],
    }  # fmt: skip
