"""Machines of the driver qemu as a daemon starts them: the first of a kind makes a template, which the others and the next daemon's are clones of."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from tests.integration.booted_vm import NEEDS_QEMU, boot_files
from tests.integration.daemon_fixture import Host, running_host

from innkeeper.core import host_verbs as verbs
from innkeeper.core.host_verbs import MachineShape

pytestmark = [pytest.mark.anyio, NEEDS_QEMU, pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="no taps")]
SECONDS = 180.0
# Page by page, so that it takes no longer than the pages do.
FILL = (
    "memory = bytearray(int(open('/proc/meminfo').read().split('MemAvailable:')[1].split()[0]) * 7 // 8 << 10);"
    "memory[::4096] = bytes(len(memory[::4096])); print('filled')"
)


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Path]:
    """A state directory with the kernel of microVMs."""
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "kernels").symlink_to(boot_files().kernel.parents[1])
    return tmp_path


def shape_of(host: Host) -> MachineShape:
    return host.shape(driver="qemu", memory_mb=512, disk_mb=1024)


async def start(host: Host, instance_id: UUID | None = None) -> UUID:
    """A ready machine. On a busy host that takes two boots' time, for the template's and for its own."""
    instance_id = instance_id or uuid4()
    host.instances.add(instance_id)
    await host.request(verbs.EnsureMachine(instance_id, shape_of(host), "guest"), timeout_seconds=2 * SECONDS)
    return instance_id


def is_clone(host: Host, instance_id: UUID) -> bool:
    """Whether its QEMU has the memory of a template."""
    pid = (host.machine(instance_id).state_dir / "vm.pid").read_text()
    return any(str(path.readlink()).startswith("/memfd:") for path in Path("/proc", pid, "fd").iterdir())


def templates(host: Host) -> list[Path]:
    return list((host.settings.host_dir / "pool" / "machine-templates").iterdir())


async def test_new_machines_are_clones_and_those_on_their_own_disk_boot(home: Path) -> None:
    # What fails is told by the daemon that takes everything away.
    async with running_host(home, keep_running=True, freeze_after_seconds=3_600) as host:
        first = await start(host)
        made = [path.stat().st_ino for path in templates(host)]
        cloned = is_clone(host, first)
        said = await host.run(first, "hostname; id -un; echo kept > ~/note; sync", timeout_seconds=SECONDS)
        status = await host.status()
    async with running_host(home) as host:
        assert (cloned, len(made)) == (True, 1)
        assert said.text == "guest\nuser\n"
        assert (status["leaks"], status["machines"]) == ([], 1)
        # Beside the guest's own 512: what the template may come to have.
        assert status["memory_committed_mb"] == 1024
        host.instances.add(first)
        assert (await host.ok(first, "cat ~/note", timeout_seconds=SECONDS)).text == "kept\n"
        second = await start(host)
        assert is_clone(host, second)
        assert [path.stat().st_ino for path in templates(host)] == made
        assert (await host.run(second, "cat ~/note", timeout_seconds=SECONDS)).exit_code != 0
        # All that it has, in which the template had nothing.
        filled = await host.run(second, f"python3 -c {FILL!r}", timeout_seconds=SECONDS)
        assert (filled.exit_code, filled.text) == (0, "filled\n")
        await host.destroy(second)
        await host.destroy(first, keep_disk=True)
        await start(host, first)
        assert not is_clone(host, first)
        assert (await host.ok(first, "cat ~/note", timeout_seconds=SECONDS)).text == "kept\n"
        found = (await host.request(verbs.CollectGarbage(True, (host.image.digest,))))["items"]
        assert [item["kind"] for item in found if item["kind"] == "template"] == []
        await host.destroy(first)


@pytest.mark.long
async def test_a_guest_boots_where_its_template_cannot_be_used(home: Path) -> None:
    async with running_host(home) as host:
        (host.settings.host_dir / "pool" / "machine-templates").rmdir()
        (host.settings.host_dir / "pool" / "machine-templates").touch()
        try:
            instance_id = await start(host)
            assert not is_clone(host, instance_id)
            assert (await host.ok(instance_id, "echo here", timeout_seconds=SECONDS)).text == "here\n"
        finally:
            (host.settings.host_dir / "pool" / "machine-templates").unlink()
            (host.settings.host_dir / "pool" / "machine-templates").mkdir()
        await host.destroy(instance_id)
