"""Whether KVM really runs a guest: a few instructions in a virtual machine of their own.

Run as a script in a process of its own with a deadline, because a broken /dev/kvm can hang in KVM_RUN: prints one JSON object.
Standard library only, so that the script starts in milliseconds without the site packages.
Numbers and layouts: linux/kvm.h and arch/x86/include/uapi/asm/kvm.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_RUN = 0xAE80
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_EXIT_HLT = 5

# mov cx, 0xffff; again: dec cx; jnz again; hlt. `hlt` alone also ends where every instruction is emulated, and such a
# KVM cannot boot a kernel in useful time: there the loop was measured at 160-280 ms, on hardware it is far below 1 ms.
GUEST_CODE = bytes.fromhex("b9ffff 49 75fd f4")
SLOW_MS = 50.0
PAGE = 4096


def run_tiny_guest(device: str = "/dev/kvm") -> tuple[int, float]:
    """Run GUEST_CODE in real mode; returns (exit reason, milliseconds). Raises OSError where KVM refuses a step."""
    with contextlib.ExitStack() as stack:

        def opened(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        kvm = opened(os.open(device, os.O_RDWR | os.O_CLOEXEC))
        vm = opened(fcntl.ioctl(kvm, KVM_CREATE_VM, 0))
        memory = mmap.mmap(-1, PAGE)
        memory[: len(GUEST_CODE)] = GUEST_CODE
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, struct.pack("=IIQQQ", 0, 0, 0, PAGE, address))
        vcpu = opened(fcntl.ioctl(vm, KVM_CREATE_VCPU, 0))
        shared = mmap.mmap(vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0))
        stack.callback(shared.close)
        sregs = bytearray(312)
        fcntl.ioctl(vcpu, KVM_GET_SREGS, sregs)
        sregs[0:8] = bytes(8)  # cs.base
        sregs[12:14] = bytes(2)  # cs.selector
        fcntl.ioctl(vcpu, KVM_SET_SREGS, bytes(sregs))
        fcntl.ioctl(vcpu, KVM_SET_REGS, struct.pack("=18Q", *([0] * 16), 0, 2))  # rip = 0, rflags = the always-set bit
        before = time.perf_counter()
        fcntl.ioctl(vcpu, KVM_RUN, 0)
        took_ms = (time.perf_counter() - before) * 1000
        (reason,) = struct.unpack_from("=I", shared, 8)
        return reason, took_ms


def observe() -> dict[str, object]:
    """What this machine shows of KVM: see `judge`."""
    seen: dict[str, object] = {
        "exists": Path("/dev/kvm").exists(),
        "machine": os.uname().machine,
        "hardware": has_virtualization(Path("/proc/cpuinfo").read_text()),
        "pvm": Path("/sys/module/kvm_pvm").exists(),
    }
    if seen["exists"]:
        device = Path("/dev/kvm").stat()
        seen["group"] = opening_group(device.st_mode, device.st_gid)
    if seen["exists"] and seen["machine"] == "x86_64":
        try:
            seen["exit"], seen["took_ms"] = run_tiny_guest()
        except OSError as error:
            seen["refused"] = error.strerror
    return seen


def has_virtualization(cpuinfo: str) -> bool:
    """Whether the processor says that it can run guests."""
    return any(
        {"vmx", "svm"} & set(line.split()) for line in cpuinfo.splitlines() if line.partition(":")[0].strip() == "flags"
    )


def opening_group(mode: int, gid: int) -> int | None:
    """The group with which a user who is not root may open a device of that mode and group: its own, 0 where none is needed, None where none helps.

    Never root's: a QEMU that a guest took over would have it, too.
    """
    if mode & 0o006 == 0o006:
        return 0
    return gid if mode & 0o060 == 0o060 and gid != 0 else None


def judge(seen: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether KVM may run a guest, and why. That it does is shown by a real boot alone: a tiny guest also ends where every instruction is emulated."""
    if not seen["exists"]:
        return False, "/dev/kvm does not exist"
    if seen["machine"] != "x86_64":
        return False, "/dev/kvm exists; running a guest is only tried on x86_64"
    if "refused" in seen:
        return False, f"/dev/kvm exists but refuses a guest: {seen['refused']}"
    if seen["exit"] != KVM_EXIT_HLT:
        return False, f"/dev/kvm exists but a tiny guest ended with exit reason {seen['exit']}, not HLT"
    if seen["pvm"] or not seen["hardware"]:
        return (
            False,
            f"/dev/kvm exists without hardware virtualization behind it (tiny guest: {seen['took_ms']:.0f} ms)",
        )
    if seen["took_ms"] > SLOW_MS:
        return False, f"/dev/kvm emulates: a tiny guest took {seen['took_ms']:.0f} ms"
    if seen["group"] is None:
        return False, "/dev/kvm is root's alone, and QEMU runs as a user of its own"
    return True, f"runs a tiny guest ({seen['took_ms']:.1f} ms)"


if __name__ == "__main__":
    json.dump(observe(), sys.stdout)
