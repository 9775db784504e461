"""A microVM as the driver runs it, by translation: its jail, its clock, its network, and a daemon that comes back. One guest for all of it."""

import asyncio
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tests import leaks
from tests.contracts.drivers import LINK_SECONDS, VM_USER, Guest, Lab, lab, qemu
from tests.integration.booted_vm import NEEDS_QEMU

from innkeeper.host.disks.disk_template import reflink
from innkeeper.host.drivers.contract import Tap
from innkeeper.host.drivers.qmp import Qmp
from innkeeper.host.drivers.vm_jail import JailFailedError
from innkeeper.host.drivers.vm_memory import STATE, Stops, go_on, runs, save_state
from innkeeper.host.guest_link import GuestEndpoint
from innkeeper.host.linux.subreaper import OrphanReaper, become_subreaper
from innkeeper.host.network.addressing import Slot
from innkeeper.host.network.network import Network

sys.path.insert(0, str(Path(__file__).parent))
import network_world as nw
from network_world import World

pytestmark = [pytest.mark.anyio, NEEDS_QEMU, pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="no taps")]
PAUSE_SECONDS = 4.0


@dataclass
class Running:
    """The guest, and what is around it."""

    lab: Lab
    guest: Guest
    world: World
    network: Network
    slot: Slot

    @property
    def pid(self) -> int:
        return int((self.guest.plan.state_dir / "vm.pid").read_text())

    async def configure(self, mac: str) -> None:
        """Give the guest its slot's address, and that hardware address."""
        network = {
            "interface": "eth0",
            "mac": mac,
            "address": str(self.slot.guest_ip),
            "prefix": self.slot.prefix_length,
            "gateway": str(self.slot.gateway_ip),
        }
        params = {"hostname": "vm", "user": "root", "env": {}, "sudo": False, "spare_shell": False, "network": network}
        await self.guest.endpoint.request("configure", params, timeout_seconds=LINK_SECONDS)

    async def clock(self) -> tuple[float, float]:
        """How far the guest's clock is ahead of the host's, at least and at most."""
        before = time.time()
        exit_code, text = await self.guest.run("date +%s.%N")
        assert exit_code == 0
        return float(text) - time.time(), float(text) - before


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def running(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    home = tmp_path_factory.mktemp("vm")
    become_subreaper()
    with OrphanReaper().running():
        async with (
            nw.world() as world,
            Network.open(secrets.token_hex(4), home / "run", settings=world.settings(), keep_running=False) as network,
            lab(qemu(), home) as there,
        ):
            slot = await network.acquire()
            descriptor = await network.open_tap(slot)
            try:
                plan, disk = await there.plan()
                guest = await there.launch(replace(plan, netns=slot.netns_path, tap=Tap(descriptor, slot.mac)), disk)
            finally:
                os.close(descriptor)
            yield Running(there, guest, world, network, slot)
            await there.stack.pop_all().aclose()
            assert await there.driver.found() == set()
    assert leaks.wait_for_none(home) == []


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


async def test_qemu_has_no_right_and_sees_its_own_files_alone(running: Running) -> None:
    assert await running.guest.run("uname -s; id -u") == (0, "Linux\n0\n")
    assert_jailed(running.pid)


def assert_jailed(pid: int) -> None:
    status = status_of(pid)
    assert status["Uid"].split() == status["Gid"].split() == [str(VM_USER)] * 4
    assert status["Groups"] == ""
    for capabilities in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"):
        assert int(status[capabilities], 16) == 0, capabilities
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    # The first process of a pid namespace of its own: it sees no other, and none of other guests.
    assert status["NSpid"].split()[1:] == ["1"]
    for namespace in ("mnt", "ipc", "uts", "pid", "net"):
        assert Path(f"/proc/{pid}/ns/{namespace}").readlink() != Path("/proc/self/ns", namespace).readlink()
    targets = {line.split()[4] for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()}
    trees = {f"/{name}" for name in ("bin", "sbin", "lib", "lib64") if not Path("/", name).is_symlink()} & targets
    assert targets - trees == {
        "/",
        "/usr",
        "/proc",
        "/etc/ld.so.cache",
        "/dev/null",
        "/dev/urandom",
        "/kernel",
        "/initramfs",
    }
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert [line.split()[4] for line in limits.splitlines() if line.startswith("Max core file")] == ["0"]


async def test_the_network_is_the_slots_and_its_policy_holds(running: Running) -> None:
    slot = running.slot
    await running.configure(slot.mac)
    # To the network a guest is its slot: here it is asked from inside.
    reach = "timeout 60 bash -c 'exec 3<>/dev/tcp/{}/80 && read -r line <&3 && echo $line'"
    assert await running.guest.run(reach.format(nw.SERVER), seconds=90) == (0, "hello\n")
    for address in (nw.FORBIDDEN[0], nw.HOST_PRIVATE):
        exit_code, text = await running.guest.run(reach.format(address), seconds=90)
        assert (exit_code != 0, "hello" in text) == (True, False), address
    # Not even an answer to who the gateway is: what goes past that question is tried in test_network_tap.
    await running.configure("02:00:00:00:00:99")
    exit_code, text = await running.guest.run(reach.replace("timeout 60", "timeout 3").format(nw.SERVER), seconds=90)
    assert (exit_code != 0, "hello" in text) == (True, False)
    await running.configure(slot.mac)
    assert await running.guest.run(reach.format(nw.SERVER), seconds=90) == (0, "hello\n")


async def test_a_frozen_guest_uses_nothing_and_its_clock_goes_on(running: Running) -> None:
    driver, guest = running.lab.driver, running.guest
    least, most = await running.clock()
    await driver.freeze(guest.id)
    assert driver.is_frozen(guest.id)
    used = driver.usage(guest.id).cpu_us
    await asyncio.sleep(PAUSE_SECONDS)
    assert driver.usage(guest.id).cpu_us == used
    driver.thaw(guest.id)
    after_least, after_most = await running.clock()
    # A clock that had stood still would be behind by the whole pause.
    assert after_most > least - PAUSE_SECONDS / 2
    assert after_least < most + PAUSE_SECONDS / 2


@pytest.mark.parametrize("frozen", [False, True])
async def test_a_daemon_that_comes_back_finds_the_guest_and_what_it_ran(running: Running, frozen: bool) -> None:
    guest, marker = running.guest, secrets.token_hex(4)
    assert (await guest.run(f"(sleep 600; echo {marker}) >/dev/null 2>&1 & echo {marker} > /root/{marker}"))[0] == 0
    if frozen:
        await running.lab.driver.freeze(guest.id)
    await guest.endpoint.close(remove=False)
    await running.lab.driver.close(keep_running=True)
    running.lab.driver = running.lab.another_driver()
    adopted = await running.lab.driver.adopt(guest.id, guest.plan.state_dir)
    assert adopted is not None
    assert running.lab.driver.is_frozen(guest.id) == frozen
    guest.running, guest.endpoint = adopted, GuestEndpoint(guest.plan.link_dir)
    running.lab.stack.push_async_callback(guest.endpoint.close, remove=True)
    guest.endpoint.dial()
    running.lab.driver.thaw(guest.id)
    assert await guest.run(f"cat /root/{marker}; pgrep -f {marker} > /dev/null && echo runs", seconds=90) == (
        0,
        f"{marker}\nruns\n",
    )


async def test_a_state_that_was_saved_goes_on_in_another_machine(running: Running) -> None:
    guest, lab, marker = running.guest, running.lab, secrets.token_hex(4)
    assert (await guest.run(f"(sleep 600; echo {marker}) >/dev/null 2>&1 & echo before > /root/when"))[0] == 0
    folder, disk = lab.home / "saved", lab.pool.directory / "saved.img"
    folder.mkdir()
    stops = Stops(bool)
    control = await Qmp.connect(guest.plan.state_dir / "control.sock", on_event=stops)
    try:
        await save_state(control, folder / STATE, limit_bytes=1 << 30, log_is_exact=False, stops=stops)
        assert not await runs(control)
        reflink(lab.pool.disk_path(guest.id), disk)
        await go_on(control)
        assert await runs(control)
        await go_on(control)
    finally:
        await control.close()
    assert (await guest.run("echo after > /root/when"))[0] == 0
    slot = await running.network.acquire()
    descriptor = await running.network.open_tap(slot)
    try:
        plan, _ = await lab.plan(copy_of=disk)
        plan = replace(plan, netns=slot.netns_path, tap=Tap(descriptor, slot.mac))
        copy = await lab.launch(plan, None, saved=folder)
        assert await copy.run(f"cat /root/when; pgrep -f {marker} > /dev/null && echo runs") == (0, "before\nruns\n")
        assert await guest.run("cat /root/when") == (0, "after\n")
        await lab.driver.stop(copy.id)
        os.truncate(folder / STATE, 1 << 20)
        with pytest.raises(JailFailedError):
            await lab.launch(plan, None, saved=folder)
    finally:
        os.close(descriptor)
    assert await lab.driver.found() == {guest.id}
    disk.unlink()


async def test_a_guest_that_powers_off_is_noticed(running: Running) -> None:
    # The last test of the guest.
    await running.guest.endpoint.request("shutdown", {"grace_ms": 100}, timeout_seconds=LINK_SECONDS)
    async with asyncio.timeout(LINK_SECONDS):
        await asyncio.shield(running.guest.running.exited)
    assert running.guest.running.why() == "The virtual machine ended"
