"""The driver contract, run on every driver: real sandboxes, real disks, the real agent."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.contracts.drivers import KINDS, Guest, Kind, Lab, lab, traces

from innkeeper.errors import InnkeeperError
from innkeeper.host.drivers.contract import DiskFiles
from innkeeper.host.linux.cgroup import Group
from innkeeper.host.linux.subreaper import OrphanReaper, become_subreaper

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module", params=[pytest.param(kind, id=kind.name, marks=kind.marks) for kind in KINDS])
async def server(
    anyio_backend: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Lab]:
    kind: Kind = request.param
    if kind.missing is not None:
        pytest.skip(kind.missing)
    become_subreaper()
    with OrphanReaper().running():
        async with lab(kind, tmp_path_factory.mktemp(kind.name)) as there:
            yield there


@pytest.fixture
async def guest(server: Lab) -> AsyncIterator[Guest]:
    yield await server.start()
    await end(server)


def host_sees(server: Lab) -> None:
    """Skip where the host has not mounted what the guest writes."""
    if not server.driver.capabilities.host_sees_changes:
        pytest.skip("the host never mounts a disk of this driver's guests")


async def end(server: Lab) -> None:
    """Stop the machines of a test and release what was made for them."""
    await server.stack.pop_all().aclose()
    assert await server.driver.found() == set()


def group_of(server: Lab, guest: Guest) -> Group:
    return server.group.child(guest.id)


async def exited(guest: Guest, *, seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        await asyncio.shield(guest.running.exited)


async def test_a_machine_starts_and_its_agent_runs_commands(server: Lab, guest: Guest) -> None:
    assert await guest.run("echo hello; id -u") == (0, "hello\n0\n")
    assert (await guest.run("exit 3"))[0] == 3
    assert not guest.running.exited.done()
    assert server.driver.usage(guest.id).memory_bytes > 4 << 20
    assert await server.driver.found() == {guest.id}
    assert server.driver.isolation.driver == server.driver.name


async def test_frozen_means_no_processor_time_at_all(server: Lab, guest: Guest) -> None:
    group = group_of(server, guest)
    await guest.run("(while :; do :; done) >/dev/null 2>&1 &")
    before = group.usage().cpu_us
    async with asyncio.timeout(20):
        while group.usage().cpu_us - before < 50_000:
            await asyncio.sleep(0.05)
    await server.driver.freeze(guest.id)
    await server.driver.freeze(guest.id)
    assert server.driver.is_frozen(guest.id)
    before = group.usage().cpu_us
    asking = asyncio.ensure_future(guest.processes())
    await asyncio.sleep(1)
    assert group.usage().cpu_us == before
    assert not asking.done()
    server.driver.thaw(guest.id)
    server.driver.thaw(guest.id)
    assert not server.driver.is_frozen(guest.id)
    assert await asking >= 1
    assert await guest.run("echo awake") == (0, "awake\n")


@pytest.mark.parametrize("state", ["running", "busy", "frozen", "killed", "twice"])
async def test_stop_leaves_nothing_whatever_state_it_meets(server: Lab, guest: Guest, state: str) -> None:
    pids = group_of(server, guest).procs()
    assert pids
    if state == "busy":
        await guest.run("for i in 1 2 3 4; do (while :; do sleep 0.01; done) >/dev/null 2>&1 & done")
    elif state == "frozen":
        await server.driver.freeze(guest.id)
    elif state == "killed":
        os.kill(process_of(server, guest), signal.SIGKILL)
        await exited(guest)
    began = time.monotonic()
    await server.driver.stop(guest.id)
    assert time.monotonic() - began < 20
    assert traces(server, [guest.id]) == []
    assert all(gone(pid) for pid in pids)
    await exited(guest)
    await server.driver.stop(guest.id)
    await server.driver.stop("0123456789abcdef")
    assert not server.driver.is_frozen(guest.id)
    assert server.driver.usage(guest.id).memory_bytes == 0
    server.driver.thaw(guest.id)


def process_of(server: Lab, guest: Guest) -> int:
    return int((guest.plan.state_dir / server.kind.pid_file).read_text())


def gone(pid: int) -> bool:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


async def test_the_end_of_a_machine_is_noticed_with_its_reason(server: Lab, guest: Guest) -> None:
    os.kill(process_of(server, guest), signal.SIGKILL)
    await exited(guest)
    assert guest.running.why() == server.kind.ended


async def test_a_guest_out_of_memory_is_named(server: Lab) -> None:
    guest = await server.start(memory_mb=128)
    try:
        hog = "python3 -c 'x = bytearray(1 << 30); x[::4096] = b\"1\" * len(x[::4096])'"
        with contextlib.suppress(InnkeeperError, TimeoutError):
            exit_code, _ = await guest.run(hog, seconds=60)
            assert exit_code != 0
        if server.driver.capabilities.host_sees_changes:
            assert guest.running.why() == "The guest ran out of memory"
        else:
            # A kernel of its own ends the process, and the guest goes on.
            assert not guest.running.ran_out_of_memory()
            assert await guest.run("echo alive") == (0, "alive\n")
        assert server.driver.usage(guest.id).memory_bytes <= (128 + server.kind.overhead_mib) << 20
    finally:
        await end(server)


async def test_the_guest_sees_its_limits_and_they_hold(server: Lab) -> None:
    guest = await server.start(memory_mb=256, vcpu_count=1)
    group = group_of(server, guest)
    try:
        _, text = await guest.run("awk '/MemTotal/ {print $2}' /proc/meminfo")
        assert int(text) <= (256 + 32) * 1024
        spin = "import time; end = time.monotonic() + 2\nwhile time.monotonic() < end: pass"
        before, began = group.usage().cpu_us, time.monotonic()
        await guest.run(f"for i in 1 2 3; do python3 -c '{spin}' & done; wait")
        used = (group.usage().cpu_us - before) / 1e6 / (time.monotonic() - began)
        assert used < 1.25, used
    finally:
        await end(server)


async def test_a_fork_bomb_stays_inside(server: Lab) -> None:
    guest, neighbour = await server.start(), await server.start()
    try:
        bomb = asyncio.ensure_future(guest.run("bomb() { bomb | bomb & }; bomb; sleep 3; true", seconds=4))
        await asyncio.sleep(1)
        async with asyncio.timeout(10):
            assert await neighbour.run("echo alive") == (0, "alive\n")
        group = group_of(server, guest)
        assert len(group.procs()) <= 4_096
        began = time.monotonic()
        await server.driver.stop(guest.id)
        assert time.monotonic() - began < 10
        assert traces(server, [guest.id]) == []
        bomb.cancel()
        await asyncio.wait([bomb])
        with contextlib.suppress(BaseException):
            bomb.result()
    finally:
        await end(server)


async def test_a_restarted_daemon_adopts_running_and_frozen_machines(server: Lab) -> None:
    running, frozen, dead = [await server.start() for _ in range(3)]
    await server.driver.freeze(frozen.id)
    os.kill(process_of(server, dead), signal.SIGKILL)
    await exited(dead)
    before = server.driver
    await before.close(keep_running=True)
    assert not running.running.exited.done()
    server.driver = server.another_driver()
    try:
        assert await server.driver.found() == {running.id, frozen.id, dead.id}
        again = await server.driver.adopt(running.id, running.plan.state_dir)
        assert again is not None
        assert await running.run("echo still here") == (0, "still here\n")
        still = await server.driver.adopt(frozen.id, frozen.plan.state_dir)
        assert still is not None
        assert server.driver.is_frozen(frozen.id)
        server.driver.thaw(frozen.id)
        assert await frozen.run("echo me too") == (0, "me too\n")
        assert await server.driver.adopt(dead.id, dead.plan.state_dir) is None
        assert await server.driver.adopt("0123456789abcdef", server.home) is None
        # A pid that now belongs to somebody else is not taken for the machine's.
        (dead.plan.state_dir / server.kind.pid_file).write_text(str(os.getpid()))
        assert await server.driver.adopt(dead.id, dead.plan.state_dir) is None
        os.kill(process_of(server, running), signal.SIGKILL)
        async with asyncio.timeout(10):
            await asyncio.shield(again.exited)
        for guest in (running, frozen, dead):
            await server.driver.stop(guest.id)
        async with asyncio.timeout(10):
            await asyncio.shield(still.exited)
        assert await server.driver.found() == set()
    finally:
        await end(server)


async def test_half_made_remains_are_found_and_removed(server: Lab) -> None:
    server.group.child("00000000000000aa").create()
    for name in server.kind.runtime_files:
        (server.home / "runsc" / name).touch()
    expected = {f"00000000000000{end}" for end in ("aa", "bb", "cc", "dd")[: 1 + len(server.kind.runtime_files)]}
    assert await server.driver.found() == expected
    for machine_id in expected:
        await server.driver.stop(machine_id)
    assert await server.driver.found() == set()


@pytest.mark.parametrize("broken", ["rootfs", "netns", "agent", "memory", "binary", "cancelled"])
async def test_a_failed_start_leaves_nothing(server: Lab, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _ = await server.plan()
    plan.link_dir.mkdir(exist_ok=True)
    nowhere = server.home / "nowhere"
    if broken == "agent" and server.driver.needs.disk_files:
        pytest.skip("the agent of this driver's guests comes with the kernel")
    changed = {
        "rootfs": {"rootfs": DiskFiles(nowhere, nowhere) if server.driver.needs.disk_files else nowhere},
        "netns": {"netns": Path("/run/netns/no-such-namespace")},
        "agent": {"agent_dir": nowhere},
        "memory": {"memory_mb": -31},
    }.get(broken, {})
    plan = type(plan)(**{**{name: getattr(plan, name) for name in plan.__slots__}, **changed})
    if broken == "binary":
        monkeypatch.setattr(server.driver, server.kind.binary, "/bin/false")
    try:
        if broken == "cancelled":
            for delay in (0.02, 0.08, 0.14, 0.2):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(delay):
                        await server.driver.start(plan)
                        await asyncio.sleep(1)
                await server.driver.stop(plan.machine_id)
                assert traces(server, [plan.machine_id]) == []
        else:
            with pytest.raises((InnkeeperError, OSError)):
                await server.driver.start(plan)
        assert traces(server, [plan.machine_id]) == []
        assert await server.driver.found() == set()
    finally:
        await end(server)


async def test_tmp_is_on_the_disk_and_the_link_directory_is_read_only(server: Lab, guest: Guest) -> None:
    host_sees(server)
    assert (await guest.run("echo x > /tmp/here"))[0] == 0
    assert (guest.host_disk.upper / "tmp" / "here").read_text() == "x\n"
    for directory in ("/.innkeeper/link", "/.innkeeper/bin"):
        exit_code, text = await guest.run(f"touch {directory}/x")
        assert (exit_code, "Read-only" in text) == (1, True), text
    exit_code, _ = await guest.run("rm -f /.innkeeper/link/agent.sock; chmod 777 /.innkeeper/bin/inn-agent")
    assert exit_code != 0
    assert stat.S_ISSOCK((guest.plan.link_dir / "agent.sock").stat().st_mode)


async def test_devices_and_set_uid_on_the_disk_mean_nothing_on_the_host(server: Lab, guest: Guest) -> None:
    host_sees(server)
    await guest.run(
        "cp /usr/bin/id /tmp/id; chown root /tmp/id; chmod 4755 /tmp/id; mknod /tmp/disk b 7 0; mknod /tmp/null c 1 3"
    )
    program = guest.host_disk.upper / "tmp" / "id"
    assert (program.stat().st_mode & stat.S_ISUID, program.stat().st_uid) == (stat.S_ISUID, 0)
    # A sandbox keeps what it wrote open for writing, and such a file cannot be run; the image's own may need newer libraries.
    await server.driver.stop(guest.id)
    shutil.copyfile("/usr/bin/id", program)
    program.chmod(0o4755)

    def run() -> bytes:
        # The directories above are root's alone; a descriptor stands for somebody who got past them.
        with program.open("rb") as file:
            argv = [f"/proc/self/fd/{file.fileno()}", "-u"]
            return subprocess.run(
                argv, user=65534, group=65534, extra_groups=[], pass_fds=(file.fileno(),), stdout=subprocess.PIPE
            ).stdout

    assert await asyncio.to_thread(run) == b"65534\n"
    os.mknod(guest.host_disk.upper / "tmp" / "made-by-host", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    with pytest.raises(PermissionError):
        (guest.host_disk.upper / "tmp" / "made-by-host").open("rb")
    for path in guest.host_disk.upper.joinpath("tmp").iterdir():
        if stat.S_ISBLK(path.lstat().st_mode) or stat.S_ISCHR(path.lstat().st_mode):
            with pytest.raises(PermissionError):
                path.open("rb")


async def test_the_guest_holds_no_capability_and_no_file_of_the_host(server: Lab, guest: Guest) -> None:
    host_sees(server)
    exit_code, text = await guest.run("cat /proc/1/cmdline; ls /; mount -t tmpfs none /mnt; ls /proc/1/root/work")
    assert exit_code != 0
    assert "inn-agent" in text
    spec = json.loads((guest.plan.state_dir / "bundle" / "config.json").read_text())
    assert "CAP_SYS_ADMIN" not in spec["process"]["capabilities"]["bounding"]


async def test_servers_never_see_each_others_machines(server: Lab, guest: Guest, tmp_path: Path) -> None:
    async with lab(server.kind, tmp_path) as other:
        mine = await other.start()
        assert await other.driver.found() == {mine.id}
        assert await server.driver.found() == {guest.id}
        # Neither takes the other's machine away, though it were asked to.
        await other.driver.stop(guest.id)
        assert await other.driver.adopt(guest.id, guest.plan.state_dir) is None
        assert await guest.run("echo here") == (0, "here\n")
        await other.driver.close(keep_running=False)
        assert mine.running.exited.done()
        assert await guest.run("echo still") == (0, "still\n")
