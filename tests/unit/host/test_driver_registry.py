"""Several drivers behind one host: who starts, who is told of, and that each looks after its own. With drivers that follow a script."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from innkeeper.core.host_verbs import MachineShape
from innkeeper.core.instance import Isolation
from innkeeper.core.isolation import Offer
from innkeeper.core.leak import LeakKind
from innkeeper.errors import UnavailableError
from innkeeper.host.directories import Directories
from innkeeper.host.drivers import registry
from innkeeper.host.drivers.contract import Capabilities
from innkeeper.host.drivers.qemu_command import Accelerator
from innkeeper.host.drivers.registry import DriverRegistry, Registered, known_drivers, open_drivers
from innkeeper.host.inventory import PlatformChoice, VirtualHardware
from innkeeper.host.kernels.kernel_store import BootFiles
from innkeeper.host.machine import MachineRecord
from innkeeper.settings import Settings

pytestmark = pytest.mark.anyio


class Scripted:
    """A driver that has some machines and remembers what it was asked for."""

    def __init__(self, name: str, *machines: str, **capabilities: bool) -> None:
        self.name, self.machines, self.strays = name, set(machines), 0
        self.capabilities = Capabilities(**capabilities)
        self.isolation = Isolation(name, name, "here", f"{name} works")
        self.asked: list[tuple[str, Any]] = []

    async def found(self) -> set[str]:
        return set(self.machines)

    async def stop(self, machine_id: str) -> None:
        self.asked.append(("stop", machine_id))
        self.machines.discard(machine_id)

    def leftovers(self, keep: Any) -> list[tuple[LeakKind, str, str]]:
        shared = [(LeakKind.CONTROL_GROUP, "/sys/shared", "m")]
        return shared + [(LeakKind.RUNTIME_FILE, f"{self.name}/{one}", one) for one in sorted(self.machines - keep)]

    async def end_strays(self, keep: Any) -> int:
        ended, self.strays = self.strays, 0
        return ended

    async def close(self, *, keep_running: bool) -> None:
        self.asked.append(("close", keep_running))


def record(driver: str) -> MachineRecord:
    return MachineRecord("m", MachineShape("k", "d", "another", 1, 128, 64, "none"), driver, "disk", 3, "h")


async def test_only_what_runs_here_starts_and_the_others_are_told_with_their_reason() -> None:
    gvisor, other = Scripted("gvisor", freeze=True, host_sees_changes=True), Scripted("qemu", freeze=True)
    drivers: Any = DriverRegistry(Registered(gvisor), Registered(other, "QEMU is not installed"))  # type: ignore[arg-type]
    assert drivers.offers() == [
        Offer("gvisor", gvisor.isolation, "gvisor works", frozenset({"freeze", "host_sees_changes"})),
        Offer("qemu", None, "QEMU is not installed", frozenset({"freeze"})),
    ]
    assert drivers.starting("gvisor") is gvisor
    with pytest.raises(UnavailableError, match="'qemu' cannot run on this host: QEMU is not installed"):
        drivers.starting("qemu")
    with pytest.raises(UnavailableError, match="no driver 'firecracker'"):
        drivers.starting("firecracker")


async def test_a_machine_is_its_own_drivers_also_where_that_starts_nothing_any_more() -> None:
    gvisor, other = Scripted("gvisor", "a", "b"), Scripted("qemu", "c")
    drivers: Any = DriverRegistry(Registered(gvisor), Registered(other, "KVM has gone"))  # type: ignore[arg-type]
    # By the record, not by what a new one of its shape would get.
    assert (drivers.of(record("qemu")), drivers.of(record("gvisor"))) == (other, gvisor)
    assert drivers.of(record("firecracker")) is None
    assert await drivers.found() == {"a", "b", "c"}
    assert drivers.leftovers({"a"}) == [
        # Told once, although each of them sees it.
        (LeakKind.CONTROL_GROUP, "/sys/shared", "m"),
        (LeakKind.RUNTIME_FILE, "gvisor/b", "b"),
        (LeakKind.RUNTIME_FILE, "qemu/c", "c"),
    ]
    await drivers.stop("c")
    assert await drivers.found() == {"a", "b"}
    gvisor.strays, other.strays = 1, 2
    assert (await drivers.end_strays(set()), await drivers.end_strays(set())) == (3, 0)
    await drivers.close(keep_running=True)
    assert gvisor.asked[-1] == other.asked[-1] == ("close", True)


async def test_a_host_where_no_driver_runs_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def none_runs(_: Settings) -> PlatformChoice:
        raise UnavailableError("runsc is missing\nFIX: apt install runsc")

    async def one_runs(_: Settings) -> PlatformChoice:
        return PlatformChoice("ptrace", "the only one that runs here")

    settings, directories = Settings(home=tmp_path), Directories(tmp_path)
    monkeypatch.setattr(registry, "choose_platform", none_runs)
    monkeypatch.setattr(registry, "locate_qemu", lambda: None)
    with pytest.raises(UnavailableError, match="FIX: apt install runsc\nqemu: not installed"):
        await open_drivers(settings, directories, agent=tmp_path / "agent")
    monkeypatch.setattr(registry, "choose_platform", one_runs)
    offer, other = (await open_drivers(settings, directories, agent=tmp_path / "agent")).offers()
    assert offer.isolation == Isolation("gvisor", "gvisor", "ptrace", "the only one that runs here")
    assert (other.driver, other.isolation, other.reason) == (
        "qemu",
        None,
        "qemu: not installed; microVMs need it, the gVisor driver does not",
    )
    untried = known_drivers(settings, directories).offers()
    assert [(one.driver, one.isolation) for one in untried] == [("gvisor", None), ("qemu", None)]


async def test_a_host_offers_microvms_with_a_user_and_a_kernel_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def one_runs(_: Settings) -> PlatformChoice:
        return PlatformChoice("ptrace", "the only one that runs here")

    async def in_software(_: Settings) -> VirtualHardware:
        return VirtualHardware("/usr/bin/qemu", Accelerator.TCG, 2_250_000, "no KVM: it emulates")

    async def offered() -> tuple[Isolation | None, str]:
        _, other = (await open_drivers(Settings(home=tmp_path), Directories(tmp_path), agent=agent)).offers()
        return other.isolation, other.reason

    monkeypatch.setattr(registry, "choose_platform", one_runs)
    monkeypatch.setattr(registry, "choose_virtual_hardware", in_software)
    agent = tmp_path / "agent"
    agent.write_bytes(b"a program")
    monkeypatch.setattr(registry, "VM_USER", "innkeeper-nobody-has-this-name")
    monkeypatch.setattr(registry, "locate_qemu", lambda: None)
    assert (await offered())[1].startswith("qemu: not installed")
    monkeypatch.setattr(registry, "locate_qemu", lambda: "/usr/bin/qemu")
    with monkeypatch.context() as patch:
        patch.setattr(os, "uname", lambda: SimpleNamespace(machine="aarch64"))
        said = "qemu: microVMs run on x86_64 alone, and this is aarch64; gVisor runs on both"
        assert await offered() == (None, said)
    isolation, reason = await offered()
    assert isolation is None
    assert reason == "vm user: there is no user 'innkeeper-nobody-has-this-name', which virtual machines run as"
    monkeypatch.setattr(registry, "VM_USER", "root")
    assert (await offered())[1].startswith("vm user: 'root' is root")
    monkeypatch.setattr(registry, "VM_USER", "nobody")
    assert await offered() == (
        None,
        "guest kernel: none was fetched, and microVMs boot one: inn kernel fetch",
    )
    brought = tmp_path / "linux-image.deb"
    brought.write_text("damaged")
    monkeypatch.setattr(registry.shipped, "ready_kernel", lambda: brought)
    assert (await offered())[1].startswith(f"guest kernel: {brought} is no Debian package")
    monkeypatch.setattr(registry.shipped, "ready_kernel", lambda: None)
    kernel = tmp_path / "host" / "kernels" / "linux-image-1_1"
    (kernel / "modules").mkdir(parents=True)
    (kernel / "kernel.json").write_text('{"package": "linux-image-1", "version": "1"}')
    isolation, _ = await offered()
    # Not the level of a microVM to those who decide (core/isolation.py): the accelerator is told.
    assert isolation == Isolation("microvm", "qemu", "tcg", "no KVM: it emulates", accelerator="tcg")


def test_what_machines_boot_is_known_to_whoever_removes_kernels() -> None:
    boot = BootFiles(Path("/k"), Path("/i"), "identity", Path("/a"))
    found = DriverRegistry(Registered(Scripted("gvisor")), Registered(Scripted("qemu"), boot=boot))  # type: ignore[arg-type]
    assert found.booted == {"identity"}
