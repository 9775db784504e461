"""Rows about a key that is typed into a terminal, until it shows: over a WebSocket, beside the bare agent's own terminal."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

from websockets.asyncio.client import connect

from bench.peers import Peers
from bench.rows import Budget, Row
from bench.server import Room, Server
from innkeeper.wire.stream import Data

WARM_UP = 20
PACE_SECONDS = 0.02
AT_ONCE = 20


async def measure(server: Server, peers: Peers, *, tries: int) -> list[Row]:
    """The echo of one idle terminal over HTTP and of the bare agent, by turns; and of one among many that are typed into at once."""
    echo = Row("terminal echo", "a key typed into an idle terminal over a WebSocket, until it shows")
    around = Row("terminal around", "everything around the agent's own echo", budget=Budget(3))
    many = Row("terminals echo", f"the same, {AT_ONCE} terminals typed into at once")
    room = Room(server, server.profile("bench-terminals", warm_pool_size=0), "terminals")
    base = f"/v1/rooms/{room.create()['instance_id']}/pty"
    bare = await peers.agent.terminal("cat")
    sockets = [await _open(server, base) for _ in range(AT_ONCE)]
    for number in range(WARM_UP + tries):
        await asyncio.sleep(PACE_SECONDS)
        over_http = await _echo(sockets[0])
        await asyncio.sleep(PACE_SECONDS)
        began = time.perf_counter()
        await bare.send_data(b"x")
        while not isinstance(await bare.next_event(), Data):
            pass
        alone = (time.perf_counter() - began) * 1000
        if number >= WARM_UP:
            echo.values.append(over_http)
            echo.peer("bare agent").values.append(alone)
            around.values.append(over_http - alone)
    for _ in range(max(2, tries // 10)):
        many.values += await asyncio.gather(*(_echo(socket) for socket in sockets))
    around.note = f"difference of medians {statistics.median(echo.values) - statistics.median(echo.peers['bare agent'].values):.2f} ms"
    bare.cancel()
    for socket in sockets:
        await socket.close()
    room.destroy()
    return [echo, around, many]


async def _open(server: Server, base: str) -> Any:
    name = (await asyncio.to_thread(server.request, "POST", f"{base}/sessions", {"command": "exec cat"}))["id"]
    socket = await connect(
        f"ws://127.0.0.1:{server.port}{base}/{name}/connect",
        additional_headers={"Authorization": f"Bearer {server.token}"},
        compression=None,
    )
    # Once it echoes, it is `cat`, or as good as that.
    await _echo(socket)
    return socket


async def _echo(socket: Any) -> float:
    """Milliseconds until a key shows."""
    began = time.perf_counter()
    await socket.send(b"x")
    while b"x" not in await socket.recv():
        pass
    return (time.perf_counter() - began) * 1000
