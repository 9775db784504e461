"""Rows about a command in a running room, 100 ms apart, beside `runsc exec` and the bare agent in a sandbox of the same kind."""

from __future__ import annotations

import asyncio
import statistics
import time

from bench.peers import Peers
from bench.rows import Budget, Row
from bench.server import Room, Server

PACE_SECONDS = 0.1
WARM_UP = 5


async def measure(server: Server, peers: Peers, *, tries: int) -> list[Row]:
    """`/bin/true` and the builtin over HTTP, the bare agent's own time for both, `runsc exec`."""
    true = Row(
        "true",
        "`/bin/true` in a running room over HTTP, changes included",
        budget=Budget(12, 22, {"runsc exec": 0.35}),
    )
    builtin = Row("builtin", "a shell builtin (`:`) likewise, by a spare shell", budget=Budget(6, 12))
    around = Row("around", "everything around the agent's own spawn", budget=Budget(3))
    around_builtin = Row("around-builtin", "likewise, for the builtin")
    room = Room(server, server.profile("bench-commands", warm_pool_size=0), "commands")
    room.create()
    for _ in range(WARM_UP):
        room.run("/bin/true")
        await peers.agent.exec("/bin/true")
        room.run(":")
        await peers.agent.exec(":")
    for _ in range(tries):
        for row, difference, command in ((true, around, "/bin/true"), (builtin, around_builtin, ":")):
            await asyncio.sleep(PACE_SECONDS)
            over_http = row.take(lambda command=command: room.run(command))  # type: ignore[misc]
            await asyncio.sleep(PACE_SECONDS)
            began = time.perf_counter()
            await peers.agent.exec(command)
            bare = (time.perf_counter() - began) * 1000
            row.peer("bare agent").values.append(bare)
            if over_http is not None:
                difference.values.append(over_http - bare)
        await asyncio.sleep(PACE_SECONDS)
        true.peer("runsc exec").take(peers.runsc_exec)
    for row, difference in ((true, around), (builtin, around_builtin)):
        # Of pairs taken 100 ms apart: their spread is that of two spawns, so only the median means anything.
        if row.median is not None and difference.values:
            difference.note = (
                f"difference of medians {row.median - statistics.median(row.peer('bare agent').values):.2f} ms"
            )
    room.destroy()
    return [true, builtin, around, around_builtin]
