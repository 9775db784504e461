"""What microVMs would run on, on hosts of every kind. None of those with KVM was at hand: what they show is written from what they are documented to show.

Recorded on a real machine are the first two, and QEMU's answers without KVM.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from innkeeper.errors import UnavailableError
from innkeeper.host.drivers.accelerator import Qemu, tsc_khz, why_not_running
from innkeeper.host.drivers.qemu_command import Accelerator
from innkeeper.host.drivers.vm_jail import VmJail
from innkeeper.host.inventory import virtual_hardware
from innkeeper.host.probes import kvm
from innkeeper.host.probes.check import findings_from_dict
from innkeeper.host.probes.virtual_machines import (
    DEVICE_FIX,
    GROUP_FIX,
    HARDWARE_FIX,
    INSTALL_FIX,
    LOAD_FIX,
    findings,
)

PATH = "/usr/bin/qemu-system-x86_64"
KVM_GROUP = 106

# Lines of /proc/cpuinfo, and what the time stamp counter's rate is by them.
EPYC_GUEST = (
    "vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\ncpu MHz\t\t: 2596.120\n"
    "flags\t\t: fpu tsc msr cx8 sep nx rdtscp lm constant_tsc rep_good nopl xtopology nonstop_tsc tsc_known_freq hypervisor\n"
    "bogomips\t: 5192.24\n"
)
XEON = (
    "vendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz\ncpu MHz\t\t: 800.000\n"
    "flags\t\t: fpu vme tsc msr nx rdtscp lm constant_tsc art arch_perfmon nonstop_tsc vmx smx est tsc_deadline_timer\n"
    "vmx flags\t: vnmi preemption_timer ept vpid\nbogomips\t: 4000.00\n"
)
EPYC = (
    "vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 7763 64-Core Processor\ncpu MHz\t\t: 1500.000\n"
    "flags\t\t: fpu vme tsc msr nx rdtscp lm constant_tsc nonstop_tsc extapic svm extd_apicid\nbogomips\t: 4899.97\n"
)
NESTED = XEON.replace(" smx", " hypervisor").replace("800.000", "2000.000")
NO_CONSTANT_RATE = XEON.replace(" constant_tsc", "").replace(" vmx", "").replace("vmx flags", "bugs")
ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd evtstrm aes crc32 cpuid\nCPU implementer\t: 0x41\n"


@dataclass(frozen=True)
class Host:
    """A host as the probes see it, and what has to come of it. `device` is the mode and group of /dev/kvm; None: there is none."""

    cpuinfo: str
    device: tuple[int, int] | None
    tiny_guest: dict[str, Any]
    expected: Accelerator | str
    says: str
    fix: str | None = None
    pvm: bool = False
    machine: str = "x86_64"
    booted: str | None = None
    qemu: tuple[int, int, int] | None = (7, 2, 22)
    lasting: bool = True

    def seen(self) -> dict[str, Any]:
        """What `kvm.observe` makes of it."""
        seen: dict[str, Any] = {
            "exists": self.device is not None,
            "machine": self.machine,
            "hardware": kvm.has_virtualization(self.cpuinfo),
            "pvm": self.pvm,
        }
        if self.device is not None:
            seen["group"] = kvm.opening_group(stat.S_IFCHR | self.device[0], self.device[1])
        return {**seen, **self.tiny_guest}


RUNS = {"exit": kvm.KVM_EXIT_HLT, "took_ms": 0.21}
UDEV = (0o660, KVM_GROUP)
HOSTS = {
    "a cloud machine on PVM, where KVM ends a tiny guest and boots none": Host(
        EPYC_GUEST,
        (0o600, 0),
        {"exit": 5, "took_ms": 263.0},
        Accelerator.TCG,
        "/dev/kvm exists without hardware virtualization behind it (tiny guest: 263 ms)",
        HARDWARE_FIX,
        pvm=True,
    ),
    "the same without the module's name, on a quiet moment": Host(
        EPYC_GUEST,
        (0o600, 0),
        {"exit": 5, "took_ms": 1.4},
        Accelerator.TCG,
        "/dev/kvm exists without hardware virtualization behind it (tiny guest: 1 ms)",
        HARDWARE_FIX,
    ),
    "bare metal, Intel": Host(XEON, UDEV, RUNS, Accelerator.KVM, "boots a real one", booted=""),
    "bare metal, AMD": Host(EPYC, UDEV, RUNS, Accelerator.KVM, "boots a real one", booted=""),
    "bare metal with QEMU 10": Host(EPYC, UDEV, RUNS, Accelerator.KVM, "boots a real one", booted="", qemu=(10, 0, 2)),
    "nested, and it works": Host(
        NESTED, UDEV, {"exit": 5, "took_ms": 4.1}, Accelerator.KVM, "boots a real one", booted=""
    ),
    "nested, and a real guest hangs": Host(
        NESTED,
        UDEV,
        RUNS,
        Accelerator.TCG,
        "but a real one did not boot: a guest did not come up within 3 s",
        booted="a guest did not come up within 3 s",
        lasting=False,
    ),
    "nested, whose flags are emulated": Host(
        NESTED,
        UDEV,
        {"exit": 5, "took_ms": 283.0},
        Accelerator.TCG,
        "/dev/kvm emulates: a tiny guest took 283 ms",
        lasting=False,
    ),
    "no kernel to boot yet": Host(XEON, UDEV, RUNS, Accelerator.TCG, "no real one was tried", lasting=False),
    "the module is not loaded": Host(
        XEON, None, {}, Accelerator.TCG, "/dev/kvm does not exist", LOAD_FIX, lasting=False
    ),
    "virtualization is off in the firmware": Host(
        XEON.replace(" vmx", "").replace("vmx flags", "bugs"),
        None,
        {},
        Accelerator.TCG,
        "/dev/kvm does not exist",
        HARDWARE_FIX,
    ),
    "a container without the device": Host(
        EPYC, None, {}, Accelerator.TCG, "/dev/kvm does not exist", LOAD_FIX, lasting=False
    ),
    "a container whose device group keeps everybody out": Host(
        EPYC,
        UDEV,
        {"refused": "Operation not permitted"},
        Accelerator.TCG,
        "/dev/kvm exists but refuses a guest: Operation not permitted",
        DEVICE_FIX,
        lasting=False,
    ),
    "a device of root's alone": Host(
        XEON,
        (0o600, 0),
        RUNS,
        Accelerator.TCG,
        "/dev/kvm is root's alone, and QEMU runs as a user of its own",
        GROUP_FIX,
        lasting=False,
    ),
    "a device of root's group": Host(
        XEON,
        (0o660, 0),
        RUNS,
        Accelerator.TCG,
        "/dev/kvm is root's alone, and QEMU runs as a user of its own",
        GROUP_FIX,
        lasting=False,
    ),
    "a device for everybody": Host(XEON, (0o666, 0), RUNS, Accelerator.KVM, "boots a real one", booted=""),
    "a guest that failed to enter": Host(
        XEON,
        UDEV,
        {"exit": 9, "took_ms": 0.1},
        Accelerator.TCG,
        "a tiny guest ended with exit reason 9, not HLT",
        lasting=False,
    ),
    "neither KVM nor a counter that TCG can tell the time by": Host(
        NO_CONSTANT_RATE,
        None,
        {},
        "no time stamp counter of a constant rate",
        "/dev/kvm does not exist",
        HARDWARE_FIX,
    ),
    "arm64": Host(
        ARM, UDEV, {}, "microVMs run on x86_64 alone, and this is aarch64", "is only tried on x86_64", machine="aarch64"
    ),
    "no QEMU": Host(XEON, UDEV, RUNS, "QEMU: not installed", "no real one was tried", qemu=None, lasting=False),
    "a QEMU of Debian 11": Host(
        XEON, UDEV, RUNS, "QEMU: 5.2.0", "no real one was tried", qemu=(5, 2, 0), lasting=False
    ),
}


@pytest.mark.parametrize("name", HOSTS)
def test_what_microvms_run_on(name: str) -> None:
    host = HOSTS[name]
    seen, qemu = host.seen(), None if host.qemu is None else Qemu(PATH, host.qemu)
    found = findings(None if qemu is None else PATH, qemu, tsc_khz(host.cpuinfo), seen, host.booted)
    checks = {check.name: check for check in found.checks}
    assert host.says in checks["kvm"].detail
    assert checks["kvm"].fix == host.fix
    assert checks["kvm"].ok is (True if host.expected is Accelerator.KVM else None)
    assert not any(check.blocks for check in found.checks), "gVisor needs none of it"
    # What a busy moment or a missing right may have decided is looked at again at the next start.
    assert found.good is host.lasting
    if not isinstance(host.expected, Accelerator):
        with pytest.raises(UnavailableError, match=host.expected):
            virtual_hardware(found)
        return
    hardware = virtual_hardware(found)
    assert (hardware.qemu, hardware.accelerator, hardware.tsc_khz) == (PATH, host.expected, tsc_khz(host.cpuinfo))
    assert host.says in hardware.reason
    in_group = host.expected is Accelerator.KVM and host.device == UDEV
    assert hardware.kvm_group == (KVM_GROUP if in_group else None)
    # As it is remembered.
    assert virtual_hardware(findings_from_dict(found.as_dict())) == hardware


def test_rates_are_of_the_counter_and_not_of_the_moment() -> None:
    assert [tsc_khz(text) for text in (EPYC_GUEST, XEON, EPYC, NO_CONSTANT_RATE, ARM)] == [
        2_596_120,
        2_000_000,
        2_449_985,
        None,
        None,
    ]


@pytest.mark.parametrize("host", HOSTS)
def test_whatever_a_real_boot_says_it_decides(host: str) -> None:
    """It is asked for only where the cheap looks pass; where they do not, it is not believed either."""
    seen = HOSTS[host].seen()
    if HOSTS[host].machine != "x86_64":
        assert kvm.judge(seen)[0] is False
        return
    qemu = Qemu(PATH, (7, 2, 22))
    for booted, proven in (("", kvm.judge(seen)[0]), (None, False), ("a guest did not come up within 3 s", False)):
        assert findings(PATH, qemu, 2_000_000, seen, booted).facts["kvm"] is proven


RUNNING = {"status": "running", "singlestep": False, "running": True}  # QEMU 7.2; 10 does not tell `singlestep`
WITHOUT_KVM, WITH_KVM = ({"enabled": enabled, "present": True} for enabled in (False, True))


@pytest.mark.parametrize(
    ("status", "answer", "accelerator", "reason"),
    [
        (RUNNING, WITHOUT_KVM, Accelerator.TCG, None),
        ({"status": "running", "running": True}, WITH_KVM, Accelerator.KVM, None),
        (RUNNING, WITHOUT_KVM, Accelerator.KVM, "The virtual machine does not run by kvm"),
        (RUNNING, WITH_KVM, Accelerator.TCG, "The virtual machine does not run by tcg"),
        (RUNNING, {}, Accelerator.KVM, "The virtual machine does not run by kvm"),
        (RUNNING, None, Accelerator.KVM, "The virtual machine does not run by kvm"),
        ({"status": "paused", "running": False}, WITH_KVM, Accelerator.KVM, "The virtual machine does not run"),
        (None, WITH_KVM, Accelerator.KVM, "The virtual machine does not run"),
    ],
)
def test_a_guest_runs_by_what_its_isolation_says_or_not_at_all(
    status: object, answer: object, accelerator: Accelerator, reason: str | None
) -> None:
    assert why_not_running(status, answer, accelerator) == reason


def test_qemu_gets_the_device_and_its_group_and_no_other(tmp_path: Path) -> None:
    root, kernel = tmp_path / "root", tmp_path / "kernel"
    by_kvm = VmJail(root=root, mark="m", uid=995, gid=994, groups=(KVM_GROUP,), devices=(Path("/dev/kvm"),))
    by_tcg = VmJail(root=root, mark="m", uid=995, gid=994)
    plans = [
        jail.plan(kernel=kernel, initramfs=kernel, groups=[tmp_path / "procs"], netns=tmp_path / "netns", file_bytes=1)
        for jail in (by_kvm, by_tcg)
    ]
    mounts = [plan.pop("mounts") for plan in plans]
    assert [mount for mount in mounts[0] if mount not in mounts[1]] == [
        {"source": "/dev/kvm", "target": "dev/kvm", "devices": True}
    ]
    assert all(mount in mounts[0] for mount in mounts[1])
    assert [plan.pop("further_groups") for plan in plans] == [[KVM_GROUP], []]
    assert plans[0] == plans[1]
    assert (plans[0]["uid"], plans[0]["gid"]) == (995, 994)
    # What a guest could write to, or start, of the host's: nothing.
    assert all(mount.get("read_only") or mount["source"].startswith("/dev/") for mount in mounts[0])


def test_a_missing_qemu_has_its_line_to_paste() -> None:
    found = findings(None, None, None, HOSTS["bare metal, Intel"].seen(), None)
    assert next(check for check in found.checks if check.name == "qemu").fix == INSTALL_FIX
