"""MicroVMs: which QEMU there is, what would run their instructions here, and why. The default driver needs none of it."""

from __future__ import annotations

import json
import os
import pwd
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from innkeeper import shipped
from innkeeper.host.drivers.accelerator import MINIMUM_VERSION, QEMU, Qemu, ask_version, tsc_khz, why_not
from innkeeper.host.drivers.qemu_command import Accelerator
from innkeeper.host.kernels.kernel_store import KernelStore
from innkeeper.host.linux import command
from innkeeper.host.probes import kvm
from innkeeper.host.probes.check import Check, Findings
from innkeeper.host.probes.machine import TOOL_PATH, user_fix

KVM_SECONDS = 3
INSTALL_FIX = "apt-get update && apt-get install -y --no-install-recommends qemu-system-x86"
LOAD_FIX = "modprobe kvm_intel || modprobe kvm_amd"
# As udev sets it up where it runs.
GROUP_FIX = "groupadd --force --system kvm && chgrp kvm /dev/kvm && chmod 660 /dev/kvm"
DEVICE_FIX = (
    "ls -l /dev/kvm  # in a container it has to be among the devices that it may use (docker run --device /dev/kvm)"
)
HARDWARE_FIX = "grep -cwE 'vmx|svm' /proc/cpuinfo  # 0: virtualization has to be turned on in the firmware, or for this machine where it is a virtual one"
MACHINE = "x86_64"
# Every QEMU runs as this one, and nothing else does.
VM_USER = "innkeeper-vm"


def locate_qemu() -> str | None:
    """The path of QEMU, or None."""
    return shutil.which(QEMU, path=TOOL_PATH)


async def probe_virtual_machines(host_dir: Path, agent: Path) -> Findings:
    """Facts: `kvm`, `kvm_group` or None, `qemu` {path, version} or None, `tsc_khz` or None. A kernel that is in `host_dir` is booted where KVM may run it."""
    path = locate_qemu()
    qemu = None if path is None else await ask_version(path)
    rate = tsc_khz(Path("/proc/cpuinfo").read_text())  # noqa: ASYNC240 - the kernel makes it up in a millisecond
    seen = await observe_kvm()
    booted = None
    if kvm.judge(seen)[0] and qemu is not None and qemu.new_enough:
        booted = await boot_by_kvm(qemu, host_dir, agent, kvm_group=seen.get("group"))
    return findings(path, qemu, rate, seen, booted)


def findings(
    path: str | None, qemu: Qemu | None, rate: int | None, seen: Mapping[str, Any], booted: str | None
) -> Findings:
    """What was seen, as checks and facts. Pure. A "no" of KVM on a processor that has virtualization is not remembered: it may have been a busy moment."""
    check = check_kvm(seen, booted)
    facts = {
        "kvm": check.ok is True,
        "kvm_group": seen.get("group") or None,
        "qemu": None if qemu is None else {"path": qemu.path, "version": qemu.text},
        "tsc_khz": rate,
    }
    checks = (check_qemu(path, qemu, machine=seen["machine"]), check_tsc(rate), check)
    return Findings(checks, facts, lasting=check.ok is True or not seen.get("hardware"))


async def boot_by_kvm(qemu: Qemu, host_dir: Path, agent: Path, *, kvm_group: int | None = None) -> str | None:
    """How a real boot by KVM went: empty when the guest came up, else why not; None where there is no kernel to boot, or nobody to run it as."""
    kernels, user = KernelStore(host_dir).kernels(), find_user()
    if not kernels or not agent.is_file() or user is None or 0 in user or os.geteuid() != 0:  # noqa: ASYNC240
        return None
    files = await KernelStore(host_dir).boot_files(kernels[-1], agent)
    reason = await why_not(qemu.path, Accelerator.KVM, boot=files, user=user, kvm_group=kvm_group, directory=host_dir)
    return reason or ""


async def observe_kvm() -> Mapping[str, Any]:
    """What `kvm.judge` judges, from a process of its own: KVM_RUN may never return."""
    try:
        answer = await command.run([sys.executable, "-I", "-S", kvm.__file__], timeout_seconds=KVM_SECONDS)
        seen: dict[str, Any] = json.loads(answer.stdout)
        return seen
    except command.CommandTimedOut:
        return {
            "exists": True,
            "machine": os.uname().machine,
            "refused": f"a tiny guest did not end within {KVM_SECONDS} s",
        }
    except (command.CommandFailed, ValueError):
        return {"exists": True, "machine": os.uname().machine, "refused": "trying a tiny guest failed"}


def check_qemu(path: str | None, qemu: Qemu | None, *, machine: str = MACHINE) -> Check:
    """The QEMU that microVMs run in."""
    if machine != MACHINE:
        return Check("qemu", None, f"microVMs run on {MACHINE} alone, and this is {machine}; gVisor runs on both")
    if path is None:
        return Check("qemu", None, "not installed; microVMs need it, the gVisor driver does not", INSTALL_FIX)
    if qemu is None:
        return Check("qemu", None, f"{path} does not say which version it is", INSTALL_FIX)
    if not qemu.new_enough:
        wanted = ".".join(map(str, MINIMUM_VERSION))
        return Check(
            "qemu", None, f"{qemu.text} ({path}) is too old for microVMs; {wanted} or newer is needed", INSTALL_FIX
        )
    return Check("qemu", True, f"{qemu.text} ({path})")


def check_vm_user(*, api_user: str, name: str = VM_USER) -> Check:
    """The user that every QEMU runs as. Looked at each time: somebody may have pasted the line."""
    found = find_user(name)
    if found is None:
        return Check("vm user", None, f"there is no user '{name}', which virtual machines run as", user_fix(name))
    if 0 in found or name == api_user:
        return Check("vm user", None, f"'{name}' is root or the API's user: virtual machines need one of their own")
    return Check("vm user", True, f"{name} (uid {found[0]})")


def find_user(name: str = VM_USER) -> tuple[int, int] | None:
    """Its uid and gid, or None where there is none."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None
    return entry.pw_uid, entry.pw_gid


def check_guest_kernel(home: Path, host_dir: Path) -> Check:
    """What microVMs boot."""
    store, brought = KernelStore(host_dir), shipped.ready_kernel()
    kernels = store.kernels()
    if brought is not None and store.is_older(brought):
        return Check("guest kernel", True, f"{brought}, from the server's start on")
    if kernels:
        return Check("guest kernel", True, kernels[-1].name)
    fix = f"inn kernel fetch --home {shlex.quote(str(home))}"
    return Check("guest kernel", None, "none was fetched, and microVMs boot one: inn kernel fetch", fix)


def check_tsc(rate: int | None) -> Check:
    """The counter that a microVM tells the time by where its instructions are translated."""
    if rate is None:
        return Check("tsc", None, "no time stamp counter of a constant rate: microVMs run by KVM alone here")
    return Check("tsc", True, f"{rate / 1000:.3f} MHz")


def check_kvm(seen: Mapping[str, Any], booted: str | None) -> Check:
    """Whether KVM runs a guest. `booted`: see `boot_by_kvm`; the one proof there is, so without it nothing runs by KVM."""
    good, why = kvm.judge(seen)
    if good:
        why += (
            f", but a real one did not boot: {booted}"
            if booted
            else "; boots a real one"
            if booted == ""
            else "; no real one was tried"
        )
    proven = good and booted == ""
    return Check("kvm", True if proven else None, f"{why}; the gVisor driver does not need it", _kvm_fix(seen))


def _kvm_fix(seen: Mapping[str, Any]) -> str | None:
    if seen["machine"] != MACHINE:
        return None
    if not seen.get("hardware"):
        return HARDWARE_FIX
    if not seen["exists"]:
        return LOAD_FIX
    if "refused" in seen:
        return DEVICE_FIX
    return GROUP_FIX if seen.get("group") is None else None
