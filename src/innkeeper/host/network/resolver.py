"""The guests' name server: sockets in the router's namespace, questions asked from the host's.

A socket belongs to the namespace where it was made, whatever the process does later; so one process serves both sides.
"""

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Protocol, cast

import structlog
from dnslib import RCODE  # type: ignore[import-untyped]

from innkeeper.host.linux import netns
from innkeeper.host.network import dns_answers
from innkeeper.host.network.dns_answers import Question
from innkeeper.host.network.upstream import NameServers

log = structlog.stdlib.get_logger(__name__)

IN_FLIGHT_PER_GUEST = 64
IN_FLIGHT = 512
TCP_CONNECTIONS_PER_GUEST = 8
TCP_IDLE_SECONDS = 10.0
# UDP questions are counted by the firewall. A connection earns its next question by waiting, the longer the larger the answer was: eight of them
# may ask as much as the firewall lets through by UDP, and no guest keeps the daemon busy with the answers of a zone of its own.
TCP_PAUSE_SECONDS = 0.04
TCP_BYTES_PER_SECOND = 16_384
ANSWERED, REFUSED, FAILED, MALFORMED = OUTCOMES = ("answered", "refused", "failed", "malformed")
# Of one guest too many questions, or too many connections; or too many of all guests.
GUEST_QUESTIONS, GUEST_CONNECTIONS, FULL = DROPS = ("guest_questions", "guest_connections", "full")


class Decide(Protocol):
    """The policy's word on a name: False answers NXDOMAIN."""

    def __call__(self, guest_ip: IPv4Address, name: str) -> bool:
        """Whether this guest may know this name (lower case, no last dot)."""


def everything(guest_ip: IPv4Address, name: str) -> bool:
    """The policy that refuses no name."""
    return True


@dataclass(slots=True)
class ResolverCounts:
    """What became of questions: `outcomes` of those that were taken, `dropped` by reason of those that were not."""

    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DROPS, 0))


class Resolver:
    """Answers guests on UDP and TCP port 53 of one address; use as `async with resolver.serving():`."""

    def __init__(
        self,
        address: IPv4Address,
        *,
        inside: str,
        name_servers: NameServers,
        may_be_told: Callable[[IPv4Address], bool],
        decide: Decide = everything,
    ) -> None:
        self._address = address
        self._inside = inside
        self._name_servers = name_servers
        self._may_be_told = may_be_told
        self._decide = decide
        self.counts = ResolverCounts()
        self._asking: Counter[str] = Counter()
        self._connections: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def in_flight(self) -> int:
        """Questions that are being answered now."""
        return self._asking.total()

    @property
    def upstream_failures(self) -> int:
        """Tries of a name server that brought no answer."""
        return self._name_servers.failures

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
        if not self._takes(sender[0]):
            return

        async def reply() -> None:
            question, packet_out = await self._answer(packet, sender[0], over_tcp=False)
            if packet_out is not None and not transport.is_closing():
                transport.sendto(dns_answers.for_udp(question, packet_out) if question else packet_out, sender)

        task = asyncio.get_running_loop().create_task(reply())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _takes(self, guest: str) -> bool:
        """Whether a further question of the guest is taken; counts it when not."""
        # A name server that never answers keeps questions open. Where all places are taken, those who have less than an equal share still get in,
        # so that some guests who ask such a one cannot keep the others from the network.
        taken = self._asking[guest]
        if taken >= IN_FLIGHT_PER_GUEST:
            self.counts.dropped[GUEST_QUESTIONS] += 1
            return False
        if self._asking.total() >= IN_FLIGHT and taken >= IN_FLIGHT // (len(self._asking) + 1):
            self.counts.dropped[FULL] += 1
            return False
        return True

    async def _serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        guest = str(writer.get_extra_info("peername", ("", 0))[0])
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._connections[guest] += 1
        try:
            if self._connections[guest] > TCP_CONNECTIONS_PER_GUEST:
                self.counts.dropped[GUEST_CONNECTIONS] += 1
                return
            while self._takes(guest):
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
            self.counts.outcomes[MALFORMED] += 1
            return None, dns_answers.refusal(packet, RCODE.FORMERR)
        except Exception:  # whatever bytes of a guest or of a name server provoke in dnslib
            self.counts.outcomes[FAILED] += 1
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
            self.counts.outcomes[REFUSED] += 1
            log.info("name refused", guest=str(guest), name=question.name, type=question.type_name)
            return dns_answers.answer(question, rcode=RCODE.NXDOMAIN)
        if (early := dns_answers.early_answer(question)) is not None:
            self.counts.outcomes[ANSWERED] += 1
            return early
        reply = await self._name_servers.ask(question, over_tcp=over_tcp)
        if reply is None:
            self.counts.outcomes[FAILED] += 1
            return dns_answers.answer(question, rcode=RCODE.SERVFAIL)
        self.counts.outcomes[ANSWERED] += 1
        if reply.header.tc:
            # The guest asks again over TCP, as it would for anything long; fetching it now would be work for nothing.
            return dns_answers.answer(question, truncated=True)
        filtered = dns_answers.filtered(question, reply, self._may_be_told)
        if filtered.withheld:
            withheld = [str(address) for address in filtered.withheld]
            log.info("addresses withheld", guest=str(guest), name=question.name, addresses=withheld)
        return filtered.packet


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # Python 3.11's is no subclass of it

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if self._transport is not None:
            self._resolver.datagram(data, addr, self._transport)
