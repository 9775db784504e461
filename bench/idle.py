"""Rows about guests that do nothing: their memory and processor time, and what the server itself needs for each."""

from __future__ import annotations

import os
import time

from bench.processes import cpu_seconds, private_mb, pss_mb
from bench.rows import Budget, Row
from bench.server import Room, Server

WATCH_SECONDS = 10.0
FREEZE_SECONDS = 60.0


def measure(server: Server, *, counts: tuple[int, ...]) -> list[Row]:
    """Rooms up to each count, frozen, then watched for ten seconds."""
    rows = []
    profile = server.profile("bench-idle", warm_pool_size=0, memory_mb=256)
    rooms: list[Room] = []
    server.wait_pools()
    rest = _server_mb(server)
    before = server.machine_ids()
    for count in counts:
        while len(rooms) < count:
            room = Room(server, profile, f"idle-{len(rooms)}")
            room.create()
            room.run("true")
            rooms.append(room)
        _wait_frozen(server, count)
        groups = [server.group(machine_id) for machine_id in server.machine_ids() - before]
        memory = Row(f"idle-{count}-pss", f"frozen guest, at {count}", "MB PSS", Budget(20))
        memory.values = [sum(pss_mb(pid) for pid in group.procs()) for group in groups]
        pids = [pid for group in groups for pid in group.procs()]
        own = list(server.processes().values())
        began, guests, daemons = time.monotonic(), cpu_seconds(pids), cpu_seconds(own)
        time.sleep(WATCH_SECONDS)
        took = time.monotonic() - began
        guests, daemons = cpu_seconds(pids) - guests, cpu_seconds(own) - daemons
        cpu = Row(f"idle-{count}-cpu", f"frozen guests' CPU, all {count}", "% of a core", Budget(0.0))
        cpu.values = [round(100 * guests / took, 2)]
        machine = Row(
            f"idle-{count}-machine",
            f"{count} frozen guests and the server",
            "% of the machine",
            Budget(3) if count >= 100 else None,
        )
        machine.values = [100 * (guests + daemons) / took / (os.cpu_count() or 1)]
        each = Row(f"idle-{count}-server", f"server memory per instance, at {count}", "MB private", Budget(0.2))
        each.values = [(_server_mb(server) - rest) / count]
        rows += [memory, cpu, machine, each]
    for room in rooms:
        room.destroy()
    return rows


def _server_mb(server: Server) -> float:
    return sum(private_mb(pid) for pid in server.processes().values())


def _wait_frozen(server: Server, count: int) -> None:
    deadline = time.monotonic() + FREEZE_SECONDS
    while (frozen := server.host()["frozen"]) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{frozen} of {count} guests are frozen")
        time.sleep(0.1)
