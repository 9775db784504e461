"""MicroVMs: which QEMU there is, what would run their instructions here, and why. The default driver needs none of it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from innkeeper.host.drivers.accelerator import MINIMUM_VERSION, QEMU, Qemu, ask_version, tsc_khz
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


async def probe_virtual_machines() -> Findings:
    """Facts: `kvm`, `qemu` {path, version} or None, `tsc_khz` or None."""
    path = locate_qemu()
    qemu = None if path is None else await ask_version(path)
    rate = tsc_khz(Path("/proc/cpuinfo").read_text())  # noqa: ASYNC240 - the kernel makes it up in a millisecond
    seen = await observe_kvm()
    good, _ = kvm.judge(seen)
    facts = {"kvm": good, "qemu": None if qemu is None else {"path": qemu.path, "version": qemu.text}, "tsc_khz": rate}
    return Findings((check_qemu(path, qemu), check_tsc(rate), check_kvm(seen)), facts)


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


def check_kvm(seen: Mapping[str, Any]) -> Check:
    """Whether KVM may run a guest."""
    good, why = kvm.judge(seen)
    fix = LOAD_FIX if not seen["exists"] and seen.get("hardware") else None
    return Check("kvm", True if good else None, f"{why}; the gVisor driver does not need it", fix)
