"""Rows about twenty rooms that are all busy: commands a second in all, and how evenly the rooms share."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Awaitable, Callable

from bench.peers import Peers
from bench.rows import Budget, Row
from bench.sandbox import Sandbox
from bench.server import RefusedError, Room, Server

ROOMS = 20
MEMORY_MB = 256
COMMAND = "/bin/true"
SECONDS = 8.0


async def measure(server: Server, peers: Peers, *, tries: int) -> list[Row]:
    """`/bin/true` back to back in twenty rooms at once, and by twenty bare agents, in turns of eight seconds."""
    rate = Row(
        "sustained",
        f"`{COMMAND}` back to back in {ROOMS} rooms at once, changes included",
        "commands/s",
        Budget(ratios={"bare agents": 0.85}, at_least=True),
    )
    even = Row("sustained-even", "likewise, slowest room / fastest room", "x", Budget(0.33, at_least=True))
    profile = server.profile("bench-sustained", warm_pool_size=0, memory_mb=MEMORY_MB)
    rooms = [Room(server, profile, f"sustained-{number}") for number in range(ROOMS)]
    for room in rooms:
        room.run(COMMAND)
    async with peers.sandboxes([f"sustained-{number}" for number in range(ROOMS)]) as sandboxes:
        for sandbox in sandboxes:
            await sandbox.exec(COMMAND)
        for _ in range(tries):
            counts = await asyncio.to_thread(_over_http, server, rooms, rate.failures)
            rate.values.append(sum(counts) / SECONDS)
            even.values.append(min(counts) / max(counts))
            counts = await _bare(sandboxes)
            rate.peer("bare agents").values.append(sum(counts) / SECONDS)
            even.peer("bare agents").values.append(min(counts) / max(counts))
    for room in rooms:
        room.destroy()
    return [rate, even]


def _over_http(server: Server, rooms: list[Room], failures: list[str]) -> list[int]:
    counts = [0] * len(rooms)
    start = threading.Barrier(len(rooms))
    body = json.dumps({"command": COMMAND}).encode()

    def ask(number: int) -> None:
        with contextlib.closing(server.connect()) as connection:
            start.wait()
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                try:
                    server.raw_on(connection, "POST", f"{rooms[number].path}/command", body)
                except (OSError, http.client.HTTPException, RefusedError) as error:
                    failures.append(f"{type(error).__name__}: {error}")
                    return
                counts[number] += 1

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(len(rooms))]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return counts


async def _bare(sandboxes: list[Sandbox]) -> list[int]:
    end = time.monotonic() + SECONDS

    async def ask(execute: Callable[[str], Awaitable[object]]) -> int:
        count = 0
        while time.monotonic() < end:
            await execute(COMMAND)
            count += 1
        return count

    return await asyncio.gather(*(ask(sandbox.exec) for sandbox in sandboxes))
