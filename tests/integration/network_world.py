"""A small internet inside namespaces: a host, and beyond it a server with public-looking and private addresses."""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import TypeVar

from dnslib import AAAA, QTYPE, RR, TXT, A, DNSRecord

from innkeeper.host.linux import netns, nftables
from innkeeper.host.network.firewall import FirewallLimits
from innkeeper.host.network.network import NetworkSettings
from innkeeper.host.network.upstream import Upstream

T = TypeVar("T")

SERVER = "8.8.8.1"
HOST = "8.8.8.2"
HOST_ELSEWHERE = "8.8.4.4"
HOST_PRIVATE = "10.44.0.1"
# Addresses that really answer beyond the host, so that "refused" is never just "unreachable".
FORBIDDEN = (
    "10.9.9.9",
    "100.100.1.1",
    "169.254.169.254",
    "172.20.0.1",
    "192.0.0.192",
    "192.168.77.1",
    "198.18.0.1",
    "203.0.113.7",
)
PUBLISHED_PORT = 9090
SERVER_PORTS = (25, 53, 80, 443, 853)


@dataclass
class World:
    """Names and what the server at SERVER saw."""

    host: str
    internet: str
    datagrams: list[tuple[bytes, str]] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)

    def settings(self, *, pool_size: int = 2, limits: FirewallLimits | None = None) -> NetworkSettings:
        return NetworkSettings(
            limits=limits or FirewallLimits(),
            pool_size=pool_size,
            upstreams=(Upstream(SERVER),),
            host_netns=self.host,
        )


@contextlib.asynccontextmanager
async def world() -> AsyncIterator[World]:
    host, internet = f"iktest{os.getpid()}h", f"iktest{os.getpid()}i"
    there = World(host, internet)
    await netns.ip_batch([f"netns add {host}", f"netns add {internet}"])
    try:
        await netns.ip_batch(
            [
                f"link add wan type veth peer name wan netns {internet}",
                "link set lo up",
                f"addr add {HOST}/24 dev wan",
                f"addr add {HOST_ELSEWHERE}/32 dev lo",
                f"addr add {HOST_PRIVATE}/24 dev lo",
                "link set wan up",
                f"route add default via {SERVER}",
            ],
            inside=host,
        )
        await netns.ip_batch(
            [
                "link set lo up",
                f"addr add {SERVER}/24 dev wan",
                "link set wan up",
                *(f"addr add {address}/32 dev lo" for address in FORBIDDEN),
                # The internet knows the way to the guests: only the firewall stands between.
                *(f"route add {subnet} via {HOST}" for subnet in ("100.64.0.0/10", "172.30.0.0/16")),
            ],
            inside=internet,
        )
        # What a container engine does for a published port.
        await nftables.apply(
            f"""table ip published {{
                chain p {{
                type nat hook prerouting priority dstnat
                fib daddr type local tcp dport {PUBLISHED_PORT} dnat to {SERVER}:80
                }}
            }}
            """,
            inside=host,
        )
        async with contextlib.AsyncExitStack() as stack:
            for port in SERVER_PORTS:
                await stack.enter_async_context(serve_tcp(internet, port, there))
            await stack.enter_async_context(serve_tcp(host, 8080, there))
            for port in (53, 5000):
                await stack.enter_async_context(serve_udp(internet, port, there))
            yield there
    finally:
        await netns.delete(host)
        await netns.delete(internet)


@contextlib.asynccontextmanager
async def serve_tcp(inside: str, port: int, there: World, address: str = "0.0.0.0") -> AsyncIterator[None]:
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            if port == 53:
                question = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
                reply = dns_reply(question, there, over_tcp=True) or b""
                writer.write(len(reply).to_bytes(2, "big") + reply)
            else:
                writer.write(b"hello\n")
                while line := await reader.readline():
                    writer.write(line)
            await writer.drain()
        writer.close()

    def listen() -> socket.socket:
        return socket.create_server((address, port))

    server = await asyncio.start_server(serve, sock=netns.call_inside(inside, listen))
    try:
        yield
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0)  # the transports close on the next turn of the loop


@contextlib.asynccontextmanager
async def serve_udp(inside: str, port: int, there: World) -> AsyncIterator[None]:
    class Datagrams(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
            self.transport = transport

        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            there.datagrams.append((data, addr[0]))
            reply = dns_reply(data, there, over_tcp=False) if port == 53 else data
            if reply:
                self.transport.sendto(reply, addr)

    def bind() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("0.0.0.0", port))
        return sock

    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        Datagrams, sock=netns.call_inside(inside, bind)
    )
    try:
        yield
    finally:
        transport.close()


def dns_reply(packet: bytes, there: World, *, over_tcp: bool) -> bytes | None:
    record = DNSRecord.parse(packet)
    name = str(record.q.qname).rstrip(".")
    there.questions.append(f"{name} {QTYPE[record.q.qtype]}")
    reply = record.reply()
    if name == "good.test":
        reply.add_answer(RR(name, QTYPE.A, rdata=A(SERVER), ttl=60))
    elif name == "rebind.test":
        reply.add_answer(*(RR(name, QTYPE.A, rdata=A(address), ttl=60) for address in ("10.9.9.9", SERVER)))
    elif name == "inside.test":
        reply.add_answer(RR(name, QTYPE.A, rdata=A("169.254.169.254"), ttl=60))
    elif name == "six.test":
        reply.add_answer(RR(name, QTYPE.AAAA, rdata=AAAA("2001:db8::1"), ttl=60))
    elif name == "big.test":
        if over_tcp:
            reply.add_answer(*(RR(name, QTYPE.TXT, rdata=TXT(f"{n}" * 60), ttl=60) for n in range(100, 150)))
        else:
            reply.header.tc = 1
    elif name == "silent.test":
        return None
    else:
        reply.header.rcode = 3
    return bytes(reply.pack())


async def inside(name: str, function: Callable[[], T]) -> T:
    """Run a blocking function in a namespace, off the event loop that serves the world."""
    return await asyncio.to_thread(netns.call_inside, name, function)


async def tcp(name: str, address: str | IPv4Address, port: int = 80, *, seconds: float = 1.0) -> str:
    """`ok`, or the errno's name: ECONNREFUSED for a reset, `timeout` for silence."""

    def connect() -> str:
        try:
            with socket.create_connection((str(address), port), timeout=seconds) as sock:
                return "ok" if sock.recv(1) or port == 53 else "closed"
        except TimeoutError:
            return "timeout"
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))

    return await inside(name, connect)


async def ping(name: str, address: str | IPv4Address) -> bool:
    """Whether an ICMP echo comes back."""

    def echo() -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
            sock.settimeout(0.5)
            try:
                sock.sendto(b"\x08\x00\xf7\xfd\x00\x01\x00\x01", (str(address), 0))
                while True:
                    if sock.recv(100)[20] == 0:
                        return True
            except OSError:
                return False

    return await inside(name, echo)


async def udp(name: str, address: str | IPv4Address, port: int = 5000, payload: bytes = b"x") -> bytes | str:
    def exchange() -> bytes | str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(1)
            try:
                sock.connect((str(address), port))
                sock.send(payload)
                return sock.recv(65535)
            except TimeoutError:
                return "timeout"
            except OSError as error:
                return errno.errorcode.get(error.errno or 0, str(error))

    return await inside(name, exchange)


async def ask(
    name: str, resolver: str | IPv4Address, question: str, qtype: str = "A", *, over_tcp: bool = False
) -> DNSRecord:
    packet = DNSRecord.question(question, qtype).pack()

    def exchange_tcp() -> bytes:
        with socket.create_connection((str(resolver), 53), timeout=10) as sock, sock.makefile("rb") as file:
            sock.sendall(len(packet).to_bytes(2, "big") + packet)
            return file.read(int.from_bytes(file.read(2), "big"))

    def exchange_udp() -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(10)
            sock.connect((str(resolver), 53))
            sock.send(packet)
            return sock.recv(65535)

    return DNSRecord.parse(await inside(name, exchange_tcp if over_tcp else exchange_udp))


async def leftovers(server_ids: list[str], there: World | None = None) -> list[str]:
    """Everything of these servers that still exists."""
    left = [name for server_id in server_ids for name in netns.names(f"ik{server_id}")]
    inside_host = there.host if there else None
    links = (await netns.run_inside(inside_host, ["ip", "-o", "link"])).stdout.decode()
    left += [f"link of {server_id}" for server_id in server_ids if f"ik{server_id}" in links]
    tables = (await netns.run_inside(inside_host, ["nft", "list", "tables"])).stdout.decode()
    left += [f"table of {server_id}" for server_id in server_ids if f"innkeeper_{server_id}" in tables]
    return left


def run_directory(tmp_path: Path) -> Path:
    return tmp_path / "run"
