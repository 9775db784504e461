"""Control groups of this host: whatever version it has, and the version 2 side of a hybrid one."""

import asyncio
import os
import secrets
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from innkeeper.host.linux.cgroup import CgroupTree, Group, GroupV1, GroupV2
from innkeeper.host.linux.mounts import all_mounts

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(os.geteuid() != 0, reason="needs root for control groups")]

UNIFIED = next((Path(mount.target) for mount in all_mounts() if mount.fstype == "cgroup2"), None)
FORKS = "while :; do sleep 0.01; done & while :; do sleep 0.01; done"


def trees() -> list[CgroupTree]:
    found = [CgroupTree.detect()]
    if found[0].version == 1 and UNIFIED is not None:
        found.append(CgroupTree(2, {"unified": UNIFIED}))
    return found


@pytest.fixture(params=trees() if os.geteuid() == 0 else [], ids=lambda tree: f"v{tree.version}")
async def group(request: pytest.FixtureRequest) -> AsyncIterator[Group]:
    root = request.param.server_root(f"iktest-{secrets.token_hex(4)}")
    group = root.child("guest")
    group.create()
    group.create()
    yield group
    await root.kill_all()
    await root.remove()
    await root.remove()
    assert not root.exists()


def started_in(group: Group, script: str) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(["sh", "-c", f"read go; {script}"], stdin=subprocess.PIPE)
    group.add(child.pid)
    assert child.stdin is not None
    child.stdin.write(b"go\n")
    child.stdin.close()
    return child


def ticks(pids: list[int]) -> int:
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total


async def test_frozen_processes_stand_still_until_thawed(group: Group) -> None:
    child = started_in(group, "while :; do :; done")
    try:
        await group.freeze()
        await group.freeze()
        assert group.frozen()
        assert group.procs() == [child.pid]
        before = ticks([child.pid])
        await asyncio.sleep(0.2)
        assert ticks([child.pid]) == before
        group.thaw()
        group.thaw()
        assert not group.frozen()
        async with asyncio.timeout(20):
            while ticks([child.pid]) == before:
                await asyncio.sleep(0.02)
    finally:
        await group.kill_all()
        assert child.wait() == -9


async def test_kill_all_outruns_forks_and_reaches_the_frozen(group: Group) -> None:
    child = started_in(group, FORKS)
    nested = group.child("nested")
    nested.create()
    inner = started_in(nested, FORKS)
    async with asyncio.timeout(20):
        while len(group.procs()) < 4:
            await asyncio.sleep(0.02)
    await group.freeze()
    await group.kill_all()
    assert group.procs() == []
    assert child.wait() == inner.wait() == -9
    await group.kill_all()
    assert group.children() == ["nested"]
    await group.remove()
    assert not group.exists()


async def test_what_is_gone_is_tolerated(group: Group) -> None:
    absent = group.child("absent")
    assert not absent.exists()
    assert absent.procs() == []
    assert absent.children() == []
    absent.thaw()
    assert not absent.frozen()
    assert absent.usage().cpu_us == 0
    await absent.kill_all()
    await absent.remove()


@pytest.mark.skipif(CgroupTree.detect().version != 1, reason="this host has no version 1 controllers")
async def test_limits_hold_on_version_1(group: Group) -> None:
    if not isinstance(group, GroupV1):
        assert isinstance(group, GroupV2)
        group.set_limits(memory_bytes=1 << 26, cpu_quota=0.5, pids_max=10)  # none of these controllers is here
        return
    for memory in (64 << 20, 32 << 20, 128 << 20, None, 48 << 20):
        group.set_limits(memory_bytes=memory, cpu_quota=0.2, pids_max=10)
    directories = {directory.parts[4]: directory for directory in group.directories()}
    assert (directories["memory"] / "memory.limit_in_bytes").read_text() == f"{48 << 20}\n"

    child = started_in(group, "for i in $(seq 50); do sleep 5 & done 2>/dev/null; wait")
    # The shell gives up at the fork that is refused, and what it had started goes on.
    assert await asyncio.to_thread(child.wait) == 2
    assert 5 <= len(group.procs()) <= 10
    await group.kill_all()

    hungry = started_in(group, "exec tail /dev/zero")
    assert await asyncio.to_thread(hungry.wait) == -9
    usage = group.usage()
    assert usage.oom_kills >= 1
    assert usage.cpu_us > 0

    busy = started_in(group, "while :; do :; done")
    before = group.usage().cpu_us
    await asyncio.sleep(1)
    assert (group.usage().cpu_us - before) / 1e6 < 0.5
    await group.kill_all()
    busy.wait()
