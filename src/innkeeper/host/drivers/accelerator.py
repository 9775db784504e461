"""Which QEMU there is, and what runs a microVM's instructions here: KVM where it really runs a guest, else TCG.

/dev/kvm proves nothing: on some machines it exists and refuses, emulates, or hangs. Cheap looks rule those out (probes/kvm.py); the decider is a guest
that boots in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from innkeeper.host.drivers.qemu_command import Accelerator, VmPlan, qemu_command
from innkeeper.host.drivers.qmp import Event, Qmp, QmpError
from innkeeper.host.drivers.vm_jail import INITRAMFS, KERNEL, PLAN, JailFailedError, VmJail, printable
from innkeeper.host.kernels.kernel_store import BootFiles
from innkeeper.host.linux import command, unix_socket
from innkeeper.host.linux.hold import held_folder

MINIMUM_VERSION = (7, 2)
QEMU = "qemu-system-x86_64"
# Chosen, not measured: no machine with KVM was at hand. A guest whose instructions are translated needs four on quiet cores.
BOOT_SECONDS = 3.0
BOOT_MEMORY_MB = 256
SAID_BYTES = 300
WORKSPACE = ".inn-probe-"
# A limit that is given must not be 0; it has nothing to write to.
NO_FILE_BYTES = 1


@dataclass(frozen=True, slots=True)
class Qemu:
    """An installed QEMU."""

    path: str
    version: tuple[int, int, int]

    @property
    def text(self) -> str:
        """The version as people write it."""
        return ".".join(map(str, self.version))

    @property
    def new_enough(self) -> bool:
        """Whether the driver knows its options."""
        return self.version[:2] >= MINIMUM_VERSION


def parse_version(text: str) -> tuple[int, int, int] | None:
    """The version in the answer of `qemu-system-x86_64 --version`, or None."""
    found = re.search(r"^QEMU emulator version (\d+)\.(\d+)\.(\d+)", text)
    return None if found is None else (int(found[1]), int(found[2]), int(found[3]))


async def ask_version(path: str) -> Qemu | None:
    """The QEMU at a path, or None where it does not say what it is."""
    try:
        answer = await command.run([path, "--version"], timeout_seconds=10)
    except command.CommandFailed:
        return None
    version = parse_version(answer.stdout.decode(errors="replace"))
    return None if version is None else Qemu(path, version)


def tsc_khz(cpuinfo: str) -> int | None:
    """The rate of the host's time stamp counter, from /proc/cpuinfo; None where it has none that stays the same.

    A kernel that calibrated its delay loop by that counter shows twice its rate in MHz as `bogomips`.
    """
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    rate = re.search(r"^bogomips\s*:\s*(\d+)\.(\d\d)$", cpuinfo, re.MULTILINE)
    if flags is None or "constant_tsc" not in flags[1].split() or rate is None:
        return None
    return (int(rate[1]) * 100 + int(rate[2])) * 5 or None


async def why_not(
    qemu: str,
    accelerator: Accelerator,
    *,
    boot: BootFiles,
    user: tuple[int, int],
    directory: Path,
    kvm_group: int | None = None,
    tsc_khz: int | None = None,
    seconds: float = BOOT_SECONDS,
) -> str | None:
    """Boot a guest without disks or network, in a jail like every other's: None when its first program ran within `seconds`, else what kept it.

    `user` is the uid and gid that QEMU runs as, `kvm_group` the group that may open /dev/kvm. Nothing of it is left in `directory`.
    """
    with held_folder(directory, WORKSPACE) as folder, contextlib.ExitStack() as files:
        control, link = (
            files.enter_context(unix_socket.listen(folder / socket, backlog=1)) for socket in ("control", "link")
        )
        vm = VmPlan(
            name="probe",
            accelerator=accelerator,
            memory_mb=BOOT_MEMORY_MB,
            vcpu_count=1,
            kernel=KERNEL,
            initramfs=INITRAMFS,
            control=control.fileno(),
            link=link.fileno(),
            tsc_khz=tsc_khz,
        )
        jail = VmJail(
            root=folder / "root",
            mark="probe",
            uid=user[0],
            gid=user[1],
            groups=() if kvm_group is None else (kvm_group,),
            devices=(Path("/dev/kvm"),) if accelerator is Accelerator.KVM else (),
        )
        jail.prepare()
        plan = jail.plan(kernel=boot.kernel, initramfs=boot.initramfs, file_bytes=NO_FILE_BYTES, stays=True)
        (folder / PLAN).write_text(json.dumps(plan))
        try:
            process = await command.spawn(
                # Should nobody be left to end it.
                [
                    *("timeout", "--signal=KILL", f"{3 * seconds + 30:g}"),
                    *jail.command(boot.agent, folder / PLAN, qemu_command(qemu, vm)),
                ],
                stderr=asyncio.subprocess.PIPE,
                pass_fds=(vm.control, vm.link),
            )
        except JailFailedError:
            return f"{qemu} is not installed"
        except command.CommandFailed as error:
            return error.reason
        files.close()
        try:
            return await _outcome(process, folder / "control", seconds)
        finally:
            await asyncio.shield(command.end(process))


async def _outcome(process: asyncio.subprocess.Process, control: Path, seconds: float) -> str | None:
    came: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def on_event(event: Event) -> None:
        if (came_up := told(event)) is not None and not came.done():
            came.set_result(came_up)

    session = None
    try:
        async with asyncio.timeout(seconds):
            session = await Qmp.connect(control, on_event=on_event)
            return None if await came else "a guest's kernel did not come up"
    except TimeoutError:
        return f"a guest did not come up within {seconds:g} s"
    except QmpError:
        said = b"" if process.stderr is None else await process.stderr.read(SAID_BYTES)
        return printable(said) or "QEMU ended"
    finally:
        if session is not None:
            await session.close()


def why_not_running(status: object, kvm: object, accelerator: Accelerator) -> str | None:
    """What the answers of query-status and query-kvm say against a guest that is meant to run by that accelerator; None for nothing."""
    if not isinstance(status, dict) or status.get("running") is not True:
        return "The virtual machine does not run"
    # `-accel kvm` alone never falls back; what is reported as isolation is looked at all the same.
    enabled = isinstance(kvm, dict) and kvm.get("enabled") is True
    if enabled != (accelerator is Accelerator.KVM):
        return f"The virtual machine does not run by {accelerator.value}"
    return None


def told(event: Event) -> bool | None:
    """What an event says of a boot: whether the first program ran, which opens the link's port, or powers off; None where it says nothing of it."""
    if event.name == "VSERPORT_CHANGE" and event.data.get("open") is True:
        return True
    if event.name == "SHUTDOWN":
        # A kernel that panics, or a processor that faults three times, is a reset.
        return event.data.get("reason") == "guest-shutdown"
    return None
