"""Orphans are collected while nobody's exit status is stolen, under load."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

from innkeeper.host.linux import command
from innkeeper.host.linux.pidfd import PidFd, wait_gone

pytestmark = pytest.mark.anyio

# In a process of its own: being a subreaper and handling SIGCHLD are for the life of a process.
UNDER_LOAD = """
import asyncio, os, subprocess, time
from innkeeper.host.linux import command
from innkeeper.host.linux.subreaper import OrphanReaper, become_subreaper

async def ours(number):
    for turn in range(10):
        status = (number * 10 + turn) % 100
        done = await command.run(["sh", "-c", f"exit {status}"], check=False)
        assert done.returncode == status, (done, status)

async def orphans():
    for _ in range(20):
        # Each leaves five children behind, which end after it.
        await command.run(["sh", "-c", "for i in 1 2 3 4 5; do (sleep 0.0$i; exit 7) >/dev/null 2>&1 & done"])

def in_a_thread():
    for status in range(20):
        assert subprocess.run(["sh", "-c", f"exit {status}"]).returncode == status

def zombies():
    own = os.getpid()
    found = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                state, parent = open(f"/proc/{entry}/stat").read().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            found += state == "Z" and int(parent) == own
    return found

async def main():
    become_subreaper()
    # A child whose owner never comes for it must not hide the orphans behind it.
    with command.own_children.being_spawned():
        stubborn = subprocess.Popen(["true"])
        command.own_children.add(stubborn.pid, stubborn)
    with OrphanReaper().running() as reaper:
        async with asyncio.TaskGroup() as group:
            for number in range(10):
                group.create_task(ours(number))
            group.create_task(orphans())
            group.create_task(asyncio.to_thread(in_a_thread))
        deadline = time.monotonic() + 10
        while reaper.reaped < 100 or zombies() > 1:
            assert time.monotonic() < deadline, (reaper.reaped, zombies())
            await asyncio.sleep(0.02)
        assert stubborn.wait() == 0
        print("reaped", reaper.reaped)

asyncio.run(main())
"""


async def test_every_status_arrives_and_no_zombie_stays() -> None:
    completed = await command.run([sys.executable, "-c", UNDER_LOAD], timeout_seconds=60)
    assert completed.stdout.splitlines()[-1] == b"reaped 100", completed
    assert completed.stderr == b""


async def test_an_orphan_is_gone_within_milliseconds() -> None:
    script = """
import asyncio, os, time
from innkeeper.host.linux import command
from innkeeper.host.linux.subreaper import OrphanReaper, become_subreaper
async def main():
    become_subreaper()
    with OrphanReaper().running():
        done = await command.run(["sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!"])
        pid = int(done.stdout)
        start = time.perf_counter()
        os.kill(pid, 9)
        while os.path.exists(f"/proc/{pid}"):
            await asyncio.sleep(0.001)
        print((time.perf_counter() - start) * 1000)
asyncio.run(main())
"""
    completed = await command.run([sys.executable, "-c", script], timeout_seconds=30)
    assert float(completed.stdout.splitlines()[-1]) < 20_000


async def test_waiting_for_a_process_that_is_not_a_child() -> None:
    completed = await command.run(["sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!"])
    pid = int(completed.stdout)
    with PidFd(pid) as process:
        assert not process.exited
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await process.wait()
        start = time.monotonic()
        waiting = asyncio.create_task(wait_gone(pid))
        assert process.send_signal(signal.SIGKILL)
        await process.wait()
        await waiting
        assert time.monotonic() - start < 20
        assert process.exited
    process.close()


async def test_a_process_that_is_gone() -> None:
    child = subprocess.Popen(["true"])  # noqa: ASYNC220
    child.wait()
    await wait_gone(child.pid)
    with pytest.raises(ProcessLookupError):
        PidFd(child.pid)


async def test_a_command_is_killed_with_its_whole_session_on_timeout_and_cancellation() -> None:
    async def pids() -> list[str]:
        found = await command.run(["sh", "-c", "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '"], check=False)
        return [word for word in found.stdout.decode().split() if word == marker]

    marker = f"86{os.getpid()}"
    argv = ["sh", "-c", f"sleep {marker} & sleep {marker}"]
    with pytest.raises(command.CommandTimedOut):
        await command.run(argv, timeout_seconds=0.2)
    task = asyncio.create_task(command.run(argv))
    async with asyncio.timeout(20):
        while len(await pids()) < 2:
            await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(20):  # killed, but the kernel takes a process away a moment later
        while await pids():
            await asyncio.sleep(0.02)
