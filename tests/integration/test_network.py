"""What a guest on the network may and may not reach, tried from inside a slot's namespace."""

import asyncio
import os
import secrets
import socket
import struct
import sys
from collections.abc import AsyncIterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from innkeeper.host.linux import netns, nftables
from innkeeper.host.network.addressing import Slot
from innkeeper.host.network.firewall import FirewallLimits, Limited
from innkeeper.host.network.network import Network, PolicyClass, SlotGoneError

sys.path.insert(0, str(Path(__file__).parent))
import network_world as nw
from network_world import World

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces")]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with nw.world() as there:
        yield there


@pytest.fixture
def server_id() -> str:
    return secrets.token_hex(4)


@pytest.fixture
async def network(world: World, server_id: str, tmp_path: Path) -> AsyncIterator[Network]:
    async with Network.open(server_id, tmp_path, settings=world.settings(), keep_running=False) as network:
        yield network
    assert await nw.leftovers([server_id], world) == []


async def test_a_guest_reaches_the_internet(world: World, network: Network) -> None:
    slot = await network.acquire()
    assert await nw.tcp(slot.netns, nw.SERVER, 80) == "ok"
    assert await nw.tcp(slot.netns, nw.SERVER, 443) == "ok"
    assert await nw.udp(slot.netns, nw.SERVER, payload=b"ping") == b"ping"
    # The internet sees the host, not the guest.
    assert world.datagrams[-1] == (b"ping", nw.HOST)
    assert await nw.ping(slot.netns, nw.SERVER)


async def test_a_guest_reaches_nothing_private(world: World, network: Network) -> None:
    slot = await network.acquire()
    for address in nw.FORBIDDEN:
        assert await nw.tcp(world.host, address) == "ok", f"{address} must answer for the test to mean something"
        assert await nw.tcp(slot.netns, address) == "ECONNREFUSED", address
        assert await nw.udp(slot.netns, address) == "ECONNREFUSED", address


async def test_a_guest_reaches_no_address_of_the_host(world: World, network: Network) -> None:
    slot = await network.acquire()
    addresses = (nw.HOST, nw.HOST_ELSEWHERE, nw.HOST_PRIVATE, network.plan.uplink_host_ip)
    for address in addresses:
        assert await nw.tcp(world.host, address, 8080) == "ok"
        assert await nw.tcp(slot.netns, address, 8080) == "ECONNREFUSED", address
        assert await nw.udp(slot.netns, address, 5001) == "ECONNREFUSED", address
        assert not await nw.ping(slot.netns, address), address


async def test_a_port_the_host_publishes_for_a_container_is_no_way_round(world: World, network: Network) -> None:
    slot = await network.acquire()
    assert await nw.tcp(world.internet, nw.HOST, nw.PUBLISHED_PORT) in ("ok", "timeout")
    for address in (nw.HOST, nw.HOST_ELSEWHERE):
        assert await nw.tcp(slot.netns, address, nw.PUBLISHED_PORT) == "ECONNREFUSED"


async def test_guests_do_not_reach_each_other(world: World, network: Network) -> None:
    first, second = await network.acquire(), await network.acquire()
    async with nw.serve_tcp(second.netns, 80, world), nw.serve_udp(second.netns, 5000, world):
        assert await nw.tcp(second.netns, second.guest_ip) == "ok"
        assert await nw.tcp(first.netns, second.guest_ip) == "ECONNREFUSED"
        assert await nw.udp(first.netns, second.guest_ip) == "ECONNREFUSED"
        assert await nw.tcp(first.netns, second.gateway_ip) == "ECONNREFUSED"


async def test_nobody_opens_a_connection_to_a_guest(world: World, network: Network) -> None:
    slot = await network.acquire()
    async with nw.serve_tcp(slot.netns, 80, world), nw.serve_udp(slot.netns, 5000, world):
        assert await nw.tcp(slot.netns, slot.guest_ip) == "ok"
        for outside in (world.internet, world.host, network.plan.router_netns):
            assert await nw.tcp(outside, slot.guest_ip, seconds=0.3) == "timeout", outside
        for outside in (world.internet, world.host):
            assert await nw.udp(outside, slot.guest_ip, payload=b"knock") == "timeout"
    # Not even one way: nothing arrived that could not be answered.
    assert world.datagrams == []


async def test_the_gateway_offers_dns_only(network: Network) -> None:
    slot = await network.acquire()
    for address in (slot.gateway_ip, slot.resolver_ip, network.plan.uplink_router_ip):
        for port in (22, 80, 8080):
            assert await nw.tcp(slot.netns, address, port) == "ECONNREFUSED"
    assert await nw.tcp(slot.netns, slot.gateway_ip, 53) == "ECONNREFUSED"


async def test_other_name_servers_and_mail_are_refused(world: World, network: Network) -> None:
    slot = await network.acquire()
    for port in (25, 53, 853):
        assert await nw.tcp(slot.netns, nw.SERVER, port) == "ECONNREFUSED", port
    assert await nw.udp(slot.netns, nw.SERVER, 53) == "ECONNREFUSED"
    assert await nw.udp(slot.netns, nw.SERVER, 853) == "ECONNREFUSED"


async def test_policy_none_reaches_nothing_and_changes_take_effect_at_once(world: World, network: Network) -> None:
    slot = await network.acquire(PolicyClass.NONE)
    assert network.in_use == {slot.index: PolicyClass.NONE}
    assert await nw.tcp(slot.netns, nw.SERVER) == "ECONNREFUSED"
    assert await nw.udp(slot.netns, slot.resolver_ip, 53) == "ECONNREFUSED"

    await network.set_policy(slot, PolicyClass.INTERNET)
    connection = await nw.inside(slot.netns, lambda: socket.create_connection((nw.SERVER, 80), timeout=2))
    with connection:
        assert await asyncio.to_thread(connection.recv, 6) == b"hello\n"
        connection.sendall(b"still there\n")
        assert await asyncio.to_thread(connection.recv, 100) == b"still there\n"
        await network.set_policy(slot, PolicyClass.NONE)
        connection.sendall(b"and now\n")
        with pytest.raises(OSError):
            await asyncio.to_thread(connection.recv, 100)
    assert await nw.udp(slot.netns, nw.SERVER) == "ECONNREFUSED"


async def test_a_slots_own_policy_allows_its_ports_and_networks_and_no_more_than_everybodys(
    world: World, network: Network
) -> None:
    web = await network.acquire(Limited(ports=(80,)))
    assert await nw.tcp(web.netns, nw.SERVER, 80) == "ok"
    assert (await nw.ask(web.netns, web.resolver_ip, "good.test")).rr
    assert await nw.tcp(web.netns, nw.SERVER, 443) == "ECONNREFUSED"
    assert await nw.udp(web.netns, nw.SERVER, payload=b"ping") == "ECONNREFUSED"
    assert not await nw.ping(web.netns, nw.SERVER)
    for address in (*nw.FORBIDDEN, nw.HOST):
        assert await nw.tcp(web.netns, address) == "ECONNREFUSED", address

    # Networks open all of their public addresses, and none that is not public; overlapping ones are one.
    networks = tuple(map(IPv4Network, (f"{nw.SERVER}/32", "0.0.0.0/1", "10.0.0.0/8", "192.168.0.0/16")))
    wide = await network.acquire(Limited(cidrs=(*networks, IPv4Network(f"{nw.SERVER}/24", strict=False))))
    assert await nw.tcp(wide.netns, nw.SERVER, 443) == "ok"
    assert await nw.udp(wide.netns, nw.SERVER, payload=b"ping") == b"ping"
    for address in nw.FORBIDDEN:
        assert await nw.tcp(wide.netns, address) == "ECONNREFUSED", address
    assert await nw.tcp(wide.netns, nw.SERVER, 25) == "ECONNREFUSED"

    # One guest's policy is no other's.
    assert await nw.tcp((await network.acquire()).netns, nw.SERVER, 443) == "ok"
    nothing = await network.acquire(Limited())
    assert await nw.tcp(nothing.netns, nw.SERVER, 80) == "ECONNREFUSED"


async def test_a_slots_own_policy_changes_at_once_and_goes_with_the_slot(world: World, network: Network) -> None:
    slot = await network.acquire(Limited(ports=(80, 443), cidrs=(IPv4Network(f"{nw.SERVER}/32"),)))
    assert await nw.udp(slot.netns, nw.SERVER, payload=b"ping") == b"ping"
    connection = await nw.inside(slot.netns, lambda: socket.create_connection((nw.SERVER, 80), timeout=2))
    with connection:
        assert await asyncio.to_thread(connection.recv, 6) == b"hello\n"
        await network.set_policy(slot, Limited(ports=(443,)))
        connection.sendall(b"and now\n")
        with pytest.raises(OSError):
            await asyncio.to_thread(connection.recv, 100)
    assert await nw.tcp(slot.netns, nw.SERVER, 443) == "ok"
    await network.set_policy(slot, PolicyClass.INTERNET)
    assert await nw.udp(slot.netns, nw.SERVER, payload=b"ping") == b"ping"
    await network.set_policy(slot, Limited(ports=(80,), cidrs=(IPv4Network("1.0.0.0/8"),)))
    await network.release(slot)
    await network.settle()
    for name in ("limited", "limited_ports", "limited_cidrs"):
        assert await nftables.set_elements("ip", "innkeeper", name, inside=network.plan.router_netns) == [], name


async def test_an_exception_opens_an_intranet_but_the_host_only_by_its_own_address(
    world: World, server_id: str, tmp_path: Path
) -> None:
    wide = FirewallLimits(allowed_cidrs=(IPv4Network("10.0.0.0/8"),), allow_smtp=True)
    async with Network.open(server_id, tmp_path, settings=world.settings(limits=wide), keep_running=False) as network:
        slot = await network.acquire()
        assert await nw.tcp(slot.netns, "10.9.9.9") == "ok"
        assert await nw.tcp(slot.netns, nw.SERVER, 25) == "ok"
        assert await nw.tcp(slot.netns, nw.HOST_PRIVATE, 8080) == "ECONNREFUSED"
        assert await nw.tcp(slot.netns, "192.168.77.1") == "ECONNREFUSED"
        reply = await nw.ask(slot.netns, slot.resolver_ip, "rebind.test")
        assert {str(record.rdata) for record in reply.rr} == {"10.9.9.9", nw.SERVER}
    exact = FirewallLimits(allowed_cidrs=(IPv4Network(f"{nw.HOST_PRIVATE}/32"),))
    async with Network.open(server_id, tmp_path, settings=world.settings(limits=exact), keep_running=False) as network:
        slot = await network.acquire()
        assert await nw.tcp(slot.netns, nw.HOST_PRIVATE, 8080) == "ok"
        assert await nw.tcp(slot.netns, nw.HOST_ELSEWHERE, 8080) == "ECONNREFUSED"


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _udp_frame(slot: Slot, payload: bytes, *, source_ip: str, source_mac: str) -> bytes:
    body = struct.pack("!HHHH", 40000, 5000, 8 + len(payload), 0) + payload
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, 17, 0)
    addresses = socket.inet_aton(source_ip) + socket.inet_aton(nw.SERVER)
    header = header[:10] + struct.pack("!H", _checksum(header + addresses)) + addresses
    ethernet = bytes.fromhex(slot.gateway_mac.replace(":", "") + source_mac.replace(":", ""))
    return ethernet + b"\x08\x00" + header + body


async def _send_frames(slot: Slot, *frames: bytes) -> None:
    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind((slot.guest_interface, 0))
            for frame in frames:
                sock.send(frame)

    await nw.inside(slot.netns, send)
    await asyncio.sleep(0.2)


async def test_a_guest_speaks_only_with_its_own_address_and_mac(world: World, network: Network) -> None:
    slot, other = await network.acquire(), await network.acquire()
    own_ip, own_mac = str(slot.guest_ip), slot.mac
    await _send_frames(slot, _udp_frame(slot, b"honest", source_ip=own_ip, source_mac=own_mac))
    assert [data for data, _ in world.datagrams] == [b"honest"]
    await _send_frames(
        slot,
        _udp_frame(slot, b"neighbour's address", source_ip=str(other.guest_ip), source_mac=own_mac),
        _udp_frame(slot, b"neighbour", source_ip=str(other.guest_ip), source_mac=other.mac),
        _udp_frame(slot, b"other mac", source_ip=own_ip, source_mac=other.mac),
        _udp_frame(slot, b"public address", source_ip="8.8.8.77", source_mac=own_mac),
        _udp_frame(slot, b"gateway", source_ip=str(slot.gateway_ip), source_mac=own_mac),
    )
    assert [data for data, _ in world.datagrams] == [b"honest"]


async def test_arp_cannot_be_poisoned_and_tells_nothing(network: Network) -> None:
    slot, other = await network.acquire(), await network.acquire()

    def arp(operation: int, sender_ip: object, target_ip: object) -> bytes:
        own = bytes.fromhex(slot.mac.replace(":", ""))
        body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + own + socket.inet_aton(str(sender_ip))
        return b"\xff" * 6 + own + b"\x08\x06" + body + b"\0" * 6 + socket.inet_aton(str(target_ip))

    async def neighbours() -> str:
        listed = await netns.run_inside(network.plan.router_netns, ["ip", "neigh", "show"])
        return "\n".join(sorted(line for line in listed.stdout.decode().splitlines() if "PERMANENT" in line))

    def answers(frame: bytes) -> bool:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806)) as sock:
            sock.bind((slot.guest_interface, 0x0806))
            sock.settimeout(0.3)
            sock.send(frame)
            try:
                while True:
                    if sock.recv(100)[20:22] == b"\0\2":
                        return True
            except TimeoutError:
                return False

    await network.settle()
    before = await neighbours()
    assert slot.mac in before
    claims = (other.guest_ip, other.gateway_ip, slot.gateway_ip, network.plan.uplink_host_ip)
    await _send_frames(slot, *(arp(2, claimed, claimed) for claimed in claims))
    assert await neighbours() == before
    assert await nw.inside(slot.netns, lambda: answers(arp(1, slot.guest_ip, slot.gateway_ip)))
    for target in (other.guest_ip, other.gateway_ip, network.plan.uplink_host_ip, network.plan.resolver_ip, nw.SERVER):
        assert not await nw.inside(slot.netns, lambda target=target: answers(arp(1, slot.guest_ip, target))), target
    assert not await nw.inside(slot.netns, lambda: answers(arp(1, other.guest_ip, slot.gateway_ip)))


async def test_there_is_no_ipv6(world: World, network: Network) -> None:
    slot = await network.acquire()
    for name in (slot.netns, network.plan.router_netns):
        listed = await netns.run_inside(name, ["ip", "-6", "addr", "show"])
        assert listed.stdout == b"", name
    uplink = await netns.run_inside(world.host, ["ip", "-6", "addr", "show", "dev", network.plan.uplink])
    assert uplink.stdout == b""
    # A guest that makes itself an address anyway gets no answer from the router, not even to neighbour discovery.
    netns.write_sysctls(slot.netns, {"net/ipv6/conf/eth0/disable_ipv6": "0"})
    await netns.ip_batch(["addr add fd00::2/64 dev eth0 nodad"], inside=slot.netns)

    def answered() -> bool:
        """Whether anybody answers an IPv6 ping to all nodes of the link."""
        with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as sock:
            sock.settimeout(0.3)
            scope = socket.if_nametoindex(slot.guest_interface)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 0)
            sock.sendto(struct.pack("!BBHHH", 128, 0, 0, 7, 1), ("ff02::1", 0, 0, scope))
            try:
                while True:
                    if sock.recv(100)[0] == 129:
                        return True
            except TimeoutError:
                return False

    assert not await nw.inside(slot.netns, answered)


async def test_one_guest_cannot_use_up_the_connection_table(world: World, server_id: str, tmp_path: Path) -> None:
    few = FirewallLimits(connections_per_guest=20)
    async with Network.open(server_id, tmp_path, settings=world.settings(limits=few), keep_running=False) as network:
        slot, other = await network.acquire(), await network.acquire()

        def connect() -> tuple[list[socket.socket], int]:
            opened, refused = [], 0
            for _ in range(30):
                try:
                    opened.append(socket.create_connection((nw.SERVER, 80), timeout=2))
                except ConnectionRefusedError:
                    refused += 1
            return opened, refused

        opened, refused = await nw.inside(slot.netns, connect)
        for sock in opened:
            sock.close()
        assert (len(opened), refused) == (20, 10)
        assert await nw.tcp(other.netns, nw.SERVER) == "ok"


async def test_an_exception_that_covers_the_guests_does_not_open_them_to_each_other(
    world: World, server_id: str, tmp_path: Path
) -> None:
    wide = world.settings(limits=FirewallLimits(allowed_cidrs=(IPv4Network("100.64.0.0/10"),)))
    async with Network.open(server_id, tmp_path, settings=wide, keep_running=False) as network:
        slot, other = await network.acquire(), await network.acquire()
        async with nw.serve_tcp(other.netns, 80, world):
            assert await nw.tcp(slot.netns, other.guest_ip) == "ECONNREFUSED"
        assert await nw.tcp(slot.netns, network.plan.uplink_host_ip, 8080) == "ECONNREFUSED"


async def test_two_servers_side_by_side_never_meet(world: World, network: Network, tmp_path: Path) -> None:
    neighbour_id = secrets.token_hex(4)
    async with Network.open(
        neighbour_id, tmp_path / "neighbour", settings=world.settings(), keep_running=False
    ) as neighbour:
        assert not neighbour.plan.subnet.overlaps(network.plan.subnet)
        ours, theirs = await network.acquire(), await neighbour.acquire()
        async with nw.serve_tcp(theirs.netns, 80, world):
            assert await nw.tcp(ours.netns, theirs.guest_ip) == "ECONNREFUSED"
            assert await nw.tcp(ours.netns, theirs.resolver_ip, 53) == "ECONNREFUSED"
        assert await nw.tcp(ours.netns, nw.SERVER) == await nw.tcp(theirs.netns, nw.SERVER) == "ok"
    assert await nw.leftovers([neighbour_id], world) == []
    assert await nw.tcp(ours.netns, nw.SERVER) == "ok"


async def test_a_guest_of_one_server_is_not_let_in_by_another_server_exception(
    world: World, network: Network, tmp_path: Path
) -> None:
    wide = world.settings(limits=FirewallLimits(allowed_cidrs=(network.plan.subnet,)))
    async with Network.open(secrets.token_hex(4), tmp_path / "wide", settings=wide, keep_running=False) as neighbour:
        ours, theirs = await network.acquire(), await neighbour.acquire()
        async with nw.serve_tcp(ours.netns, 80, world):
            assert await nw.tcp(theirs.netns, ours.guest_ip, seconds=0.5) == "timeout"


async def test_a_released_slot_is_gone_and_its_index_comes_round_last(network: Network) -> None:
    slot = await network.acquire()
    await network.release(slot)
    await network.release(slot)
    await network.settle()
    assert not netns.exists(slot.netns)
    assert network.ready == 2
    assert (await network.acquire()).index != slot.index
    with pytest.raises(SlotGoneError):
        await network.set_policy(slot, PolicyClass.NONE)


async def test_a_burst_gets_slots_of_its_own(network: Network) -> None:
    slots = await asyncio.gather(*(network.acquire() for _ in range(20)))
    assert len({slot.guest_ip for slot in slots}) == 20
    for slot in slots:
        assert await nw.tcp(slot.netns, nw.SERVER) == "ok"
