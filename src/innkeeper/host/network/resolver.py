"""The guests' name server: sockets in the router's namespace, questions asked from the host's.

A socket belongs to the namespace where it was made, whatever the process does later; so one process serves both sides.
"""

import asyncio
import contextlib
import secrets
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import Protocol, cast

import structlog
from dnslib import RCODE, DNSRecord  # type: ignore[import-untyped]

from innkeeper.host.linux import netns
from innkeeper.host.network import dns_answers
from innkeeper.host.network.dns_answers import Question

log = structlog.stdlib.get_logger(__name__)

IN_FLIGHT_PER_GUEST = 64
IN_FLIGHT = 512
TCP_CONNECTIONS_PER_GUEST = 8
TCP_IDLE_SECONDS = 10.0
# UDP questions are counted by the firewall. A connection earns its next question by waiting, the longer the larger the answer was: eight of them
# may ask as much as the firewall lets through by UDP, and no guest keeps the daemon busy with the answers of a zone of its own.
TCP_PAUSE_SECONDS = 0.04
TCP_BYTES_PER_SECOND = 16_384
UPSTREAM_SECONDS = 2.0
UPSTREAM_ROUNDS = 2


class Decide(Protocol):
    """The policy's word on a name: False answers NXDOMAIN."""

    def __call__(self, guest_ip: IPv4Address, name: str) -> bool:
        """Whether this guest may know this name (lower case, no last dot)."""


def everything(guest_ip: IPv4Address, name: str) -> bool:
    """The policy that refuses no name."""
    return True


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


class Resolver:
    """Answers guests on UDP and TCP port 53 of one address; use as `async with resolver.serving():`."""

    def __init__(
        self,
        address: IPv4Address,
        *,
        inside: str,
        upstreams: Callable[[], Sequence[Upstream]],
        may_be_told: Callable[[IPv4Address], bool],
        decide: Decide = everything,
        host_netns: str | None = None,
    ) -> None:
        self._address = address
        self._inside = inside
        self._upstreams = upstreams
        self._may_be_told = may_be_told
        self._decide = decide
        self._host_netns = host_netns
        self._asking: Counter[str] = Counter()
        self._connections: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["Resolver"]:
        """Serve until the block ends. Raises OSError when the address cannot be bound."""
        udp, tcp = netns.call_inside(self._inside, self._listen)
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: _Datagrams(self), sock=udp)
        server = await asyncio.start_server(self._serve_connection, sock=tcp)
        try:
            yield self
        finally:
            transport.close()
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await server.wait_closed()

    def _listen(self) -> tuple[socket.socket, socket.socket]:
        address = (str(self._address), 53)
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for listener in (udp, tcp):
                listener.setblocking(False)
                listener.bind(address)
            tcp.listen(128)
        except OSError:
            udp.close()
            tcp.close()
            raise
        return udp, tcp

    def datagram(self, packet: bytes, sender: tuple[str, int], transport: asyncio.DatagramTransport) -> None:
        """Take a guest's packet; drops it when the guest, or all together, have too many questions open."""
        if not self._has_room(sender[0]):
            return

        async def reply() -> None:
            question, packet_out = await self._answer(packet, sender[0], over_tcp=False)
            if packet_out is not None and not transport.is_closing():
                transport.sendto(dns_answers.for_udp(question, packet_out) if question else packet_out, sender)

        task = asyncio.get_running_loop().create_task(reply())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _has_room(self, guest: str) -> bool:
        # A name server that never answers keeps questions open. Where all places are taken, those who have less than an equal share still get in,
        # so that some guests who ask such a one cannot keep the others from the network.
        taken = self._asking[guest]
        if taken >= IN_FLIGHT_PER_GUEST:
            return False
        return self._asking.total() < IN_FLIGHT or taken < IN_FLIGHT // (len(self._asking) + 1)

    async def _serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        guest = str(writer.get_extra_info("peername", ("", 0))[0])
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._connections[guest] += 1
        try:
            while self._connections[guest] <= TCP_CONNECTIONS_PER_GUEST and self._has_room(guest):
                async with asyncio.timeout(TCP_IDLE_SECONDS):
                    packet = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
                _, packet_out = await self._answer(packet, guest, over_tcp=True)
                if packet_out is None:
                    break
                writer.write(len(packet_out).to_bytes(2, "big") + packet_out)
                async with asyncio.timeout(TCP_IDLE_SECONDS):
                    await writer.drain()
                await asyncio.sleep(TCP_PAUSE_SECONDS + len(packet_out) / TCP_BYTES_PER_SECOND)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._release(self._connections, guest)
            writer.transport.abort()  # not close(): a guest that reads nothing would keep the buffer alive

    async def _answer(self, packet: bytes, guest: str, *, over_tcp: bool) -> tuple[Question | None, bytes | None]:
        self._asking[guest] += 1
        try:
            question = dns_answers.parse_question(packet)
            return question, await self._answer_question(question, IPv4Address(guest), over_tcp=over_tcp)
        except dns_answers.MalformedQuestionError:
            return None, dns_answers.refusal(packet, RCODE.FORMERR)
        except Exception:  # whatever bytes of a guest or of a name server provoke in dnslib
            log.exception("a question could not be answered", guest=guest)
            return None, dns_answers.refusal(packet, RCODE.SERVFAIL)
        finally:
            self._release(self._asking, guest)

    @staticmethod
    def _release(counter: Counter[str], guest: str) -> None:
        counter[guest] -= 1
        if counter[guest] <= 0:
            del counter[guest]

    async def _answer_question(self, question: Question, guest: IPv4Address, *, over_tcp: bool) -> bytes:
        if not self._decide(guest, question.name):
            log.info("name refused", guest=str(guest), name=question.name, type=question.type_name)
            return dns_answers.answer(question, rcode=RCODE.NXDOMAIN)
        if (early := dns_answers.early_answer(question)) is not None:
            return early
        reply = await self._ask(question, over_tcp=over_tcp)
        if reply is None:
            return dns_answers.answer(question, rcode=RCODE.SERVFAIL)
        if reply.header.tc:
            # The guest asks again over TCP, as it would for anything long; fetching it now would be work for nothing.
            return dns_answers.answer(question, truncated=True)
        filtered = dns_answers.filtered(question, reply, self._may_be_told)
        if filtered.withheld:
            withheld = [str(address) for address in filtered.withheld]
            log.info("addresses withheld", guest=str(guest), name=question.name, addresses=withheld)
        return filtered.packet

    async def _ask(self, question: Question, *, over_tcp: bool) -> DNSRecord | None:
        """Ask every name server in turn, twice, until one answers; the answer may be cut unless `over_tcp`."""
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


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # Python 3.11's is no subclass of it

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if self._transport is not None:
            self._resolver.datagram(data, addr, self._transport)
