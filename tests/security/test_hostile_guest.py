"""Programs in a guest that take all they can get: the guest is slowed or ends, its neighbour and the host go on, and nothing of it is left."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest
from tests.guest_drivers import GVISOR, QEMU
from tests.guest_kernel import put_kernel
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, eventually, running_host
from tests.security.neighbour import ATTEMPTS, GROWTH_MIB, Side, median_seconds, proportional_mib

from innkeeper.errors import InnkeeperError
from innkeeper.host.drivers import gvisor_spec, qemu_command, vm_jail
from innkeeper.host.linux.cgroup import CgroupTree

pytestmark = [pytest.mark.anyio, pytest.mark.alone, NEEDS_RUNSC]

MEMORY_MB = 512
# A program in a microVM whose instructions are translated is many times slower to begin.
PATIENCE_SECONDS = {GVISOR: 60, QEMU: 180}
ATTACKS = {
    "forks": "bomb() { bomb | bomb & }; bomb; sleep 60",
    "memory": "python3 -c 'x = []\nwhile True: x.append(b\"x\" * (1 << 20))'",
    "output": "for i in 1 2 3 4; do yes & done; wait",
    "cpu": "for i in 1 2 3 4 5 6 7 8; do while :; do :; done & done; wait",
    "writes": "while :; do dd if=/dev/zero of=/home/user/churn bs=1M count=100 conv=fsync status=none; done",
    "disk": "cat /dev/zero > /home/user/fill; sleep 60",
    "files": "python3 -c 'import os, itertools\nfor n in itertools.count():\n  open(f\"/home/user/f{n}\", \"w\").close()'; sleep 60",
    "descriptors": "python3 -c 'import os, time\ntry:\n  while True: os.dup(0)\nexcept OSError: time.sleep(60)'",
    "threads": "python3 -c 'import threading as t,time\ntry:\n  while True: t.Thread(target=time.sleep, args=(60,)).start()\nexcept Exception: time.sleep(60)'",
    "shm": "cat /dev/zero > /dev/shm/fill; sleep 60",
    "tmp": "cat /dev/zero > /tmp/fill; sleep 60",
    "zombies": "python3 -c 'import os, time\ntry:\n  while True:\n    if os.fork() == 0: os._exit(0)\nexcept OSError: time.sleep(60)'",
    "deaf": "trap \"\" TERM INT HUP; while :; do sleep 1; done",
}  # fmt: skip
QUICK = ["forks", "output", "cpu", "writes", "disk"]


@pytest.fixture(scope="module")
async def neighbours(
    anyio_backend: str, driver: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Host, UUID]]:
    """One daemon with a guest that works."""
    home = tmp_path_factory.mktemp("home")
    if driver == QEMU:
        put_kernel(home / "host")
    async with running_host(home, freeze_after_seconds=60) as host:
        host.driver = driver
        yield host, await host.ensure()


@pytest.fixture
async def attacker(neighbours: tuple[Host, UUID]) -> AsyncIterator[UUID]:
    """A guest of its own with small limits, destroyed afterwards whatever it did."""
    host, _ = neighbours
    instance_id = await host.ensure(shape=host.shape(memory_mb=MEMORY_MB, disk_mb=1024))
    yield instance_id
    async with asyncio.timeout(60):
        await host.destroy(instance_id)

    async def gone() -> bool:
        return bool((await host.status())["leaked"] == 0)

    await eventually(gone)


async def usable_again(host: Host, attacker: UUID) -> None:
    """It answers, restarted on its disk where it has failed: the next request for a room does that."""

    async def answers() -> bool:
        with contextlib.suppress(InnkeeperError):
            await host.ensure(attacker, shape=host.shape(memory_mb=MEMORY_MB, disk_mb=1024))
            return (await host.run(attacker, "true", timeout_seconds=20)).exit_code == 0
        return False

    await eventually(answers, seconds=PATIENCE_SECONDS[host.driver or GVISOR])


async def keeps_to_itself(neighbours: tuple[Host, UUID], attacker: UUID, name: str, *, seconds: float) -> None:
    host, honest = neighbours
    side = Side(name)

    async def true() -> None:
        assert (await host.run(honest, "true")).exit_code == 0

    before = proportional_mib()
    for _ in range(ATTEMPTS):
        side.quiet.append(await median_seconds(true, seconds=seconds / 2))
        await host.ensure(attacker, shape=host.shape(memory_mb=MEMORY_MB, disk_mb=1024))
        attacking = asyncio.ensure_future(host.run(attacker, ATTACKS[name], timeout_seconds=seconds + 1.5))
        # Until it has what it wants: it is the steady state that a neighbour has to live with.
        await asyncio.sleep(0.5)
        side.attacked.append(await median_seconds(true, seconds=seconds))
        # The guest fails, or the command ends at its time limit.
        with contextlib.suppress(InnkeeperError):
            async with asyncio.timeout(seconds + PATIENCE_SECONDS[host.driver or GVISOR]):
                assert (await attacking).exit_code in (124, 137)
        if side.fine():
            break
    grown = proportional_mib() - before
    print(f"{side}; daemon grew by {grown:.1f} MiB")
    assert side.fine(), str(side)
    assert grown < GROWTH_MIB
    if name != "forks":
        # What a bomb leaves behind outlives the command, as it would on any computer: that room is deleted.
        await usable_again(host, attacker)


@pytest.mark.microvms
@pytest.mark.parametrize("name", QUICK)
async def test_a_neighbour_hardly_notices(neighbours: tuple[Host, UUID], attacker: UUID, name: str) -> None:
    await keeps_to_itself(neighbours, attacker, name, seconds=1.0)


@pytest.mark.long
@pytest.mark.parametrize("name", ATTACKS)
async def test_the_same_for_longer_and_in_every_way(neighbours: tuple[Host, UUID], attacker: UUID, name: str) -> None:
    await keeps_to_itself(neighbours, attacker, name, seconds=5)


@pytest.mark.gvisor_only(reason="a microVM's own kernel ends whoever takes too much of its memory")
async def test_memory_ends_the_guest_and_says_so(neighbours: tuple[Host, UUID], attacker: UUID) -> None:
    host, honest = neighbours
    await host.ok(attacker, "echo kept > /home/user/kept; sync")
    with pytest.raises(InnkeeperError) as refused:
        await host.run(attacker, ATTACKS["memory"], timeout_seconds=60)
    assert refused.value.code == "instance_failed"
    assert "memory" in refused.value.message
    assert (await host.run(honest, "echo neighbour")).text == "neighbour\n"
    await usable_again(host, attacker)
    assert (await host.ok(attacker, "cat /home/user/kept")).text == "kept\n"


@pytest.mark.microvms_only
async def test_memory_ends_whoever_took_it_in_a_microvm(neighbours: tuple[Host, UUID], attacker: UUID) -> None:
    host, honest = neighbours
    machine = host.machine(attacker)
    assert (await host.run(attacker, ATTACKS["memory"], timeout_seconds=180)).exit_code == 137
    assert (await host.ok(attacker, "echo goes on")).text == "goes on\n"
    assert host.machine(attacker) is machine
    assert (await host.run(honest, "echo neighbour")).text == "neighbour\n"


@pytest.mark.microvms
async def test_every_process_of_a_guest_is_in_its_limits(neighbours: tuple[Host, UUID], attacker: UUID) -> None:
    host, _ = neighbours
    machine = host.machine(attacker)
    suffix = "-vm" if host.driver == QEMU else ""
    group = CgroupTree.detect().server_root(f"innkeeper-{host.settings.server_id}{suffix}").child(machine.id)
    inside = set(group.procs())
    if host.driver == QEMU:
        # QEMU is alone there, and holds the whole guest.
        named = _processes(b"qemu-system", machine.id)
        assert len(named) == 1 and named == inside, (named, inside)
        most_mb, pids = 2 * MEMORY_MB + qemu_command.OVERHEAD_MIB + qemu_command.TCG_CACHE_MIB, vm_jail.PIDS_MAX
    else:
        named = _processes(b"runsc", machine.id)
        # The sentry and the gofer; systrap's stubs have no command line.
        assert len(named) >= 2
        assert named <= inside, named - inside
        most_mb, pids = MEMORY_MB + gvisor_spec.SENTRY_MEMORY_MB, gvisor_spec.PIDS_MAX
    limits = {}
    for directory in group.directories():
        for file in ("memory.limit_in_bytes", "memory.max", "cpu.cfs_quota_us", "pids.max"):
            with contextlib.suppress(OSError):
                limits[file] = (directory / file).read_text().split()[0]
    memory = int(limits.get("memory.limit_in_bytes") or limits["memory.max"]) >> 20
    assert MEMORY_MB < memory <= most_mb
    assert limits["pids.max"] == str(pids)
    if "cpu.cfs_quota_us" in limits:
        assert limits["cpu.cfs_quota_us"] == "100000"


def _processes(program: bytes, machine_id: str) -> set[int]:
    """Those whose command line names the machine, of one program."""
    commands = {int(entry.name): _command(entry) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    found = (pid for pid, words in commands.items() if program in words and machine_id.encode() in words)
    return set(found)


def _command(entry: Path) -> bytes:
    with contextlib.suppress(OSError):
        return (entry / "cmdline").read_bytes()
    return b""
