"""MicroVMs: which QEMU there is, what would run their instructions here, and why. The default driver needs none of it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from innkeeper.host.drivers.accelerator import MINIMUM_VERSION, QEMU, Qemu, ask_version, tsc_khz, why_not
from innkeeper.host.drivers.qemu_command import Accelerator
from innkeeper.host.kernels.kernel_store import KernelStore
from innkeeper.host.linux import command
from innkeeper.host.probes import kvm
from innkeeper.host.probes.check import Check, Findings
from innkeeper.host.probes.machine import TOOL_PATH

KVM_SECONDS = 3
INSTALL_FIX = "apt-get update && apt-get install -y --no-install-recommends qemu-system-x86"
LOAD_FIX = "modprobe kvm_intel || modprobe kvm_amd"


def locate_qemu() -> str | None:
    """The path of QEMU, or None."""
    return shutil.which(QEMU, path=TOOL_PATH)


async def probe_virtual_machines(host_dir: Path, agent: Path) -> Findings:
    """Facts: `kvm`, `qemu` {path, version} or None, `tsc_khz` or None. A kernel that is in `host_dir` is booted where KVM may run it."""
    path = locate_qemu()
    qemu = None if path is None else await ask_version(path)
    rate = tsc_khz(Path("/proc/cpuinfo").read_text())  # noqa: ASYNC240 - the kernel makes it up in a millisecond
    seen = await observe_kvm()
    booted = None
    if kvm.judge(seen)[0] and qemu is not None and qemu.new_enough:
        booted = await boot_by_kvm(qemu, host_dir, agent)
    check = check_kvm(seen, booted)
    facts = {
        "kvm": check.ok is True,
        "qemu": None if qemu is None else {"path": qemu.path, "version": qemu.text},
        "tsc_khz": rate,
    }
    return Findings((check_qemu(path, qemu), check_tsc(rate), check), facts)


async def boot_by_kvm(qemu: Qemu, host_dir: Path, agent: Path) -> str | None:
    """How a real boot by KVM went: empty when the guest came up, else why not; None where there is no kernel to boot."""
    # Looking at a host must not change it: no folder is made for kernels.
    if not (host_dir / "kernels").is_dir() or not agent.is_file():  # noqa: ASYNC240
        return None
    store = KernelStore(host_dir)
    kernels = store.kernels()
    if not kernels:
        return None
    files = await store.boot_files(kernels[-1], agent)
    reason = await why_not(qemu.path, Accelerator.KVM, kernel=files.kernel, initramfs=files.initramfs)
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


def check_qemu(path: str | None, qemu: Qemu | None) -> Check:
    """The QEMU that microVMs run in."""
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


def check_tsc(rate: int | None) -> Check:
    """The counter that a microVM tells the time by where its instructions are translated."""
    if rate is None:
        return Check("tsc", None, "no time stamp counter of a constant rate: microVMs run by KVM alone here")
    return Check("tsc", True, f"{rate / 1000:.3f} MHz")


def check_kvm(seen: Mapping[str, Any], booted: str | None) -> Check:
    """Whether KVM runs a guest. `booted`: see `boot_by_kvm`; the one proof there is, so without it nothing runs by KVM."""
    good, why = kvm.judge(seen)
    fix = LOAD_FIX if not seen["exists"] and seen.get("hardware") else None
    if good:
        why += (
            f", but a real one did not boot: {booted}"
            if booted
            else "; boots a real one"
            if booted == ""
            else "; no real one was tried"
        )
    proven = good and booted == ""
    return Check("kvm", True if proven else None, f"{why}; the gVisor driver does not need it", fix)
