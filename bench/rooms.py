"""Rows about getting a room and losing it."""

from __future__ import annotations

import time
from collections.abc import Iterator

from bench.peers import Peers
from bench.rows import Budget, Row
from bench.server import Room, Server

POOL = 4
GONE_SECONDS = 10.0


def measure(server: Server, peers: Peers, *, tries: int) -> Iterator[Row]:
    """Claim, create and first command, claims while refilling, cold create, destroy; beside `runsc run`, crun, podman, bwrap."""
    claim = Row("claim", "claim from a full pool, over HTTP, to ready", budget=Budget(4, 15))
    first = Row(
        "create-true",
        "create, then first `true` with its file changes",
        budget=Budget(20, 40, {"runsc run": 0.12, "podman run": 0.08}),
    )
    refilling = Row(
        "claim-refilling", "claim while the pool refills", note="no budget of its own: both cores are building guests"
    )
    cold = Row("cold", "cold create to ready", budget=Budget(ratios={"runsc run": 1.2}))
    destroy = Row("destroy", "destroy, to the answer", budget=Budget(50, 80))
    gone = Row("gone", "destroy, to nothing left", budget=Budget(200))
    warm_profile = server.profile("bench-warm", warm_pool_size=POOL)
    cold_profile = server.profile("bench-cold", warm_pool_size=0)
    for number in range(tries):
        server.wait_pools(POOL)
        room = Room(server, warm_profile, f"claim-{number}")
        created = claim.take(room.create)
        ran = first.take(lambda room=room: room.run("true"))  # type: ignore[misc]
        if created is not None and ran is not None:
            first.values[-1] = created + ran
        server.wait_pools(POOL)
        _destroy(server, room, destroy, gone)
        unpooled = Room(server, cold_profile, f"cold-{number}")
        server.wait_pools(POOL)
        cold.take(unpooled.create)
        unpooled.destroy()
        for name, runtime in peers.fresh.items():
            peers.prepare(name)
            took = first.peer(name).take(runtime)
            if name == "runsc run" and took is not None:
                cold.peer(name).values.append(took)
    for number in range(max(1, tries // (POOL - 1))):
        server.wait_pools(POOL)
        rooms = [Room(server, warm_profile, f"refill-{number}-{index}") for index in range(POOL)]
        rooms[0].create()
        for room in rooms[1:]:
            refilling.take(room.create)
            time.sleep(0.02)
        for room in rooms:
            room.destroy()
    server.request("PATCH", warm_profile, {"warm_pool_size": 0})
    yield from (claim, refilling, first, cold, destroy, gone)


def _destroy(server: Server, room: Room, destroy: Row, gone: Row) -> None:
    """Destroy a room; it is gone when its machine has no folder (the last thing released), no processes and nothing waits in the trash."""
    machine = server.machine_of(room)
    folder, trash, group = server.machines_dir / machine, server.settings.host_dir / "trash", server.group(machine)
    began = time.perf_counter()
    if destroy.take(room.destroy) is None:
        return

    def wait_gone() -> None:
        while folder.exists() or any(trash.iterdir()) or group.exists():
            if time.perf_counter() - began > GONE_SECONDS:
                raise TimeoutError(f"{machine} is still there")
            time.sleep(0.0005)

    if gone.take(wait_gone) is not None:
        gone.values[-1] = (time.perf_counter() - began) * 1000
