"""Rows about microVMs, each beside the same thing in a gVisor guest, sample by sample in turn, asked of a host daemon over its bus.

The daemon is one of its own, in a process of its own: `python -m bench.drivers TRIES`, which prints samples as JSON, a line
after each row with all that there are by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import structlog
from tests.guest_kernel import put_kernel
from tests.integration.daemon_fixture import Host, eventually, running_host

from bench.checkpoints import checkpoint
from bench.processes import cpu_seconds, pss_mb
from bench.rows import Budget, Row
from innkeeper.core import checkpoint_verbs, host_verbs
from innkeeper.core.host_verbs import EnsureMachine
from innkeeper.host.linux.cgroup import CgroupTree
from innkeeper.wire.stream import Message

GVISOR, QEMU = DRIVERS = ("gvisor", "qemu")
# What ends the name of the server's control group of each.
GROUPS = {GVISOR: "", QEMU: "-vm"}
SECONDS = 1_800
END_SECONDS = 120
START_SECONDS = 300.0
TRANSFER_MB = 64
MEMORY_MB = 256
IDLE_SECONDS = 5.0
COMMANDS = {
    "true": "/bin/true",
    "python": "python3 -c pass",
    "cpu": "python3 -c 'x = 0\nfor n in range(1000000): x += n * n'",
    "forks": "n=0; while [ $n -lt 100 ]; do /bin/true; n=$((n+1)); done",
    "files": "python3 - <<'END'\n"
    "import os, shutil\nos.mkdir('made')\n"
    "for n in range(2000):\n  with open(f'made/{n}', 'w') as file: file.write('x' * 1000)\n"
    "shutil.rmtree('made')\nEND",
    "one-of-10k": "echo x > many/50/50",
}
MANY = (
    "python3 - <<'END'\n"
    "import os\n"
    "for directory in range(100):\n  os.makedirs(f'many/{directory}')\n"
    "  for n in range(100): os.close(os.open(f'many/{directory}/{n}', os.O_CREAT))\nEND"
)


def measure(*, tries: int) -> list[Row]:
    """Guests of 256 MB and one processor in which little runs. The VM's instructions are translated unless the host has KVM."""
    rows = [
        Row("create", "microVM: create to ready", budget=Budget(150)),
        Row("claim", "microVM: claim of a paused one to ready", budget=Budget(15, 40)),
        Row("true", "microVM: `/bin/true`, changes included"),
        Row("around", "microVM: everything around the agent's own spawn", budget=Budget(10)),
        Row("python", "microVM: `python3 -c pass`"),
        Row("cpu", "microVM: a million additions in Python"),
        Row("forks", "microVM: 100 times `/bin/true` in a shell"),
        Row("files", "microVM: 2,000 files made and removed"),
        Row("one-of-10k", "microVM: one file written beside 10,000, changes included"),
        Row("in", f"microVM: {TRANSFER_MB} MB into a file", "MB/s", Budget(100, at_least=True)),
        Row("out", f"microVM: {TRANSFER_MB} MB out of it", "MB/s", Budget(250, at_least=True)),
        Row("pss", "microVM: frozen guest", "MB PSS", Budget(55)),
        Row("idle", "microVM: frozen guest's CPU", "% of a core", Budget(0.0)),
        Row("checkpoint-down", "microVM: checkpoint: the guest does not answer", budget=Budget(200)),
        Row("checkpoint", "microVM: checkpoint, to its answer"),
        Row("restore", "microVM: restore of a checkpoint to ready", budget=Budget(250)),
        Row("fork", "microVM: fork of a running guest to ready"),
    ]
    return sampled(rows, "bench.drivers", tries)


def sampled(rows: list[Row], module: str, tries: int) -> list[Row]:
    """The rows with what `python -m MODULE TRIES` found: the microVM's samples, and gVisor's as their peer."""
    running = subprocess.Popen([sys.executable, "-m", module, str(tries)], stdout=subprocess.PIPE)
    try:
        said, _ = running.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        # So that it takes its guests away: they would outlive it.
        running.send_signal(signal.SIGINT)
        said, _ = running.communicate(timeout=END_SECONDS)
    # What was measured by then, row by row.
    samples = json.loads(said.splitlines()[-1]) if said else {}
    for row in rows:
        row.values = samples.get(f"{QEMU} {row.name}", [])
        row.peer(GVISOR).values = samples.get(f"{GVISOR} {row.name}", [])
        if not row.values:
            row.failures.append(
                samples.get("why", {}).get(row.name, f"the daemon ended with status {running.returncode}")
            )
    return rows


@contextlib.contextmanager
def home_for_both() -> Iterator[Path]:
    """A state directory with a kernel for microVMs in it, away at the end."""
    # Not /tmp: where that is memory, the disks would be too.
    home = Path(tempfile.mkdtemp(prefix="innbench-", dir="/var/tmp"))
    home.chmod(0o755)
    put_kernel(home / "host")
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


class Samples:
    """What was measured, by driver and row, and why something was not."""

    def __init__(self, host: Host, tries: int) -> None:
        self.host, self.tries = host, tries
        self.values: dict[str, Any] = {"why": {}}
        self.guests: dict[str, UUID] = {}

    def note(self, driver: str, name: str, value: float) -> None:
        """One sample."""
        self.values.setdefault(f"{driver} {name}", []).append(value)

    def shape(self, driver: str, **more: Any) -> Any:
        """What every guest here is."""
        return self.host.shape(driver=driver, memory_mb=MEMORY_MB, disk_mb=1024, **more)

    async def ensure(self, driver: str, **more: Any) -> UUID:
        """A ready guest."""
        request = EnsureMachine(uuid4(), self.shape(driver, **more), "guest")
        self.host.instances.add(request.instance_id)
        await self.host.request(request, timeout_seconds=START_SECONDS)
        return request.instance_id

    async def each(self, name: str, work: Callable[[str], Awaitable[None]], *, tries: int | None = None) -> None:
        """Do it so many times on each driver in turn. What fails ends the row, not the bench."""
        try:
            for _ in range(tries or self.tries):
                for driver in DRIVERS:
                    await work(driver)
        except Exception as error:
            self.values["why"][name] = f"{type(error).__name__}: {error}"
            print(f"{name}: {error}", file=sys.stderr)
        print(json.dumps(self.values), flush=True)

    async def timed(self, driver: str, name: str, work: Awaitable[Any]) -> Any:
        """Its result; the milliseconds are a sample."""
        began = time.perf_counter()
        result = await work
        self.note(driver, name, (time.perf_counter() - began) * 1000)
        return result

    # --- the rows ----------------------------------------------------------------------------------------------------

    async def all(self) -> None:
        """Every row."""
        for driver in DRIVERS:
            # The first of a kind makes what the next ones are started from.
            self.guests[driver] = await self.ensure(driver)
            await asyncio.sleep(1)
        few = max(2, self.tries // 3)
        await self.each("create", self.create, tries=few)
        await self.each("claim", self.claim, tries=few)
        await self.each("around", self.around)
        await self.each("in", self.transfer, tries=few)
        await self.each("pss", self.idle, tries=1)
        await self.each("checkpoint", self.checkpoint, tries=few)
        for name in COMMANDS:
            if name == "one-of-10k":
                await self.each(name, lambda driver: self.ok(driver, MANY), tries=1)
            await self.each(name, lambda driver, name=name: self.command(driver, name))  # type: ignore[misc]

    async def create(self, driver: str) -> None:
        """A new guest."""
        await self.host.destroy(await self.timed(driver, "create", self.ensure(driver)))

    async def claim(self, driver: str) -> None:
        """One that was made ahead."""
        pool = host_verbs.WarmPool(self.shape(driver, pool_key=secrets.token_hex(4)), 1)
        await self.host.request(host_verbs.SetPools((pool,)))

        async def ready() -> bool:
            return bool((await self.host.status())["pools"][0]["ready"])

        await eventually(ready, seconds=START_SECONDS)
        taken = await self.timed(driver, "claim", self.ensure(driver, pool_key=pool.shape.pool_key))
        await self.host.request(host_verbs.SetPools(()))
        await self.host.destroy(taken)

    async def ok(self, driver: str, line: str) -> Any:
        """Run a line in the driver's guest."""
        return await self.host.ok(self.guests[driver], line, timeout_seconds=START_SECONDS)

    async def command(self, driver: str, name: str) -> None:
        """One of the commands, a moment after the last one."""
        await asyncio.sleep(0.1)
        await self.timed(driver, name, self.ok(driver, COMMANDS[name]))

    async def around(self, driver: str) -> None:
        """The daemon's answer less that of the agent alone."""
        machine = self.host.machine(self.guests[driver])
        async with machine.in_use():
            await asyncio.sleep(0.1)
            began = time.perf_counter()
            params = {"id": secrets.token_hex(8), "argv": ["/bin/true"], "merge": True}
            stream = await machine.endpoint.open("exec", params)
            while (event := await stream.next_event()) is not None:
                if isinstance(event, Message) and event.body.get("exited"):
                    alone = (time.perf_counter() - began) * 1000
            await asyncio.sleep(0.1)
            began = time.perf_counter()
            await self.ok(driver, COMMANDS["true"])
            self.note(driver, "around", (time.perf_counter() - began) * 1000 - alone)

    async def transfer(self, driver: str) -> None:
        """A file in and out again."""
        piece, guest = os.urandom(1 << 20), self.guests[driver]
        for name in ("in", "out"):
            began = time.perf_counter()
            if name == "in":
                await self.host.write(guest, "/home/user/file", *[piece] * TRANSFER_MB)
            else:
                _, content = await self.host.read(guest, "/home/user/file")
                if len(content) != TRANSFER_MB << 20:
                    raise RuntimeError(f"{len(content)} bytes came back")
            self.note(driver, name, (TRANSFER_MB << 20) / 1e6 / (time.perf_counter() - began))

    async def idle(self, driver: str) -> None:
        """A guest that has run little, frozen."""
        guest = await self.ensure(driver)
        await self.host.ok(guest, "true", timeout_seconds=START_SECONDS)
        machine = self.host.machine(guest)
        await eventually(lambda: machine.frozen, seconds=START_SECONDS)
        root = CgroupTree.detect().server_root(f"innkeeper-{self.host.settings.server_id}{GROUPS[driver]}")
        pids = root.child(machine.id).procs()
        self.note(driver, "pss", sum(map(pss_mb, pids)))
        before = cpu_seconds(pids)
        await asyncio.sleep(IDLE_SECONDS)
        self.note(driver, "idle", 100 * (cpu_seconds(pids) - before) / IDLE_SECONDS)
        await self.host.destroy(guest)

    async def checkpoint(self, driver: str) -> None:
        """Memory and disk of the guest kept, another one started from that, and a fork."""
        guest = self.guests[driver]
        kept, took, told = await checkpoint(self.host, checkpoint_verbs.TakeCheckpoint(guest, uuid4()))
        self.note(driver, "checkpoint", took)
        self.note(driver, "checkpoint-down", told["downtime_ms"])
        for name in ("restore", "fork"):
            machine = EnsureMachine(uuid4(), self.shape(driver), name)
            self.host.instances.add(machine.instance_id)
            verb: Any = (
                checkpoint_verbs.RestoreCheckpoint(kept, machine)
                if name == "restore"
                else checkpoint_verbs.ForkMachine(guest, machine)
            )
            await self.timed(driver, name, self.host.request(verb, timeout_seconds=START_SECONDS))
            await self.host.destroy(machine.instance_id)
        await self.host.request(checkpoint_verbs.DropCheckpoint(kept))


async def sample(tries: int) -> None:
    """Print all samples so far after each row."""
    with home_for_both() as home:
        async with running_host(home) as host:
            await Samples(host, tries).all()


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    asyncio.run(sample(int(sys.argv[1])))
