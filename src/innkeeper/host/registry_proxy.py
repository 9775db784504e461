"""The only way out of an import's jail: an HTTP proxy that looks every name up itself, checks the addresses and dials one of those it checked.

Runs as a process of its own (`python -m innkeeper.host.registry_proxy SOCKET`), which becomes nobody before it serves. The listening socket lies in the
jail's network and arrives over the unix socket SOCKET; connections are made in the network where this runs. What redirects name comes here too, so it is
checked alike, and there is no moment between the check and the use: the address that was checked is the one that is dialled.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import encodings.idna  # noqa: F401 - looked up by name later, when files are out of reach
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from urllib.parse import urlsplit

from innkeeper.core.registry import HOST, RegistryPolicy, parse_policy

NOBODY = 65_534
HEAD_BYTES_MAX = 65_536
CONNECT_SECONDS = 20.0
IDLE_SECONDS = 60.0
PIECE = 262_144
NAME_MAX = 253
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
_AUTHORITY = re.compile(rf"({HOST}|\[[0-9a-fA-F:]+\]):([0-9]{{1,5}})")


# Addresses of a name, best first.
Lookup = Callable[[str], Awaitable[list[str]]]


class Refused(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """A connection that is not made; the text is for people."""


class Proxy:
    """Serves one jail. `max_bytes` is what may come in all, over all connections; `lookup` gives the addresses of a name."""

    def __init__(self, policy: RegistryPolicy, max_bytes: int, lookup: Lookup) -> None:
        self._policy = policy
        self._left = max_bytes
        self._lookup = lookup

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of the jail: CONNECT for TLS, or one plain request to a host that the operator allows."""
        with contextlib.closing(writer):
            try:
                async with asyncio.timeout(IDLE_SECONDS):
                    head = await reader.readuntil(b"\r\n\r\n")
                await self._answer(head, reader, writer)
            except Refused as refusal:
                report(str(refusal))
                writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                with contextlib.suppress(OSError):
                    await writer.drain()
            except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                pass

    async def _answer(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, _, headers = head.decode("latin-1").partition("\r\n")
        method, _, rest = line.partition(" ")
        target = rest.partition(" ")[0]
        if method == "CONNECT":
            host, port = authority(target)
            upstream = await self._dial(host, port)
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            parts = urlsplit(target)
            host, port = authority(f"{parts.netloc}" if ":" in parts.netloc else f"{parts.netloc}:80")
            if parts.scheme != "http" or not self._plain(host, port):
                raise Refused(f"{host}:{port} is not a host that may be asked without TLS")
            upstream = await self._dial(host, port)
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            kept = [one for one in headers.split("\r\n") if one and not one.lower().startswith(("proxy-", "connection:"))]  # fmt: skip
            upstream[1].write("\r\n".join([f"{method} {path} HTTP/1.1", *kept, "Connection: close", "", ""]).encode("latin-1"))  # fmt: skip
        with contextlib.closing(upstream[1]):
            out = asyncio.create_task(self._copy(reader, upstream[1], count=False))
            try:
                await self._copy(upstream[0], writer, count=True)
            finally:
                out.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await out

    def _plain(self, host: str, port: int) -> bool:
        return self._policy.may_be_insecure(f"{host}:{port}")

    async def _dial(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                addresses = await self._lookup(host.strip("[]"))
        except (OSError, TimeoutError, UnicodeError):
            addresses = []
        if not addresses:
            raise Refused(f"{host}: its address cannot be found")
        allowed = [text for text in addresses if self._may_dial(host, port, text)]
        if not allowed:
            raise Refused(f"{host}:{port} has no public address, and the operator allows no other")
        for address in allowed:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(CONNECT_SECONDS):
                    return await asyncio.open_connection(address, port, limit=PIECE)
        raise Refused(f"{host}:{port} does not answer")

    def _may_dial(self, host: str, port: int, text: str) -> bool:
        address = ip_address(text)
        if self._policy.names(host, port, address):
            return True
        # A public address may be the host's own, behind which are its own services.
        return self._policy.allows(host, port, address) and not is_own(text)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, count: bool) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            while True:
                async with asyncio.timeout(IDLE_SECONDS):
                    piece = await reader.read(PIECE)
                if not piece:
                    break
                if count:
                    self._left -= len(piece)
                    if self._left < 0:
                        report("the registry sent more than an import may fetch")
                        os._exit(4)
                writer.write(piece)
                await writer.drain()
        with contextlib.suppress(OSError, RuntimeError):
            writer.write_eof()


async def host_addresses(name: str) -> list[str]:
    """The addresses of a name, or of an address, as the host finds them. Raises OSError and UnicodeError."""
    found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(row[4][0]).partition("%")[0] for row in found))


def asking(name_servers: list[str]) -> Lookup:
    """Finds addresses at these name servers and nowhere else."""
    # Imported here, while files can be reached, and only where it is needed: it is half of what this process would take to start.
    from dnslib import QTYPE, DNSRecord  # type: ignore[import-untyped]

    from innkeeper.host.network.dns_answers import parse_question
    from innkeeper.host.network.upstream import NameServers, parse_upstream

    servers = [parse_upstream(text) for text in name_servers]
    asked = NameServers(lambda: servers)

    async def addresses(name: str) -> list[str]:
        with contextlib.suppress(ValueError):
            return [str(ip_address(name))]
        found = []
        for kind in ("A", "AAAA"):
            question = parse_question(DNSRecord.question(name, kind).pack())
            reply = await asked.ask(question, over_tcp=True)
            rows = [] if reply is None else reply.rr
            found += [str(row.rdata) for row in rows if row.rtype == getattr(QTYPE, kind)]
        return list(dict.fromkeys(found))

    return addresses


def is_own(address: str) -> bool:
    """Whether an address is one of this host's: only those can be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def authority(text: str) -> tuple[str, int]:
    """Host and port of `host:port`. Raises Refused."""
    found = _AUTHORITY.fullmatch(text)
    if found is None or len(found[1]) > NAME_MAX or not 0 < int(found[2]) <= 65_535:
        raise Refused("not a host and port")
    return found[1], int(found[2])


def report(sentence: str) -> None:
    """A line for whoever imports."""
    print(json.dumps({"refused": sentence}), flush=True)


async def _run(listener: socket.socket, proxy: Proxy) -> None:
    server = await asyncio.start_server(proxy.serve, sock=listener, limit=HEAD_BYTES_MAX)
    async with server:
        await server.serve_forever()


def main() -> None:
    """Take the listener, drop everything, serve until killed."""
    plan = json.loads(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)
    policy = parse_policy(plan["allow"])
    lookup = asking(plan["name_servers"]) if plan["name_servers"] else host_addresses
    with socket.socket(fileno=plan["listener"]) as way:
        _, descriptors, _, _ = socket.recv_fds(way, 1, 1)
    if not descriptors:
        raise SystemExit(1)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != plan["parent"]:
        # It ended before we asked for its signal.
        raise SystemExit(1)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    listener = socket.socket(fileno=descriptors[0])
    listener.setblocking(False)
    asyncio.run(_run(listener, Proxy(policy, plan["max_bytes"], lookup)))


if __name__ == "__main__":
    main()
