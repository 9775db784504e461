"""Rows about checkpoints, restores and forks, asked of a host daemon over its bus: no endpoint has them yet.

The daemon is one of its own, in a process of its own: `python -m bench.checkpoints HOME PLATFORM TRIES`, which prints samples as JSON.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from tests.integration.daemon_fixture import Host, running_host

from bench.rows import Budget, Row
from innkeeper.core import checkpoint_verbs as verbs
from innkeeper.core.host_verbs import EnsureMachine

SECONDS = 900
LARGE_MB = 1_000
CLONES = 4


def measure(home: Path, *, platform: str, tries: int) -> list[Row]:
    """A guest of 512 MB in which little runs; the disk that is written to has 1 GB that was written just before."""
    rows = [
        Row("checkpoint-down", "checkpoint of memory and disk: the guest does not answer", budget=Budget(200)),
        Row("checkpoint-paused", "likewise: its programs stand still"),
        Row("checkpoint", "checkpoint, to its answer"),
        Row("disk-down", f"checkpoint of the disk alone, {LARGE_MB} MB just written: writers wait", budget=Budget(200)),
        Row("restore", "restore of a checkpoint to ready", budget=Budget(450)),
        Row("fork", "fork of a running guest to ready"),
    ]
    argv = [sys.executable, "-m", "bench.checkpoints", str(home), platform, str(tries)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, timeout=SECONDS)
    try:
        samples = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        samples = {}
    for row in rows:
        row.values = samples.get(row.name, [])
        if not row.values:
            row.failures.append(f"the daemon ended with status {done.returncode}")
    return rows


async def sample(home: Path, platform: str, tries: int) -> dict[str, list[float]]:
    """Samples by the rows' names."""
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    async with running_host(home, runsc_platform=platform) as host:
        guest = await host.ensure()
        await host.ok(guest, "python3 -c pass; true")
        for _ in range(tries):
            kept, took, told = await checkpoint(host, verbs.TakeCheckpoint(guest, uuid4()))
            note("checkpoint-down", told["downtime_ms"])
            note("checkpoint-paused", told["paused_ms"])
            note("checkpoint", took)
            machine = EnsureMachine(uuid4(), host.shape(), "clone")
            note("restore", await timed(host, verbs.RestoreCheckpoint(kept, machine)))
            await host.destroy(machine.instance_id)
            await host.request(verbs.DropCheckpoint(kept))
            machine = EnsureMachine(uuid4(), host.shape(), "fork")
            note("fork", await timed(host, verbs.ForkMachine(guest, machine)))
            await host.destroy(machine.instance_id)
        for _ in range(max(3, tries // 3)):
            await host.ok(guest, f"head -c {LARGE_MB}000000 /dev/zero > large")
            kept, _, told = await checkpoint(host, verbs.SnapshotDisk(guest, uuid4()))
            note("disk-down", told["downtime_ms"])
            await host.request(verbs.DropCheckpoint(kept))
    return found


async def checkpoint(host: Host, verb: verbs.TakeCheckpoint | verbs.SnapshotDisk) -> tuple[UUID, float, dict[str, Any]]:
    """Its id, milliseconds to the answer, the answer."""
    began = time.perf_counter()
    told = await host.request(verb)
    return verb.checkpoint_id, (time.perf_counter() - began) * 1000, told


async def timed(host: Host, verb: verbs.RestoreCheckpoint | verbs.ForkMachine) -> float:
    """Milliseconds to the answer."""
    began = time.perf_counter()
    await host.request(verb)
    return (time.perf_counter() - began) * 1000


if __name__ == "__main__":
    print(json.dumps(asyncio.run(sample(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))))
