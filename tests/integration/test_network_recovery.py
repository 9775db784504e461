"""What a daemon that was killed leaves, and how the next one takes it over."""

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from innkeeper.host.linux import netns, nftables
from innkeeper.host.network.firewall import Limited
from innkeeper.host.network.forward_policy import forward_blockers
from innkeeper.host.network.network import Network, PolicyClass, SlotGoneError

sys.path.insert(0, str(Path(__file__).parent))
import network_world as nw
from network_world import World

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces")]

DAEMON = """
import asyncio, sys
from pathlib import Path
from innkeeper.host.network.firewall import Limited
from innkeeper.host.network.network import Network, NetworkSettings, PolicyClass

async def main(server_id, run_directory, host_netns, limited):
    settings = NetworkSettings(host_netns=host_netns, pool_size=3)
    async with Network.open(server_id, Path(run_directory), settings=settings) as network:
        online, offline, lost = [await network.acquire() for _ in range(3)]
        await network.set_policy(offline, PolicyClass.NONE)
        if limited:
            await network.set_policy(online, Limited(ports=(80,)))
        await network.settle()
        print("up", online.index, offline.index, lost.index, flush=True)
        await asyncio.sleep(3600)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with nw.world() as there:
        yield there


async def killed_daemon(world: World, server_id: str, run_directory: Path, *, limited: bool = False) -> list[int]:
    """Start a daemon with three slots in use and three ready, and kill it; returns the indices in use."""
    argv = [sys.executable, "-c", DAEMON, server_id, str(run_directory), world.host, "yes" if limited else ""]
    process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
    assert process.stdout is not None
    async for line in process.stdout:
        if line.startswith(b"up"):
            break
    process.send_signal(signal.SIGKILL)
    await process.communicate()
    return [int(word) for word in line.split()[1:]]


async def test_a_slot_with_a_policy_of_its_own_is_closed_until_that_is_known_again(
    world: World, tmp_path: Path
) -> None:
    server_id = secrets.token_hex(4)
    index, *_ = await killed_daemon(world, server_id, tmp_path, limited=True)
    async with Network.open(server_id, tmp_path, settings=world.settings(), keep_running=False) as network:
        slot = network.plan.slot(index)
        assert await nw.tcp(slot.netns, nw.SERVER, 80) == "ECONNREFUSED"
        await network.adopt(index, Limited(ports=(80,)))
        assert await nw.tcp(slot.netns, nw.SERVER, 80) == "ok"
        assert await nw.tcp(slot.netns, nw.SERVER, 443) == "ECONNREFUSED"


async def test_slots_in_use_survive_a_kill_and_the_rest_is_swept(world: World, tmp_path: Path) -> None:
    server_id = secrets.token_hex(4)
    online, offline, lost = await killed_daemon(world, server_id, tmp_path)
    async with Network.open(server_id, tmp_path, settings=world.settings(), keep_running=False) as network:
        assert network.found.adopted
        assert len(network.found.slots) == 6
        slot = await network.adopt(online)
        assert await nw.tcp(slot.netns, nw.SERVER) == "ok"
        assert (await nw.ask(slot.netns, slot.resolver_ip, "good.test")).rr
        closed = await network.adopt(offline)
        assert network.in_use[offline] is PolicyClass.NONE
        assert await nw.tcp(closed.netns, nw.SERVER) == "ECONNREFUSED"
        fresh = await network.acquire()
        assert fresh.index not in {online, offline, lost}

        assert await network.sweep() == 4
        assert not netns.exists(network.plan.slot(lost).netns)
        with pytest.raises(SlotGoneError):
            await network.adopt(lost)
        assert await nw.tcp(slot.netns, nw.SERVER) == "ok"
        expected = {slot.netns, closed.netns, fresh.netns, network.plan.router_netns}
        assert expected < set(netns.names(f"ik{server_id}"))
        assert len(netns.names(f"ik{server_id}")) == len(expected) + network.ready
    assert await nw.leftovers([server_id], world) == []


async def test_connections_outlive_the_change_of_daemon(world: World, tmp_path: Path) -> None:
    server_id = secrets.token_hex(4)
    online, *_ = await killed_daemon(world, server_id, tmp_path)
    name = f"ik{server_id}-s{online}"
    with await nw.inside(name, lambda: socket.create_connection((nw.SERVER, 80), timeout=2)) as connection:
        assert await asyncio.to_thread(connection.recv, 6) == b"hello\n"
        async with Network.open(server_id, tmp_path, settings=world.settings(), keep_running=False) as network:
            await network.adopt(online)
            connection.sendall(b"still\n")
            assert await asyncio.to_thread(connection.recv, 6) == b"still\n"


async def test_a_stopped_server_keeps_what_is_in_use_only(world: World, tmp_path: Path) -> None:
    server_id = secrets.token_hex(4)
    async with Network.open(server_id, tmp_path, settings=world.settings()) as network:
        await network.settle()
        slot = await network.acquire()
    assert netns.names(f"ik{server_id}") == sorted([slot.netns, network.plan.router_netns])
    assert await nw.tcp(slot.netns, nw.SERVER) == "ok"
    async with Network.open(server_id, tmp_path, settings=world.settings()) as again:
        assert again.plan == network.plan
        assert await again.sweep(keep=[slot.index]) == 0
        again.keep_running = False
    assert await nw.leftovers([server_id], world) == []


async def test_half_made_things_are_replaced(world: World, tmp_path: Path) -> None:
    server_id = secrets.token_hex(4)
    await netns.ip_batch([f"netns add ik{server_id}-router", f"netns add ik{server_id}-s5"])
    async with Network.open(server_id, tmp_path, settings=world.settings(), keep_running=False) as network:
        assert not network.found.adopted
        assert await nw.tcp((await network.acquire()).netns, nw.SERVER) == "ok"
    # A slot that lost its link, beside a router that works.
    async with Network.open(server_id, tmp_path, settings=world.settings()) as network:
        slot = await network.acquire()
        await netns.ip_batch([f"link del {slot.router_interface}"], inside=network.plan.router_netns)
    async with Network.open(server_id, tmp_path, settings=world.settings(), keep_running=False) as network:
        assert [broken.index for broken in network.found.broken] == [slot.index]
        with pytest.raises(SlotGoneError):
            await network.adopt(slot.index)
        await network.settle()
        assert not netns.exists(slot.netns)
    assert await nw.leftovers([server_id], world) == []


async def test_an_unknown_subnet_means_a_new_router(world: World, tmp_path: Path) -> None:
    server_id = secrets.token_hex(4)
    await killed_daemon(world, server_id, tmp_path)
    (tmp_path / "network.json").write_text("not json")
    async with Network.open(server_id, tmp_path, settings=world.settings(), keep_running=False) as network:
        assert not network.found.adopted
        assert await nw.tcp((await network.acquire()).netns, nw.SERVER) == "ok"
    assert await nw.leftovers([server_id], world) == []


async def test_the_subnet_avoids_the_routes_of_the_host(world: World, tmp_path: Path) -> None:
    server_id = "00000000"
    await netns.ip_batch(
        ["route add 100.64.0.0/11 via 8.8.8.1", "route add 100.96.0.0/12 via 8.8.8.1"], inside=world.host
    )
    async with Network.open(server_id, tmp_path, settings=world.settings(), keep_running=False) as network:
        assert str(network.plan.subnet) == "100.112.0.0/20"
    assert await nw.leftovers([server_id], world) == []


async def test_a_forward_policy_of_others_is_found(world: World) -> None:
    assert await forward_blockers(inside=world.host) == []
    rules = "table ip filter {\n chain FORWARD {\n type filter hook forward priority 0; policy drop;\n }\n }\n"
    await nftables.apply(rules, inside=world.host)
    assert await forward_blockers(inside=world.host) == [
        "the nft chain 'ip filter FORWARD' drops forwarded packets by policy"
    ]
