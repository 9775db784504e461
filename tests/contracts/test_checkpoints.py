"""The driver contract's verbs for checkpoints, on every driver that has them: real sandboxes, real disks, the real agent."""

import asyncio
import contextlib
import os
import re
import secrets
import signal
from collections.abc import AsyncIterator, Callable

import pytest
from tests.contracts.drivers import KINDS, LINK_SECONDS, Guest, Kind, Lab, Saved, lab, traces

from innkeeper.errors import CheckpointDamagedError, CheckpointFailedError, InnkeeperError, LinkLostError, NotHereError
from innkeeper.host.disks.disk_template import reflink
from innkeeper.host.drivers import vm_memory
from innkeeper.host.drivers.contract import Capabilities, checkpointing
from innkeeper.host.drivers.qemu import CONTROL_SOCKET
from innkeeper.host.drivers.qmp import Qmp
from innkeeper.host.guest_link import GuestEndpoint
from innkeeper.host.linux.freeze import frozen
from innkeeper.host.linux.subreaper import OrphanReaper, become_subreaper

pytestmark = pytest.mark.anyio

# Tells every 20 ms how often, in memory, and by which name it knows itself, through everything that is said to survive (docs/drivers.md).
COUNTER = """
import ctypes, fcntl, mmap, os, socket, time, tty
listener = socket.socket(); listener.bind(("127.0.0.1", 8000)); listener.listen()
tcp = socket.create_connection(("127.0.0.1", 8000)); accepted, _ = listener.accept()
named = socket.socket(socket.AF_UNIX); named.bind("/root/socket"); named.listen()
unix = socket.socket(socket.AF_UNIX); unix.connect("/root/socket"); peer, _ = named.accept()
os.mkfifo("/root/fifo"); fifo = os.open("/root/fifo", os.O_RDWR)
out, into = os.pipe()
memory = os.memfd_create("memory"); os.write(memory, b"kept")
shared = open("/dev/shm/shared", "w+"); shared.write("shared"); shared.flush()
os.mkdir("/root/place"); os.chdir("/root/place")
terminal, line = os.openpty(); tty.setraw(line)
libc = ctypes.CDLL(None); watch = libc.inotify_init1(0); assert libc.inotify_add_watch(watch, b"/root/place", 0x100) > 0
lock = open("/root/lock", "w"); fcntl.flock(lock, fcntl.LOCK_EX)
gone = None
backing = os.open("/root/mapped", os.O_RDWR | os.O_CREAT); os.truncate(backing, 4096); mapped = mmap.mmap(backing, 4096)

def held():
    with open("/root/lock") as other:
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True

count = 0
while True:
    count += 1
    mapped[:1] = bytes([count % 256]); assert os.pread(backing, 1, 0) == mapped[:1] and held()
    open("made", "w").close(); assert b"made" in os.read(watch, 4096); os.unlink("made")
    assert shared.seek(0) == 0 and shared.read() == "shared"
    for write, read in ((tcp.send, accepted.recv), (unix.send, peer.recv)):
        write(b"x"); assert read(1) == b"x"
    for write, read in ((fifo, fifo), (into, out), (terminal, line), (line, terminal)):
        os.write(write, b"x"); assert os.read(read, 1) == b"x"
    assert os.pread(memory, 4, 0) == b"kept" and (gone is None or os.pread(gone, 4, 0) == b"gone")
    with open("/root/new", "w") as file:
        file.write(f"{count} {socket.gethostname()} {os.urandom(8).hex()}")
    os.rename("/root/new", "/root/told")
    time.sleep(0.02)
"""
# What gVisor does not save.
DELETED = """
gone = os.open("/root/gone", os.O_RDWR | os.O_CREAT); os.unlink("/root/gone"); os.write(gone, b"gone")
"""
# Changes 100 MB as fast as it can.
DIRTY = """
import os
memory = bytearray(100 << 20)
while True:
    for at in range(0, len(memory), 4096):
        memory[at : at + 8] = os.urandom(8)
    open("/root/ready", "w").close()
"""
# Connects to the socket that only the agent is meant to use, and keeps it.
HOLDER = """
import socket, time
held = socket.socket(socket.AF_UNIX); held.connect("/.innkeeper/link/agent.sock")
open("/root/ready", "w").close()
time.sleep(1000)
"""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, id=kind.name, marks=[] if kind is KINDS[0] else pytest.mark.long) for kind in KINDS],
)
async def server(
    anyio_backend: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Lab]:
    kind: Kind = request.param
    if kind.missing is not None:
        pytest.skip(kind.missing)
    become_subreaper()
    with OrphanReaper().running():
        async with lab(kind, tmp_path_factory.mktemp(kind.name)) as there:
            if not there.driver.capabilities.checkpoint:
                pytest.skip("this driver has no checkpoints")
            yield there


@pytest.fixture
async def guest(server: Lab) -> AsyncIterator[Guest]:
    there = await server.start()
    await server.introduce(there)
    yield there
    await server.stack.pop_all().aclose()
    assert await server.driver.found() == set()


async def begin(guest: Guest, program: str, *, ready: str) -> None:
    """Start a program that goes on, and wait for the file by which it says so."""
    await guest.run(f"cat > /root/program.py <<'END'\n{program}END\n(python3 /root/program.py > /root/said 2>&1 &)")
    async with asyncio.timeout(LINK_SECONDS):
        while (await guest.run(f"test -e {ready}"))[0] != 0:
            assert (await guest.run("pgrep -x python3"))[0] == 0, (await guest.run("cat /root/said"))[1]
            await asyncio.sleep(0.05)


async def told(guest: Guest) -> tuple[int, str, str]:
    """What the counter says of itself: a later count than the one before."""
    async with asyncio.timeout(LINK_SECONDS):
        first = (await guest.run("cat /root/told"))[1]
        while (now := (await guest.run("cat /root/told"))[1]) == first:
            assert (await guest.run("pgrep -x python3"))[0] == 0, (await guest.run("cat /root/said"))[1]
            await asyncio.sleep(0.02)
    count, name, noise = now.split()
    return int(count), name, noise


async def save(server: Lab, guest: Guest, *, between: Callable[[], object] = bool, limit_bytes: int = 1 << 30) -> Saved:
    """As the daemon does it, with something done when the guest is about to stand still. Whatever comes of it, the guest is called back."""
    driver, name = checkpointing(server.driver), secrets.token_hex(4)
    saved = Saved(server.home / f"memory-{name}", server.pool.directory / f"saved-{name}.img")
    saved.memory.mkdir()
    server.stack.callback(saved.disk.unlink, missing_ok=True)
    if not driver.needs.dialled:
        await guest.endpoint.rest(timeout_seconds=LINK_SECONDS)
    try:
        async with driver.saved(guest.id, saved.memory, limit_bytes=limit_bytes, on_still=between):
            with contextlib.nullcontext() if guest.disk is None else frozen(guest.disk.disk):
                reflink(server.pool.disk_path(guest.id), saved.disk)
    finally:
        if not driver.needs.dialled:
            guest.endpoint.wake()
    await guest.endpoint.link(timeout_seconds=LINK_SECONDS)
    return saved


async def test_what_runs_goes_on_here_and_there(server: Lab, guest: Guest) -> None:
    program = COUNTER.replace("gone = None", DELETED) if server.driver.needs.dialled else COUNTER
    await begin(guest, program, ready="/root/told")
    before, _, _ = await told(guest)
    saved = await save(server, guest)
    assert (await told(guest))[:2] > (before, "guest")
    there = await server.restore(saved)
    count, name, noise = await told(there)
    assert (count > before, name) == (True, "clone"), (await there.run("cat /root/said"))[1]
    assert await there.run("hostname; cat /dev/shm/shared") == (0, "clone\nshared")
    connect = "import socket; socket.create_connection(('127.0.0.1', 8000)); s = socket.socket(socket.AF_UNIX)"
    assert (await there.run(f"python3 -c \"{connect}; s.connect('/root/socket')\""))[0] == 0
    # From here on they have nothing to do with each other, and what was saved stays as it was.
    await there.run("echo there > /root/where")
    assert await guest.run("test ! -e /root/where && hostname") == (0, "guest\n")
    assert (await told(guest))[2] != noise
    again = await server.restore(saved, hostname="again")
    assert (await told(again))[1] == "again"
    assert await again.run("test ! -e /root/where") == (0, "")
    assert server.driver.isolation.driver == server.driver.name


async def refused(server: Lab, guest: Guest, reason: str) -> None:
    """It cannot be saved, for that reason, and runs on."""
    with pytest.raises(CheckpointFailedError, match=reason):
        await save(server, guest)
    assert await guest.run("echo here") == (0, "here\n")


async def test_what_cannot_be_saved_runs_on_and_says_why(server: Lab, guest: Guest) -> None:
    if server.driver.needs.dialled:
        # All that its memory depends on is in it: what may be missing is room.
        await begin(guest, DIRTY, ready="/root/ready")
        with pytest.raises(CheckpointFailedError, match="disk is full"):
            await save(server, guest, limit_bytes=64 << 20)
        assert await guest.run("pkill -f '[p]rogram.py' && echo here") == (0, "here\n")
    else:
        await begin(guest, HOLDER, ready="/root/ready")
        await refused(server, guest, "connection to the host's link")
        await guest.run("pkill -f '[p]rogram.py'; exec 7>/root/gone; rm /root/gone; (sleep 1000 >&7 2>/dev/null &)")
        await refused(server, guest, "a file open that was deleted: /root/gone")
        await guest.run("pkill sleep")
    await save(server, guest)


async def test_a_frozen_guest_is_neither_paused_nor_saved(server: Lab, guest: Guest) -> None:
    driver, folder = checkpointing(server.driver), server.home / "never"
    await server.driver.freeze(guest.id)
    with pytest.raises(CheckpointFailedError, match="frozen"):
        await driver.pause(guest.id)
    if server.driver.needs.dialled:
        # Elsewhere going on, too, needs a guest that is not frozen.
        with pytest.raises(CheckpointFailedError, match="frozen"):
            async with driver.saved(guest.id, folder, limit_bytes=1 << 30, on_still=bool):
                pass
    assert server.driver.is_frozen(guest.id)
    server.driver.thaw(guest.id)
    assert await guest.run("echo here") == (0, "here\n")


async def test_a_guest_that_changes_its_memory_without_end_is_saved_all_the_same(
    server: Lab, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not server.driver.needs.dialled:
        pytest.skip("this driver writes memory while the guest stands still")
    monkeypatch.setattr(vm_memory, "RUNNING_SECONDS", 1.0)
    await begin(guest, DIRTY, ready="/root/ready")
    there = await server.restore(await save(server, guest))
    for one in (guest, there):
        assert await one.run("pkill -f '[p]rogram.py' && echo here") == (0, "here\n")


async def test_a_save_that_a_daemon_left_under_way_is_given_up(server: Lab, guest: Guest) -> None:
    if not server.driver.needs.dialled:
        pytest.skip("this driver's saves end with the program that asks for them")
    control = await Qmp.connect(guest.plan.state_dir / CONTROL_SOCKET)
    out, into = os.pipe()
    try:
        # Nobody reads it, until the daemon's end of it goes with the daemon.
        await control.hand_over("state", into)
        await control.execute("migrate", {"uri": "fd:state"})
        assert (await control.execute("query-migrate"))["status"] in ("setup", "active")
        await control.close()
    finally:
        os.close(out)
        os.close(into)
    server.driver = server.another_driver()
    assert await server.driver.adopt(guest.id, guest.plan.state_dir) is not None
    await checkpointing(server.driver).resume(guest.id)
    assert await guest.run("echo here") == (0, "here\n")
    await save(server, guest)


async def test_a_paused_guest_stands_still_and_a_resumed_one_does_not(server: Lab, guest: Guest) -> None:
    driver = checkpointing(server.driver)
    await driver.resume(guest.id)
    await driver.pause(guest.id)
    await driver.pause(guest.id)
    asking = asyncio.ensure_future(guest.processes())
    await asyncio.sleep(0.5)
    assert not asking.done()
    await driver.resume(guest.id)
    await driver.resume(guest.id)
    assert await asking >= 0
    await driver.resume("0123456789abcdef")


@pytest.mark.long
async def test_a_guest_that_is_killed_meanwhile_is_an_error_and_leaves_nothing(server: Lab, guest: Guest) -> None:
    process = int((guest.plan.state_dir / server.kind.pid_file).read_text())
    with pytest.raises(InnkeeperError):
        await save(server, guest, between=lambda: os.kill(process, signal.SIGKILL))
    async with asyncio.timeout(LINK_SECONDS):
        await asyncio.shield(guest.running.exited)
    await server.driver.stop(guest.id)
    assert traces(server, [guest.id]) == []


@pytest.mark.parametrize(
    "broken", ["cut", *(pytest.param(how, marks=pytest.mark.long) for how in ("empty", "cancelled"))]
)
async def test_a_restore_that_fails_leaves_nothing(server: Lab, guest: Guest, broken: str) -> None:
    saved = await save(server, guest)
    if broken == "empty":
        for path in saved.memory.iterdir():
            path.unlink()
    elif broken == "cut":
        os.truncate(max(saved.memory.iterdir(), key=lambda path: path.stat().st_size), 20_000)
    plan, _ = await server.plan(copy_of=saved.disk)
    plan.link_dir.mkdir()
    before = await server.driver.found()
    with pytest.raises((InnkeeperError, TimeoutError)):
        async with asyncio.timeout(0.1 if broken == "cancelled" else None):
            await checkpointing(server.driver).restore(plan, saved.memory)
    assert traces(server, [plan.machine_id]) == []
    assert await server.driver.found() == before
    assert await guest.run("echo here") == (0, "here\n")


async def test_no_guest_runs_before_its_memory_is_known_to_be_whole(server: Lab, guest: Guest) -> None:
    saved = await save(server, guest)
    plan, _ = await server.plan(copy_of=saved.disk)
    endpoint = GuestEndpoint(plan.link_dir)
    if server.driver.needs.dialled:
        plan.link_dir.mkdir()
        endpoint.dial()
    else:
        await endpoint.listen()
    server.stack.push_async_callback(endpoint.close, remove=True)

    async def damaged() -> None:
        # That of a guest that runs would have answered by then.
        with pytest.raises(LinkLostError):
            await endpoint.link(timeout_seconds=3)
        raise CheckpointDamagedError

    with pytest.raises(CheckpointDamagedError):
        await checkpointing(server.driver).restore(plan, saved.memory, whole=damaged())
    assert not server.driver.runs(plan.machine_id, plan.state_dir)
    assert await guest.run("echo here") == (0, "here\n")


async def test_what_memory_needs_is_told(server: Lab) -> None:
    needs = await checkpointing(server.driver).memory_needs()
    assert needs == await checkpointing(server.another_driver()).memory_needs()
    assert needs.keys() == server.kind.memory_needs
    assert str(server.home) not in str(needs)
    assert re.fullmatch("[0-9a-f]{16}", needs["cpu"])


async def test_a_driver_without_checkpoints_says_so(server: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(server.driver), "capabilities", Capabilities())
    with pytest.raises(NotHereError, match=server.driver.name):
        checkpointing(server.driver)
