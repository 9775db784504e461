"""What this host can do, and why not.

`take_inventory` tries everything that the default driver needs. What takes long is remembered in `<home>/host/inventory.json` under
a key of the kernel and the runsc binary, so that a server on a machine that is set up starts at once; failures never are.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from innkeeper.errors import UnavailableError
from innkeeper.host.drivers.qemu_command import Accelerator
from innkeeper.host.kernels.kernel_store import KernelStore
from innkeeper.host.probes.check import Check, Findings, findings_from_dict
from innkeeper.host.probes.control_groups import probe_control_groups
from innkeeper.host.probes.filesystems import probe_filesystems
from innkeeper.host.probes.firewall import check_forwarding
from innkeeper.host.probes.machine import agent_path, is_root, machine_checks, nearest_existing
from innkeeper.host.probes.network import check_ip_forward, probe_network
from innkeeper.host.probes.sandbox import faster, locate_runsc, probe_sandbox
from innkeeper.host.probes.virtual_machines import (
    check_guest_kernel,
    check_vm_user,
    locate_qemu,
    probe_virtual_machines,
)
from innkeeper.settings import Settings

FORMAT = 4

Probe = Callable[[Settings], Awaitable[Findings]]


@dataclass(frozen=True, slots=True)
class PlatformChoice:
    """A gVisor platform and why it was taken."""

    platform: str
    reason: str


@dataclass(frozen=True, slots=True)
class VirtualHardware:
    """The QEMU that runs microVMs here, what runs their instructions, and why that."""

    qemu: str
    accelerator: Accelerator
    tsc_khz: int | None
    reason: str
    kvm_group: int | None = None


@dataclass(frozen=True, slots=True)
class Inventory:
    """Everything that was found, in the order in which a person reads it."""

    checks: tuple[Check, ...]
    facts: Mapping[str, Any]

    @property
    def ok(self) -> bool:
        """Whether the default driver can run here."""
        return not any(check.blocks for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The JSON form: `{"ok": bool, "checks": [...], "facts": {...}}`."""
        return {"ok": self.ok, "checks": [check.as_dict() for check in self.checks], "facts": dict(self.facts)}


def refuse_reasons(inventory: Inventory) -> list[str]:
    """Why `inn serve` refuses to start: one text per failure, each with its FIX line; empty when it can."""
    return [check.sentence() for check in inventory.checks if check.blocks]


async def take_inventory(settings: Settings, *, quick: bool = False) -> Inventory:
    """Every check. `quick` takes the long probes from the last full run where machine and runsc are the same, else runs them.

    Needs root for most; without it those are warnings that say so, beside the failed check `root`. Never raises for what it finds.
    """
    checks = list(machine_checks(settings))
    facts: dict[str, Any] = {}
    if is_root():
        for findings in await _probe_all(settings, quick=quick):
            checks += findings.checks
            facts.update(findings.facts)
        checks.append(await check_forwarding(settings))
    else:
        checks += [Check(name, None, "not tried: needs root") for name in PROBES]
    checks += [check_vm_user(api_user=settings.api_user), check_guest_kernel(settings.home, settings.host_dir)]
    checks.append(check_ip_forward())
    choice = _choose(settings, facts)
    if choice is not None:
        facts["platform"] = choice.platform
        checks.append(Check("platform", True, f"{choice.platform}: {choice.reason}", required=True))
    return Inventory(tuple(checks), facts)


async def choose_platform(settings: Settings) -> PlatformChoice:
    """The gVisor platform that the driver uses: the operator's, else the faster of those that run here (measured once, remembered).

    Raises UnavailableError when none runs.
    """
    if settings.runsc_platform != "auto":
        return PlatformChoice(settings.runsc_platform, "set by runsc_platform")
    found = await _probe_all(settings, quick=True, only=("sandbox",))
    choice = _choose(settings, found[0].facts)
    if choice is None:
        failed = [check.sentence() for check in found[0].checks if check.ok is False]
        raise UnavailableError("\n".join(failed) or "no gVisor platform runs on this host")
    return choice


async def choose_virtual_hardware(settings: Settings) -> VirtualHardware:
    """What microVMs run on here: by KVM where a guest was really booted by it (tried once, remembered), else by TCG.

    Raises UnavailableError, with the reason, where they cannot.
    """
    (found,) = await _probe_all(settings, quick=True, only=("kvm",))
    return virtual_hardware(found)


def virtual_hardware(found: Findings) -> VirtualHardware:
    """What the findings about virtual machines come to. Raises UnavailableError, with the reason, where none can run."""
    checks = {check.name: check for check in found.checks}
    if checks["qemu"].ok is not True:
        raise UnavailableError(f"QEMU: {checks['qemu'].detail}")
    path, rate = found.facts["qemu"]["path"], found.facts["tsc_khz"]
    if found.facts["kvm"]:
        group = found.facts["kvm_group"]
        return VirtualHardware(path, Accelerator.KVM, rate, f"KVM {checks['kvm'].detail}", group)
    if rate is None:
        raise UnavailableError(f"KVM: {checks['kvm'].detail}; TCG: {checks['tsc'].detail}")
    return VirtualHardware(path, Accelerator.TCG, rate, f"no KVM: {checks['kvm'].detail}")


def _choose(settings: Settings, facts: Mapping[str, Any]) -> PlatformChoice | None:
    exec_us: dict[str, int] = facts.get("exec_us", {})
    platform = faster(exec_us)
    if platform is None:
        return None
    if settings.runsc_platform != "auto":
        return PlatformChoice(platform, "set by runsc_platform")
    if len(exec_us) == 1:
        return PlatformChoice(platform, "the only one that runs here")
    others = ", ".join(f"{other} {took / 1000:.0f} ms" for other, took in exec_us.items() if other != platform)
    verb = "faster here" if exec_us[platform] == min(exec_us.values()) else "gVisor's default, and as fast here"
    return PlatformChoice(platform, f"{verb} ({exec_us[platform] / 1000:.0f} ms against {others})")


async def _sandbox(settings: Settings) -> Findings:
    return await probe_sandbox(settings.runsc, settings.runsc_platform)


async def _control_groups(_: Settings) -> Findings:
    return await probe_control_groups()


async def _filesystems(settings: Settings) -> Findings:
    return await probe_filesystems(nearest_existing(settings.host_dir))


async def _network(_: Settings) -> Findings:
    return await probe_network()


async def _virtual_machines(settings: Settings) -> Findings:
    return await probe_virtual_machines(settings.host_dir, agent_path(settings))


PROBES: Mapping[str, Probe] = {
    "sandbox": _sandbox,
    "control groups": _control_groups,
    "file systems": _filesystems,
    "network": _network,
    "kvm": _virtual_machines,
}


async def _probe_all(settings: Settings, *, quick: bool, only: tuple[str, ...] = tuple(PROBES)) -> list[Findings]:
    """The findings of the named probes, in that order; remembers the good ones."""
    path, key = settings.host_dir / "inventory.json", _key(settings)
    known = await asyncio.to_thread(_load, path, key)
    found: dict[str, Findings] = {}
    for name in only:
        # One after the other: the sandbox is being timed, and on a small machine everything else disturbs it.
        found[name] = known[name] if quick and name in known else await PROBES[name](settings)
    kept = {**known, **found}
    good = {name: findings for name, findings in kept.items() if findings.good}
    if good != known:
        await asyncio.to_thread(_save, path, key, good)
    return [found[name] for name in only]


def _key(settings: Settings) -> dict[str, Any]:
    """What the remembered findings depend on."""
    kernel = os.uname()
    return {
        "format": FORMAT,
        "kernel": [kernel.release, kernel.version, kernel.machine],
        "runsc": _identity(locate_runsc(settings.runsc)),
        "qemu": _identity(locate_qemu()),
        # The one that KVM is tried by.
        "guest kernel": [kernel.name for kernel in KernelStore(settings.host_dir).kernels()[-1:]],
        # A module that is loaded later makes it appear.
        "kvm": os.path.exists("/dev/kvm"),  # noqa: PTH110
        "platform": settings.runsc_platform,
        "state": os.stat(nearest_existing(settings.host_dir)).st_dev,  # noqa: PTH116
    }


def _identity(program: str | None) -> list[Any]:
    """What a program's file is known by; empty for none."""
    if program is None:
        return []
    status = os.stat(program)  # noqa: PTH116 - follows the link to the real binary
    return [os.path.realpath(program), status.st_size, status.st_mtime_ns]


def _load(path: Path, key: Mapping[str, Any]) -> dict[str, Findings]:
    try:
        stored = json.loads(path.read_bytes())
        if stored["key"] != key:
            return {}
        return {name: findings_from_dict(stored["probes"][name]) for name in PROBES if name in stored["probes"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # not there, of another version, or damaged: everything is tried again


def _save(path: Path, key: Mapping[str, Any], probes: Mapping[str, Findings]) -> None:
    """Write beside and rename. Without a state directory nothing is remembered: looking at a host must not change it."""
    if not path.parent.is_dir():
        return
    text = json.dumps({"key": key, "probes": {name: findings.as_dict() for name, findings in probes.items()}}, indent=1)
    with contextlib.suppress(OSError):
        fd, name = tempfile.mkstemp(prefix=".inventory-", dir=path.parent)
        try:
            with os.fdopen(fd, "w") as file:
                file.write(text)
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
