"""Rows about the change scan: a scanner of the bench's own over the disk of a real room."""

from __future__ import annotations

import asyncio
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from uuid import uuid4

from bench.rows import Budget, Row
from bench.server import Room, Server
from innkeeper.host.change_scanner import ChangeScanner, ScanTarget

TRIES = 20
BUDGETS_MS = {1_000: 3, 10_000: 17, 100_000: 140}
UNCHANGED_MS = 3
# An entry this young is looked at again by the next scan.
SETTLE_SECONDS = 0.05
FILES_PER_DIRECTORY = 500


async def measure(server: Server, *, sizes: tuple[int, ...]) -> list[Row]:
    """Idle, with one change, and where the kernel says that nothing changed; at each size."""
    rows: list[Row] = []
    room = Room(server, server.profile("bench-changes", warm_pool_size=0), "changes")
    room.create()
    mount = server.settings.host_dir / "mounts" / "machines" / server.machine_of(room)
    lower = next((server.settings.host_dir / "mounts" / "images").iterdir())
    nobody = pwd.getpwnam("nobody")
    # The scanner is nobody: it must reach its folder, and nothing else may.
    folder = Path(tempfile.mkdtemp(prefix="innbench-changes-", dir="/var/tmp"))
    shutil.chown(folder, nobody.pw_uid, nobody.pw_gid)
    target = ScanTarget(mount / "disk" / "u", (lower,), folder / "baseline")
    agent = next((server.settings.host_dir / "agent").glob("*/inn-agent"))
    try:
        async with ChangeScanner.start(agent, uid=nobody.pw_uid, gid=nobody.pw_gid) as scanner:
            made = 0
            for size in sizes:
                room.run(_make(made, size), timeout=600)
                made = size
                rows += await _at_size(scanner, target, room, size)
    finally:
        shutil.rmtree(folder)
        room.destroy()
    return rows


async def _at_size(scanner: ChangeScanner, target: ScanTarget, room: Room, size: int) -> list[Row]:
    budget = Budget(BUDGETS_MS[size])
    idle = Row(f"scan-{size}", f"change scan of {size:,} files, nothing changed", budget=budget)
    changed = Row(f"scan-{size}-one", f"change scan of {size:,} files, one changed", budget=budget)
    known = Row(
        f"scan-{size}-known", f"likewise, where the kernel counts changes ({size:,} files)", budget=Budget(UNCHANGED_MS)
    )
    await asyncio.sleep(SETTLE_SECONDS)
    await scanner.baseline(target)
    for _ in range(TRIES):
        room.run("echo x >> ~/one")
        await asyncio.sleep(SETTLE_SECONDS)
        await _scan(scanner, target, changed, expected=1)
        await asyncio.sleep(SETTLE_SECONDS)
        await _scan(scanner, target, idle, expected=0)
        idle.peer("find").take(lambda: _find(target.upper))
    if scanner.watch(target.upper):
        try:
            await _scan(scanner, target, Row("", ""), expected=0)
            for _ in range(TRIES):
                await _scan(scanner, target, known, expected=0)
        finally:
            scanner.unwatch(target.upper)
    else:
        known.note = "this kernel cannot tell"
    return [idle, changed, known]


async def _scan(scanner: ChangeScanner, target: ScanTarget, row: Row, *, expected: int) -> None:
    began = time.perf_counter()
    found = await scanner.changes(target, result=target.baseline.parent / uuid4().hex)
    took = (time.perf_counter() - began) * 1000
    if found.total == expected:
        row.values.append(took)
    else:
        row.failures.append(f"{found.total} changes instead of {expected}")


def _find(directory: Path) -> None:
    """What it costs a C program to ask for the same metadata, with nothing kept and nothing compared."""
    subprocess.run(["find", directory, "-printf", "%s%T@"], check=True, stdout=subprocess.DEVNULL)


def _make(start: int, end: int) -> str:
    """A command that makes the files number `start` to `end`."""
    body = f"""
import os
for n in range({start}, {end}):
    d = os.path.expanduser('~/many/%d' % (n // {FILES_PER_DIRECTORY}))
    if n % {FILES_PER_DIRECTORY} == 0 or n == {start}: os.makedirs(d, exist_ok=True)
    open(d + '/%d.txt' % n, 'w').close()
"""
    return f"python3 - <<'END'\n{body}\nEND"
