"""Frames of every forged kind, sent from a slot's own namespace: what a sentry that was taken over could do. No server, only its network."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.integration import network_world as nw
from tests.integration.network_world import World
from tests.security.frames import UDP, attacks, frame, listening, packet, udp

from innkeeper.host.linux import netns
from innkeeper.host.network.addressing import Slot
from innkeeper.host.network.network import Network

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces")]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with nw.world() as there:
        yield there


@pytest.fixture
async def network(world: World, tmp_path: Path) -> AsyncIterator[Network]:
    async with Network.open(secrets.token_hex(4), tmp_path, settings=world.settings(), keep_running=False) as network:
        yield network


async def send(slot: Slot, *frames: bytes) -> None:
    def put() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind((slot.guest_interface, 0))
            for one in frames:
                sock.send(one)

    await nw.inside(slot.netns, put)
    await asyncio.sleep(0.2)  # on the way through four namespaces it takes well under a millisecond


async def state(network: Network, world: World) -> list[str]:
    """Routes and lasting neighbours of router and host: what an attack must not change."""
    looks = (["ip", "-4", "route", "show", "table", "all"], ["ip", "-4", "neigh", "show", "nud", "permanent"])
    places = (network.plan.router_netns, world.host)
    said = [(await netns.run_inside(place, look)).stdout.decode() for place in places for look in looks]
    # A slot that was made ahead comes up a moment later.
    return [text.replace("linkdown ", "") for text in said]


async def test_no_forged_frame_arrives_anywhere(world: World, network: Network) -> None:
    slot, other = await network.acquire(), await network.acquire()
    await network.settle()
    places = (
        (world.internet, "wan"),
        (world.internet, "lo"),
        (world.host, network.plan.uplink),
        (world.host, "lo"),
        (other.netns, other.guest_interface),
    )
    before = await state(network, world)
    for name in attacks(slot, other, b""):
        mark = secrets.token_bytes(12)
        with listening(*places) as heard:
            await send(slot, *attacks(slot, other, mark)[name])
        assert [data for data in heard if mark in data] == [], name
    assert await state(network, world) == before
    # Control: the same way of sending and listening, with nothing forged, whole and in pieces.
    for frames in (
        [frame(slot, packet(slot.guest_ip, nw.SERVER, UDP, udp(b"honest-frame")))],
        [
            frame(slot, packet(slot.guest_ip, nw.SERVER, UDP, udp(b"honest-frame" + bytes(12))[:16], fragment=0x2000, ident=80)),
            frame(slot, packet(slot.guest_ip, nw.SERVER, UDP, udp(b"honest-frame" + bytes(12))[16:], fragment=0x0002, ident=80)),
        ],
        [frame(slot, packet(slot.guest_ip, nw.SERVER, UDP, udp(b"honest-frame"), ttl=3))],
    ):  # fmt: skip
        world.datagrams.clear()
        await send(slot, *frames)
        assert [data[:12] for data, _ in world.datagrams] == [b"honest-frame"]
    assert await nw.tcp(other.netns, nw.SERVER) == "ok"


async def test_packets_that_die_on_the_way_reach_nothing(world: World, network: Network) -> None:
    slot = await network.acquire()
    frames = [
        frame(slot, packet(slot.guest_ip, target, UDP, udp(b"dies-on-the-way"), ttl=ttl))
        for ttl in (1, 2, 3)
        for target in (nw.FORBIDDEN[0], nw.HOST, "169.254.169.254")
    ]
    with listening((world.internet, "wan"), (world.internet, "lo"), (world.host, "lo")) as heard:
        await send(slot, *frames)
    assert [data for data in heard if b"dies-on-the-way" in data] == []


async def test_pieces_that_never_become_whole_hold_nobody_up(world: World, network: Network) -> None:
    slot, other = await network.acquire(), await network.acquire()
    payload = os.urandom(3_000)
    over = threading.Event()

    def flood() -> int:
        sent = 0
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind((slot.guest_interface, 0))
            end = time.monotonic() + 20
            while not over.is_set() and time.monotonic() < end:
                one = packet(slot.guest_ip, nw.SERVER, UDP, bytes(1_400), fragment=0x2000, ident=sent & 0xFFFF)
                sock.send(frame(slot, one))
                sent += 1
        return sent

    flooding = asyncio.create_task(nw.inside(slot.netns, flood))
    await asyncio.sleep(1.5)
    try:
        # 3,000 bytes travel in three pieces; while the memory for pieces is full, none of them arrives.
        for _ in range(5):
            assert await nw.udp(other.netns, nw.SERVER, payload=payload) == payload
    finally:
        over.set()
        sent = await flooding
    assert sent > 5_000, "more than fit into the kernel's 4 MB"
    print(f"{sent} pieces in the way, and a neighbour's large packets arrive")
