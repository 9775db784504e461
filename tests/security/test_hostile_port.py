"""A program of a microVM's root in the agent's place: it takes the port of the link away from the agent, and plays with whoever begins a link there.

A port has no connections: the host begins each link by a RESET, which the program answers wrongly, halfway, endlessly or never. Where it answers well it breaks
the protocol behind that, as the hostile agents of tests/security/test_hostile_agent.py do."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import pytest
from tests.guest_drivers import QEMU, missing
from tests.guest_kernel import put_kernel
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, build_go, eventually, running_host
from tests.security.neighbour import GROWTH_MIB, proportional_mib

from innkeeper.errors import InnkeeperError
from innkeeper.host import executions, guest_link

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.long,
    NEEDS_RUNSC,
    pytest.mark.skipif(missing(QEMU) is not None, reason=str(missing(QEMU))),
    pytest.mark.timeout(600),
]

# What the program does once a link begins: the answers to a RESET of port.go, or `serve` and what it is asked for by a command line.
MODES = (
    "noise", "half", "mute", "other-nonces", "magic", "no-hello", "old", "boot-error", "twice", "serve:giant", "serve:pings", "serve:malformed",
    "serve:messages", "serve:credit", "serve:deep", "serve:opens", "serve:hello", "serve:never-read", "serve:strays", "serve:bytes", "serve:json",
    "serve:interleaved", "serve:silence", "serve:empties",
)  # fmt: skip
AT_ONCE = 8
CODES = ("instance_failed", "link_lost", "guest_error", "service_unavailable", "instance_not_found")


@asynccontextmanager
async def microvms(home: Path, *, keep_running: bool) -> AsyncIterator[Host]:
    async with running_host(home, keep_running=keep_running, freeze_after_seconds=3_600) as host:
        host.driver = QEMU
        yield host


@pytest.fixture(scope="module")
def program() -> bytes:
    return build_go(Path(__file__).parents[1] / "hostile_agent", "hostile").read_bytes()


async def plant(host: Host, program: bytes, mode: str) -> UUID:
    """A guest whose root takes the port away once there is a file /tmp/go."""
    guest = await host.ensure(shape=host.shape(memory_mb=256, disk_mb=1024))
    await host.write(guest, "/tmp/hostile", program, mode=0o755)
    await host.ok(guest, f"sync; (setsid sudo /tmp/hostile port {mode} < /dev/null > /dev/null 2>&1 &)")
    return guest


async def release(host: Host, guest: UUID) -> None:
    """Let it begin. Whether the agent still says that the file is written nobody knows."""
    with contextlib.suppress(InnkeeperError, TimeoutError):
        async with asyncio.timeout(2):
            await host.write(guest, "/tmp/go", b"")


async def attacked(home: Path, program: bytes, modes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    put_kernel(home / "host")
    guests: dict[str, UUID] = {}
    try:
        async with microvms(home, keep_running=True) as host:
            honest = await host.ensure(shape=host.shape(memory_mb=256, disk_mb=1024))
            for mode in modes:
                guests[mode] = await plant(host, program, mode.partition(":")[0])
            await asyncio.gather(*(release(host, guest) for guest in guests.values()))
    finally:
        # The next one begins the links, and takes everything away.
        monkeypatch.setattr(executions, "OVERTIME_SECONDS", 0.5)
        monkeypatch.setattr(guest_link, "SILENT_SECONDS", 2.0)
        monkeypatch.setattr(guest_link, "HELLO_SECONDS", 1.0)
        async with microvms(home, keep_running=False) as host:
            assert host.daemon.recovered.adopted == len(modes) + 1
            for mode, guest in guests.items():
                await costs_its_own_instance(host, honest, guest, mode)
            # It is made anew on its disk.
            again = guests[modes[0]]
            await host.ensure(again, shape=host.shape(memory_mb=256, disk_mb=1024))
            assert (await host.ok(again, "test -e /tmp/hostile && echo kept")).text == "kept\n"


async def costs_its_own_instance(host: Host, honest: UUID, guest: UUID, mode: str) -> None:
    before = most = proportional_mib()
    heard = 0

    async def attack() -> None:
        for _ in range(20):
            with pytest.raises(InnkeeperError) as refused:
                await host.run(guest, mode.partition(":")[2] or "true", timeout_seconds=1.5)
            assert refused.value.code in CODES, refused.value
            assert len(refused.value.message) < 700 and refused.value.message.isprintable()
            if await host.listed(guest) is None:
                return
        raise AssertionError(f"{mode}: the instance never fails")

    attacking = asyncio.create_task(attack())
    try:
        while not attacking.done():
            assert (await host.run(honest, "echo neighbour")).text == "neighbour\n"
            heard += 1
            most = max(most, proportional_mib())
        await attacking
    finally:
        attacking.cancel()
    print(f"{mode}: daemon grew by {most - before:.1f} MiB, the neighbour ran {heard} commands")
    assert most - before < GROWTH_MIB and heard > 0

    async def gone() -> bool:
        return await host.listed(guest) is None and (await host.status())["leaked"] == 0

    await eventually(gone, seconds=60)


@pytest.fixture
def home() -> Iterator[Path]:
    # Not below pytest's own: the path of a socket has a limit, and a link's is in there.
    folder = Path(tempfile.mkdtemp(prefix="ikp", dir="/var/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("at", range(0, len(MODES), AT_ONCE))
async def test_whatever_is_at_the_port_costs_its_own_instance(
    home: Path, program: bytes, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    await attacked(home, program, MODES[at : at + AT_ONCE], monkeypatch)
