"""What a guest learns from the resolver on its gateway."""

import asyncio
import contextlib
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from dnslib import RCODE, DNSRecord

from innkeeper.host.linux import netns
from innkeeper.host.network.firewall import FirewallLimits
from innkeeper.host.network.network import Network, PolicyClass
from innkeeper.host.network.resolver import IN_FLIGHT_PER_GUEST

sys.path.insert(0, str(Path(__file__).parent))
import network_world as nw
from network_world import World

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces")]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with nw.world() as there:
        yield there


def closed_names(guest_ip: IPv4Address, name: str) -> bool:
    return not name.endswith("closed.test")


@pytest.fixture
async def network(world: World, tmp_path: Path) -> AsyncIterator[Network]:
    server_id = secrets.token_hex(4)
    async with Network.open(
        server_id, tmp_path, settings=world.settings(), decide=closed_names, keep_running=False
    ) as network:
        yield network
    assert await nw.leftovers([server_id], world) == []


@pytest.mark.parametrize("over_tcp", [False, True])
async def test_answers_are_passed_on_without_private_addresses(world: World, network: Network, over_tcp: bool) -> None:
    slot = await network.acquire()

    async def addresses(name: str, qtype: str = "A") -> list[str]:
        reply = await nw.ask(slot.netns, slot.resolver_ip, name, qtype, over_tcp=over_tcp)
        assert reply.header.rcode == RCODE.NOERROR
        return sorted(str(record.rdata) for record in reply.rr)

    assert await addresses("good.test") == [nw.SERVER]
    assert await addresses("rebind.test") == [nw.SERVER]
    assert await addresses("inside.test") == []
    assert await addresses("six.test", "AAAA") == []
    assert await addresses("good.test", "HTTPS") == []
    assert "six.test AAAA" not in world.questions and "good.test HTTPS" not in world.questions


async def test_refused_and_unknown_names_do_not_exist(world: World, network: Network) -> None:
    slot = await network.acquire()
    for name in ("unknown.test", "www.closed.test"):
        assert (await nw.ask(slot.netns, slot.resolver_ip, name)).header.rcode == RCODE.NXDOMAIN
    assert "www.closed.test A" not in world.questions
    assert (await nw.ask(slot.netns, slot.resolver_ip, "good.test", "ANY")).header.rcode == RCODE.REFUSED
    assert network.resolver.counts.outcomes == {"answered": 2, "refused": 1, "failed": 0, "malformed": 0}


async def test_a_long_answer_is_cut_on_udp_and_whole_on_tcp(network: Network) -> None:
    slot = await network.acquire()
    short = await nw.ask(slot.netns, slot.resolver_ip, "big.test", "TXT")
    assert short.header.tc and not short.rr
    assert len((await nw.ask(slot.netns, slot.resolver_ip, "big.test", "TXT", over_tcp=True)).rr) == 50


async def test_a_silent_name_server_ends_in_servfail_and_blocks_nobody(network: Network) -> None:
    slot, other = await network.acquire(), await network.acquire()
    slow = asyncio.create_task(nw.ask(slot.netns, slot.resolver_ip, "silent.test"))
    await asyncio.sleep(0.1)
    assert (await nw.ask(other.netns, other.resolver_ip, "good.test")).rr
    assert network.resolver.in_flight == 1
    assert (await slow).header.rcode == RCODE.SERVFAIL
    assert (network.resolver.in_flight, network.resolver.counts.outcomes["failed"]) == (0, 1)
    assert network.resolver.upstream_failures == 2


async def test_questions_beyond_a_guest_s_share_are_counted_and_not_taken(network: Network) -> None:
    slot = await network.acquire()
    packet = DNSRecord.question("silent.test", "A").pack()

    def ask() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((str(slot.resolver_ip), 53))
            for _ in range(IN_FLIGHT_PER_GUEST + 10):
                sock.send(packet)

    await nw.inside(slot.netns, ask)
    async with asyncio.timeout(30):
        while network.resolver.counts.dropped["guest_questions"] < 10:
            await asyncio.sleep(0.01)
    assert network.resolver.counts.dropped == {"guest_questions": 10, "guest_connections": 0, "full": 0}


async def test_garbage_and_floods_leave_the_resolver_working(world: World, network: Network) -> None:
    slot, other = await network.acquire(), await network.acquire()

    limits = FirewallLimits()

    def flood() -> tuple[int, int, float]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((str(slot.resolver_ip), 53))
            for length in range(1, 3000):
                sock.send(os.urandom(length % 600 + 1))
        accepted, refused = 0, 0
        began = time.monotonic()
        # The resolver hangs up on garbage, which frees the place for the next: what stays is the pace.
        while (seconds := time.monotonic() - began) < 2 or (refused == 0 and seconds < 20):
            try:
                connection = socket.create_connection((str(slot.resolver_ip), 53), timeout=2)
            except ConnectionRefusedError:
                refused += 1
                continue
            accepted += 1
            with connection, contextlib.suppress(ConnectionError):
                connection.sendall(b"\xff\xff" + os.urandom(20))
        return accepted, refused, seconds

    accepted, refused, seconds = await nw.inside(slot.netns, flood)
    assert refused > 0
    assert accepted <= limits.dns_connections_per_second * (2 + seconds) + 1  # a burst of two seconds
    assert (await nw.ask(other.netns, other.resolver_ip, "good.test")).rr
    rules = await netns.run_inside(network.plan.router_netns, ["nft", "list", "set", "ip", "innkeeper", "dns_pace"])
    assert str(slot.guest_ip) in rules.stdout.decode()
    assert (await network.refused_packets())["dns_flood"] > 0
    assert network.resolver.counts.outcomes["malformed"] > 0
    await asyncio.sleep(1.2)  # the flooder has its allowance back, too
    assert (await nw.ask(slot.netns, slot.resolver_ip, "good.test")).rr


async def test_a_guest_without_network_gets_no_dns(network: Network) -> None:
    slot = await network.acquire(PolicyClass.NONE)
    with pytest.raises(OSError):
        await nw.ask(slot.netns, slot.resolver_ip, "good.test", over_tcp=True)
