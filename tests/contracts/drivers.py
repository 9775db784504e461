"""What the driver contract is tested on: every driver, on real disks and namespaces, with the real agent."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
from tests import leaks
from tests.integration import image_fixture
from tests.integration.booted_vm import boot_files
from tests.integration.daemon_fixture import built_agent

from innkeeper.host.daemon import install_agent
from innkeeper.host.disks.disk_pool import DiskPool, open_pool
from innkeeper.host.disks.rootfs import DiskPlan, InstanceDisk, mount_root, release
from innkeeper.host.drivers.accelerator import QEMU, tsc_khz
from innkeeper.host.drivers.contract import Checkpointing, DiskFiles, Driver, MachinePlan, RunningMachine, checkpointing
from innkeeper.host.drivers.gvisor import GvisorDriver
from innkeeper.host.drivers.qemu import QemuDriver
from innkeeper.host.drivers.qemu_command import OVERHEAD_MIB, TCG_CACHE_MIB, Accelerator
from innkeeper.host.guest_link import GuestEndpoint
from innkeeper.host.linux import netns
from innkeeper.host.linux.cgroup import CgroupTree, Group
from innkeeper.wire.stream import Data, Message

# A microVM whose instructions are translated boots in 4 s on two quiet cores, and was seen to take 25 s on busy ones.
LINK_SECONDS = 180.0
# Nobody's.
VM_USER = 1_999_999_999


@dataclass(frozen=True)
class Kind:
    """One way to run machines, and why it cannot be tested here, if so.

    `binary` is the driver's attribute with the program that it runs; `pid_file` names a machine's process; `runtime_files` are what half a
    machine leaves beside its group; `group_suffix` ends the name of the server's group; `overhead_mib` is what a machine may take beyond its guest.
    """

    name: str
    make: Callable[[Path, str], Driver]
    missing: str | None
    binary: str
    pid_file: str
    ended: str
    overhead_mib: int
    group_suffix: str = ""
    runtime_files: tuple[str, ...] = ()
    # What of its settings saved memory depends on.
    memory_needs: frozenset[str] = frozenset()
    # A machine that boots a kernel takes its time: the whole contract does four minutes.
    marks: tuple[pytest.MarkDecorator, ...] = ()


def gvisor(platform: str) -> Kind:
    """Sandboxes on one of gVisor's platforms."""

    def make(home: Path, server_id: str) -> Driver:
        root = home / "runsc"
        root.mkdir(exist_ok=True, mode=0o700)
        return GvisorDriver(
            runsc="runsc",
            platform=platform,
            root=root,
            hubs=home / "mounts" / "volumes",
            tree=CgroupTree.detect(),
            group_name=f"innkeeper-{server_id}",
            reason="under test",
        )

    return Kind(
        f"gvisor-{platform}",
        make,
        None if os.geteuid() == 0 and shutil.which("runsc") else "needs root and runsc",
        binary="_runsc",
        pid_file="sandbox.pid",
        ended="The sandbox ended",
        overhead_mib=32,
        runtime_files=(
            "00000000000000bb_sandbox:00000000000000bb.state",
            "00000000000000cc_sandbox:00000000000000cc.lock",
            "runsc-00000000000000dd.sock",
        ),
        memory_needs=frozenset({"runsc", "platform", "flags", "cpu"}),
    )


def qemu() -> Kind:
    """MicroVMs whose instructions are translated, which works everywhere."""

    def make(home: Path, server_id: str) -> Driver:
        return QemuDriver(
            qemu=QEMU,
            accelerator=Accelerator.TCG,
            tsc_khz=tsc_khz(Path("/proc/cpuinfo").read_text()),
            boot=boot_files(),
            directory=home / "qemu",
            tree=CgroupTree.detect(),
            group_name=f"innkeeper-{server_id}{VM_SUFFIX}",
            uid=VM_USER,
            gid=VM_USER,
            reason="under test",
        )

    return Kind(
        "qemu-tcg",
        make,
        None if os.geteuid() == 0 and shutil.which(QEMU) else f"needs root and {QEMU}",
        binary="_qemu",
        pid_file="vm.pid",
        ended="The virtual machine ended",
        overhead_mib=OVERHEAD_MIB + TCG_CACHE_MIB,
        group_suffix=VM_SUFFIX,
        memory_needs=frozenset({"qemu", "accelerator", "options", "cpu"}),
        marks=(pytest.mark.long,),
    )


VM_SUFFIX = "-vm"
KINDS = (gvisor("systrap"), gvisor("ptrace"), qemu())


@dataclass
class Guest:
    """A started machine with its agent."""

    plan: MachinePlan
    running: RunningMachine
    endpoint: GuestEndpoint
    disk: InstanceDisk | None

    @property
    def id(self) -> str:
        return self.plan.machine_id

    async def run(self, line: str, *, seconds: float = 30) -> tuple[int, str]:
        """Run a shell line as root: exit code and output."""
        params = {
            "id": secrets.token_hex(8),
            "shell": line,
            "merge": True,
            "user": "root",
            "timeout_ms": int(seconds * 1000),
            # The CANCEL below must not end a background child that had not given up the output yet.
            "detach_on_cancel": True,
        }
        stream = await self.endpoint.open("exec", params, timeout_seconds=LINK_SECONDS)
        output, exit_code = bytearray(), -1
        while (event := await stream.next_event()) is not None:
            if isinstance(event, Data):
                output += event.data
            elif isinstance(event, Message) and event.body.get("exited"):
                exit_code = event.body["exit_code"]
                stream.cancel()
                break
        return exit_code, output.decode()

    @property
    def host_disk(self) -> InstanceDisk:
        """The disk that the host has mounted; only where the driver says that it sees changes."""
        assert self.disk is not None
        return self.disk

    async def processes(self) -> int:
        """A request that any live agent answers."""
        answer = await self.endpoint.request("processes", {}, timeout_seconds=LINK_SECONDS)
        return int(answer["user_processes"])


@dataclass(frozen=True)
class Saved:
    """Memory and disk of one moment."""

    memory: Path
    disk: Path


@dataclass
class Lab:
    """One server's drivers and machines below `home`."""

    kind: Kind
    home: Path
    pool: DiskPool
    lower: Path
    image: Path
    agent_dir: Path
    driver: Driver
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def group(self) -> Group:
        """The server's control group."""
        return CgroupTree.detect().server_root(f"innkeeper-{leaks.server_id(self.home)}{self.kind.group_suffix}")

    def another_driver(self) -> Driver:
        """As a restarted daemon would make it."""
        return self.kind.make(self.home, leaks.server_id(self.home))

    async def plan(
        self, *, memory_mb: int = 256, vcpu_count: int = 1, hostname: str = "guest", copy_of: Path | None = None
    ) -> tuple[MachinePlan, InstanceDisk | None]:
        """Disk, root, namespace and link directory of a machine, made as the builder makes them."""
        machine_id = secrets.token_hex(8)
        state_dir = self.home / "machines" / machine_id
        state_dir.mkdir(parents=True, mode=0o700)
        self.stack.callback(shutil.rmtree, state_dir, ignore_errors=True)
        space = f"ik{leaks.server_id(self.home)}-{machine_id[:6]}"
        await netns.ip_batch([f"netns add {space}"])
        await netns.ip_batch(["link set lo up"], inside=space)
        self.stack.push_async_callback(netns.delete, space)
        self.stack.push_async_callback(self.pool.remove_disk, machine_id)
        root: Path | DiskFiles
        if self.driver.needs.disk_files:
            disk = None
            await self.pool.create_disk(machine_id, 1024, copy_of=copy_of)
            root = DiskFiles(self.image, self.pool.disk_path(machine_id))
        else:
            mounts = self.home / "mounts" / "machines" / machine_id
            disk_plan = DiskPlan(machine_id, 1024, (self.lower,), mounts, copy_of=copy_of)
            disk = await mount_root(self.pool, disk_plan)
            self.stack.push_async_callback(release, disk_plan.mount_directory)
            root = disk.root
        plan = MachinePlan(
            machine_id=machine_id,
            rootfs=root,
            netns=netns.path_of(space),
            agent_dir=self.agent_dir,
            link_dir=state_dir / "link",
            state_dir=state_dir,
            memory_mb=memory_mb,
            vcpu_count=vcpu_count,
            hostname=hostname,
        )
        return plan, disk

    async def start(self, *, memory_mb: int = 256, vcpu_count: int = 1) -> Guest:
        """A machine whose agent has answered."""
        plan, disk = await self.plan(memory_mb=memory_mb, vcpu_count=vcpu_count)
        return await self.come_up(plan, disk, self.driver.start)

    async def restore(self, saved: Saved, *, hostname: str = "clone") -> Guest:
        """A machine that goes on from what was saved, and whose agent has answered."""
        plan, disk = await self.plan(hostname=hostname, copy_of=saved.disk)
        guest = await self.come_up(plan, disk, lambda plan: checkpointing(self.driver).restore(plan, saved.memory))
        await self.introduce(guest)
        return guest

    async def introduce(self, guest: Guest) -> None:
        """Tell the guest's agent what the guest is called, where nobody else does."""
        if self.driver.needs.dialled:
            names = {"hostname": guest.plan.hostname}
            await guest.endpoint.request("configure", names, timeout_seconds=LINK_SECONDS)

    async def launch(self, plan: MachinePlan, disk: InstanceDisk | None, *, saved: Path | None = None) -> Guest:
        """The machine of a plan, whose agent has answered; with the memory in a folder, if there is one."""
        if saved is None:
            return await self.come_up(plan, disk, self.driver.start)
        return await self.come_up(plan, disk, lambda plan: cast(Checkpointing, self.driver).restore(plan, saved))

    async def come_up(
        self, plan: MachinePlan, disk: InstanceDisk | None, start: Callable[[MachinePlan], Awaitable[RunningMachine]]
    ) -> Guest:
        """The machine of a plan that is started that way, whose agent has answered."""
        endpoint = GuestEndpoint(plan.link_dir)
        if self.driver.needs.dialled:
            plan.link_dir.mkdir(exist_ok=True)
            endpoint.dial()
        else:
            await endpoint.listen()
        self.stack.push_async_callback(endpoint.close, remove=True)
        running = await start(plan)
        # By whichever driver is the current one at the end: a test may have replaced it.
        self.stack.push_async_callback(lambda: self.driver.stop(plan.machine_id))
        await endpoint.link(timeout_seconds=LINK_SECONDS)
        return Guest(plan, running, endpoint, disk)


@asynccontextmanager
async def lab(kind: Kind, home: Path) -> AsyncIterator[Lab]:
    """Everything that the machines of one server need; all of it is gone at the end."""
    store = image_fixture.put_into(home, "base")
    image = store.get("base")
    assert image is not None
    pool = await open_pool(home, size_mib=8192)
    driver = kind.make(home, leaks.server_id(home))
    there = Lab(kind, home, pool, store.mount(image.digest), image.path, install_agent(built_agent(), home), driver)
    try:
        async with there.stack:
            yield there
    finally:
        await there.driver.close(keep_running=False)
        await store.unmount_all()
        await pool.close()


def traces(there: Lab, machine_ids: Iterable[str]) -> list[str]:
    """What still exists of these machines: groups, runtime files, processes."""
    found = [name for name in there.group.children() if name in machine_ids]
    for path in there.home.glob("runsc/*"):
        found += [str(path) for machine_id in machine_ids if machine_id in path.name]
    return found
