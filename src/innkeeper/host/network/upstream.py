"""Asking name servers: the host's own, or those that the operator names; sockets in the host's namespace."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import structlog
from dnslib import RCODE, DNSRecord  # type: ignore[import-untyped]

from innkeeper.host.linux import netns
from innkeeper.host.network import dns_answers
from innkeeper.host.network.dns_answers import Question

log = structlog.stdlib.get_logger(__name__)

UPSTREAM_SECONDS = 2.0
UPSTREAM_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Upstream:
    """A name server to ask: numeric address (IPv6 with %scope where it has one) and port."""

    host: str
    port: int = 53


def parse_resolv_conf(text: str) -> list[Upstream]:
    """The name servers of a resolv.conf in its order; the local one when it names none, as resolv.conf(5) says."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            with contextlib.suppress(ValueError):
                ip_address(words[1])
                found.append(Upstream(words[1]))
    return found or [Upstream("127.0.0.1")]


def parse_upstream(text: str) -> Upstream:
    """A name server of the setting `dns_upstreams`: `address`, `address:port` or `[address]:port`."""
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        return Upstream(host, int(port.removeprefix(":") or 53))
    if text.count(":") == 1:
        host, _, port = text.partition(":")
        return Upstream(host, int(port))
    return Upstream(text)


class HostUpstreams:
    """The host's own name servers, read again when the file changes."""

    def __init__(self, path: Path = Path("/etc/resolv.conf")) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._upstreams = [Upstream("127.0.0.1")]

    def __call__(self) -> Sequence[Upstream]:
        """The name servers as of now."""
        try:
            status = self._path.stat()
            if self._stamp != (status.st_mtime_ns, status.st_ino):
                self._upstreams = parse_resolv_conf(self._path.read_text(errors="replace"))
                self._stamp = (status.st_mtime_ns, status.st_ino)
        except OSError as error:
            log.warning("resolv.conf cannot be read; the name servers known so far stay", reason=str(error))
        return self._upstreams


class NameServers:
    """Asks the name servers that `upstreams` names, from the namespace `host_netns` (None: ours). `failures` counts tries that brought no answer."""

    def __init__(self, upstreams: Callable[[], Sequence[Upstream]], *, host_netns: str | None = None) -> None:
        self._upstreams = upstreams
        self._host_netns = host_netns
        self.failures = 0

    async def ask(self, question: Question, *, over_tcp: bool) -> DNSRecord | None:
        """The reply of the first name server that answers, each asked in turn, twice; None when none did. It may be cut unless `over_tcp`."""
        for _ in range(UPSTREAM_ROUNDS):
            for upstream in self._upstreams():
                message_id = secrets.randbelow(65536)
                query = dns_answers.upstream_query(question, message_id)
                with contextlib.suppress(OSError, ValueError, EOFError):
                    async with asyncio.timeout(UPSTREAM_SECONDS):
                        reply = await self._exchange_udp(upstream, query, question, message_id)
                        if reply.header.tc and over_tcp:
                            packet = await self._exchange_tcp(upstream, query)
                            reply = dns_answers.parse_reply(packet, question, message_id)
                    if reply.header.rcode in (RCODE.NOERROR, RCODE.NXDOMAIN):
                        return reply
                self.failures += 1
        return None

    async def _exchange_udp(self, upstream: Upstream, query: bytes, question: Question, message_id: int) -> DNSRecord:
        loop = asyncio.get_running_loop()
        # A socket of its own for every question: connected, so that the kernel drops what others send, and on a random
        # port, so that nobody off the path can guess it.
        with await self._connected(upstream, socket.SOCK_DGRAM) as sock:
            await loop.sock_sendall(sock, query)
            while True:
                packet = await loop.sock_recv(sock, 65535)
                with contextlib.suppress(ValueError):
                    return dns_answers.parse_reply(packet, question, message_id)

    async def _exchange_tcp(self, upstream: Upstream, query: bytes) -> bytes:
        with await self._connected(upstream, socket.SOCK_STREAM) as sock:
            reader, writer = await asyncio.open_connection(sock=sock)
            try:
                writer.write(len(query).to_bytes(2, "big") + query)
                return await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
            finally:
                writer.transport.abort()

    async def _connected(self, upstream: Upstream, kind: socket.SocketKind) -> socket.socket:
        """A socket in the host's namespace; numeric addresses only, so getaddrinfo(3) asks nobody."""
        family, _, _, _, address = socket.getaddrinfo(
            upstream.host, upstream.port, type=kind, flags=socket.AI_NUMERICHOST
        )[0]
        sock = netns.call_inside(self._host_netns, lambda: socket.socket(family, kind))
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        return sock
