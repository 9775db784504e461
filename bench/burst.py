"""Rows about fifty clients that each ask for a room of their own in the same moment."""

from __future__ import annotations

import contextlib
import threading

from bench.rows import Budget, Row
from bench.server import Room, Server

CLIENTS = 50
MEMORY_MB = 256


def measure(server: Server, *, tries: int) -> list[Row]:
    """With a pool of fifty and with a pool of two: each client's time to `ready`."""
    rows = []
    for pool, p95_ms in ((CLIENTS, 400), (2, 15_000)):
        row = Row(f"burst-{pool}", f"{CLIENTS} rooms asked for at once, pool of {pool}", budget=Budget(p95=p95_ms))
        profile = server.profile(f"bench-burst-{pool}", warm_pool_size=pool, memory_mb=MEMORY_MB)
        for number in range(tries):
            server.wait_pools(pool)
            _burst(server, row, [Room(server, profile, f"{number}-{client}") for client in range(CLIENTS)])
        server.request("PATCH", profile, {"warm_pool_size": 0})
        rows.append(row)
    return rows


def _burst(server: Server, row: Row, rooms: list[Room]) -> None:
    start = threading.Barrier(len(rooms))

    def ask(room: Room) -> None:
        with contextlib.closing(server.connect()) as connection:
            start.wait()
            row.take(lambda: server.raw_on(connection, "POST", room.path))

    clients = [threading.Thread(target=ask, args=(room,)) for room in rooms]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    for room in rooms:
        room.destroy()
