"""A microVM on the real QEMU, without hardware virtualization: Debian's kernel, this checkout's agent, the base image, an empty disk. No driver."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.integration.daemon_fixture import built_agent
from tests.integration.image_fixture import cache_directory, finished, shipped_image

from innkeeper.host.disks.image_build import build_environment
from innkeeper.host.drivers.accelerator import tsc_khz
from innkeeper.host.drivers.qemu_command import Accelerator, VmPlan, qemu_command
from innkeeper.host.guest_link import GUEST_LIMITS, guest_error
from innkeeper.host.kernels.kernel_package import KernelUnavailableError
from innkeeper.host.kernels.kernel_store import BootFiles, Kernel, KernelStore
from innkeeper.host.linux import command
from innkeeper.wire.link import Link
from innkeeper.wire.resync import begin_link
from innkeeper.wire.stream import Data, Message

NEEDS_QEMU = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("qemu-system-x86_64") is None or os.uname().machine != "x86_64",
    reason="needs root and QEMU for x86_64",
)
MEMORY_MB = 256
MAC = "02:00:00:00:00:07"
# Seconds that a busy machine may take to boot a guest, each of whose instructions is translated. Alone it takes four.
PATIENCE_SECONDS = 180.0
UNUSED_SECONDS = 86_400
TUN_SET_INTERFACE = 0x400454CA
TAP_WITHOUT_HEADER = 0x0002 | 0x1000


def boot_files() -> BootFiles:
    """Kernel and initramfs: fetched once per machine, then found again in the cache directory."""
    return finished(_boot_files())


async def _boot_files() -> BootFiles:
    store = KernelStore(cache_directory())
    kernels = store.kernels()
    # One that an earlier version fetched lacks the modules that are offered.
    kernel = kernels[-1] if kernels and kernels[-1].offered else await _fetch(store)
    files = await store.boot_files(kernel, built_agent())
    _forget_unused(files.initramfs)
    return files


async def _fetch(store: KernelStore) -> Kernel:
    """The newest kernel, also on a machine that was made without apt's lists, or long ago."""
    try:
        return await store.fetch(progress=print)
    except KernelUnavailableError as error:
        print(error)
        await command.run(["apt-get", "-q", "update"], env=build_environment(os.environ), timeout_seconds=300)
        return await store.fetch(progress=print)


def _forget_unused(used: Path) -> None:
    """Every change of the agent makes another initramfs: those that no test has used for long go from the cache."""
    os.utime(used)
    for path in used.parent.glob("initramfs-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > UNUSED_SECONDS:
                path.unlink()


def new_disk(path: Path) -> Path:
    """An empty ext4 disk of 1 GiB, a megabyte of it in use."""
    with path.open("wb") as file:
        file.truncate(1 << 30)
    subprocess.run(
        ["mkfs.ext4", "-q", "-F", "-m0", "-E", "lazy_itable_init=1,nodiscard", path], check=True, timeout=120
    )
    return path


@dataclass
class Output:
    """What a command in the guest left."""

    exit_code: int
    text: str
    # How often its disk had been written to by then.
    writes: int | None = None


@dataclass
class BootedVm:
    """QEMU with a guest in it, as whoever speaks to its port sees it."""

    process: subprocess.Popen[bytes]
    folder: Path

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[socket.socket, bytes]]:
        """QEMU's end of the port, where the agent has begun a new link, and that link's first bytes."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX) as end:
            end.setblocking(False)
            # Through the directory's descriptor, since a unix socket's path is short.
            folder = os.open(self.folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                await loop.sock_connect(end, f"/proc/self/fd/{folder}/link.sock")
            finally:
                os.close(folder)
            yield end, await begin_link(end, timeout_seconds=PATIENCE_SECONDS)

    @contextlib.asynccontextmanager
    async def link(self) -> AsyncIterator[Link]:
        """A link to the agent."""
        async with self.connection() as (end, first):
            link = Link(limits=GUEST_LIMITS, opens_odd=True, make_error=guest_error)
            link.data_received(first)
            await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=end.dup())
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await link.hello
                link.send_hello({"protocol": 1})
                yield link
            finally:
                link.close()
                await link.wait_closed()

    def wait(self) -> int:
        """The status with which QEMU ends by itself."""
        return self.process.wait(PATIENCE_SECONDS)


async def request(link: Link, verb: str, **params: Any) -> dict[str, Any]:
    return await link.request(verb, params, timeout_seconds=PATIENCE_SECONDS)


async def run(link: Link, shell: str, *, user: str = "root") -> Output:
    """A shell line in the guest, to its end."""
    stream = link.open("exec", {"id": os.urandom(8).hex(), "shell": shell, "merge": True, "user": user})
    output = b""
    ended: dict[str, Any] = {"exit_code": -1}
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (event := await stream.next_event()) is not None:
            if isinstance(event, Data):
                output += event.data
            elif isinstance(event, Message) and event.body.get("exited"):
                ended = event.body
    return Output(ended["exit_code"], output.decode(), ended.get("writes"))


@contextlib.contextmanager
def booted_vm(folder: Path, *, disk: Path, tap: bool = False) -> Iterator[BootedVm]:
    """QEMU, started; its guest boots beside. At the end it does not run any more."""
    files = boot_files()
    with contextlib.ExitStack() as stack:
        sockets = {name: stack.enter_context(_listener(folder / f"{name}.sock")) for name in ("control", "link")}
        image = stack.enter_context(shipped_image("base").path.open("rb"))
        written = stack.enter_context(disk.open("r+b"))
        network = stack.enter_context(_tap()) if tap else None
        plan = VmPlan(
            name="test",
            accelerator=Accelerator.TCG,
            memory_mb=MEMORY_MB,
            vcpu_count=1,
            kernel=str(files.kernel),
            initramfs=str(files.initramfs),
            control=sockets["control"].fileno(),
            link=sockets["link"].fileno(),
            image=image.fileno(),
            disk=written.fileno(),
            tap=network,
            mac=MAC if tap else None,
            tsc_khz=tsc_khz(Path("/proc/cpuinfo").read_text()),
        )
        descriptors = [plan.control, plan.link, image.fileno(), written.fileno(), *([network] if network else [])]
        errors = stack.enter_context((folder / "qemu.log").open("wb"))
        process = subprocess.Popen(
            qemu_command("qemu-system-x86_64", plan),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=descriptors,
            start_new_session=True,
        )
    try:
        yield BootedVm(process, folder)
    finally:
        process.kill()
        process.wait()
        print((folder / "qemu.log").read_text())


@contextlib.contextmanager
def _listener(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            listener.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)
        listener.listen(1)
        yield listener


@contextlib.contextmanager
def _tap() -> Iterator[int]:
    """A tap that nobody listens to. It goes with its last descriptor."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        name = f"tap{time.monotonic_ns() % 10**9}".encode()
        fcntl.ioctl(tap, TUN_SET_INTERFACE, struct.pack("16sH22x", name, TAP_WITHOUT_HEADER))
        yield tap
    finally:
        os.close(tap)
