"""What a microVM on the network may and may not reach: a kernel's own stack at the other end of its tap."""

import asyncio
import contextlib
import fcntl
import os
import secrets
import select
import struct
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from innkeeper.host.linux import netns
from innkeeper.host.network.addressing import Slot
from innkeeper.host.network.network import Network, PolicyClass, SlotGoneError
from innkeeper.host.network.tap import IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, TUNSETIFF

sys.path.insert(0, str(Path(__file__).parent))
import network_world as nw
from network_world import World

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces"),
    pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="this kernel has no taps"),
]
FRAME_BYTES = 70_000


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with nw.world() as there:
        yield there


@pytest.fixture
async def network(world: World, tmp_path: Path) -> AsyncIterator[Network]:
    server_id = secrets.token_hex(4)
    async with Network.open(server_id, tmp_path, settings=world.settings(), keep_running=False) as network:
        yield network
    assert await nw.leftovers([server_id], world) == []


def interface() -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    return descriptor


@contextlib.contextmanager
def wired(one: int, other: int) -> Iterator[None]:
    """Frames go from each of two taps to the other, as QEMU carries them, until the block ends."""
    ends, over = os.pipe()

    def carry() -> None:
        while True:
            ready, _, _ = select.select([one, other, ends], [], [])
            if ends in ready:
                return
            for source in ready:
                # An interface that is down, or gone, refuses frames.
                with contextlib.suppress(OSError):
                    os.write(other if source == one else one, os.read(source, FRAME_BYTES))

    thread = threading.Thread(target=carry)
    thread.start()
    try:
        yield
    finally:
        os.close(over)
        thread.join()
        os.close(ends)


@contextlib.asynccontextmanager
async def guest(network: Network, slot: Slot) -> AsyncIterator[str]:
    """A namespace that is to the network what a microVM in the slot is; its name."""
    name = f"iktest{os.getpid()}g{slot.index}"
    with contextlib.ExitStack() as stack:
        tap = await network.open_tap(slot)
        stack.callback(os.close, tap)
        await netns.ip_batch([f"netns add {name}"])
        try:
            end = netns.call_inside(name, interface)
            stack.callback(os.close, end)
            stack.enter_context(wired(tap, end))
            await dress(name, slot.mac, str(slot.guest_ip), slot)
            yield name
        finally:
            await netns.delete(name)


async def dress(name: str, mac: str, address: str, slot: Slot) -> None:
    """Give the guest's interface this hardware address and this IP address, and the way out."""
    await netns.ip_batch(
        [
            "link set eth0 down",
            "addr flush dev eth0",
            f"link set eth0 address {mac}",
            f"addr add {address}/32 dev eth0",
            "link set eth0 up",
            f"route replace {slot.gateway_ip}/32 dev eth0",
            f"route replace default via {slot.gateway_ip} dev eth0 src {address}",
        ],
        inside=name,
    )


async def test_a_microvm_reaches_what_a_guest_may_and_nothing_else(world: World, network: Network) -> None:
    slot = await network.acquire()
    async with guest(network, slot) as name:
        # Patience: the first packet waits for the answer to who the gateway is.
        assert await nw.tcp(name, nw.SERVER, 80, seconds=20) == "ok"
        assert await nw.udp(name, nw.SERVER, payload=b"ping") == b"ping"
        assert world.datagrams[-1] == (b"ping", nw.HOST)
        for address in (*nw.FORBIDDEN[:3], nw.HOST_ELSEWHERE, nw.HOST_PRIVATE):
            assert await nw.tcp(name, address, 80, seconds=20) == "ECONNREFUSED", address
        await network.set_policy(slot, PolicyClass.NONE)
        assert await nw.tcp(name, nw.SERVER, 80, seconds=20) == "ECONNREFUSED"


async def test_a_microvm_speaks_only_with_its_own_addresses(world: World, network: Network) -> None:
    slot, other = await network.acquire(), await network.acquire()
    own = str(slot.guest_ip)
    async with guest(network, slot) as name:
        assert await nw.tcp(name, nw.SERVER, 80, seconds=20) == "ok"
        lies = [
            (other.mac, own),
            (slot.mac, str(other.guest_ip)),
            (slot.mac, "8.8.8.77"),
            (other.mac, str(other.guest_ip)),
        ]
        for mac, address in lies:
            await dress(name, mac, address, slot)
            # Not by asking for it, to which there is no answer either.
            await netns.ip_batch([f"neigh replace {slot.gateway_ip} lladdr {slot.gateway_mac} dev eth0"], inside=name)
            before = (await network.refused_packets())["spoofed"]
            assert await nw.tcp(name, nw.SERVER, 80, seconds=1) != "ok", (mac, address)
            assert (await network.refused_packets())["spoofed"] > before, (mac, address)
        await dress(name, slot.mac, own, slot)
        assert await nw.tcp(name, nw.SERVER, 80, seconds=20) == "ok"


async def test_a_tap_goes_with_its_machine_and_its_slot_with_it(network: Network) -> None:
    slot = await network.acquire()

    async def links() -> str:
        listed = await netns.run_inside(network.plan.router_netns, ["ip", "-o", "link", "show"])
        return listed.stdout.decode()

    tap = await network.open_tap(slot)
    assert f": {slot.router_interface}: " in await links()
    os.close(tap)
    # The interface ends a moment after the last descriptor.
    async with asyncio.timeout(20):
        while f": {slot.router_interface}: " in await links():
            await asyncio.sleep(0.05)
    await network.release(slot)
    await network.settle()
    assert not netns.exists(slot.netns)
    with pytest.raises(SlotGoneError):
        await network.open_tap(slot)
