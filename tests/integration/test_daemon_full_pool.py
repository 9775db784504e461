"""A microVM whose disk finds no room in the host's pool: it stands still, goes on when there is room again, and loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest
from tests import leaks
from tests.integration.booted_vm import NEEDS_QEMU, boot_files
from tests.integration.daemon_fixture import START_SECONDS, eventually, running_host

from innkeeper.core import host_verbs as verbs
from innkeeper.host import standstills
from innkeeper.host.drivers.contract import standing_still

pytestmark = [pytest.mark.anyio, NEEDS_QEMU, pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="no taps")]
WRITTEN_MIB = 64
WRITE = f"head -c {WRITTEN_MIB}M /dev/urandom > large && sync large && sha256sum < large > sum; echo $?"


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Path]:
    """A state directory with the kernel of microVMs."""
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "kernels").symlink_to(boot_files().kernel.parents[1])
    yield tmp_path
    assert leaks.wait_for_none(tmp_path) == []


async def test_a_guest_without_room_waits_for_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standstills, "POLL_SECONDS", 0.2)
    async with running_host(home, pool_disk_mb=2_048, disk_reserve_mb=0) as host:
        if not (host.settings.host_dir / "pool.xfs").exists():
            pytest.skip("disks lie on the host's own file system, which is not to be filled")
        guest = uuid4()
        host.instances.add(guest)
        shape = host.shape(driver="qemu", memory_mb=256, disk_mb=1024)
        await host.request(verbs.EnsureMachine(guest, shape, "guest"), timeout_seconds=START_SECONDS)
        machine = host.machine(guest)
        driver = standing_still(machine.driver)
        assert not await driver.stands_still(machine.id)
        filler = host.settings.host_dir / "pool" / "somebody-elses"
        room = os.statvfs(filler.parent)
        # Enough for a command to begin, and too little for what this one writes.
        taken = room.f_bavail * room.f_frsize - (standstills.ROOM_BYTES + (WRITTEN_MIB << 20)) // 2
        with filler.open("wb") as large:
            os.posix_fallocate(large.fileno(), 0, taken)
        writing = asyncio.create_task(host.run(guest, WRITE, timeout_seconds=START_SECONDS))
        try:
            # What is left goes as well: there is less than it takes to go on.
            await eventually(lambda: driver.stands_still(machine.id), seconds=START_SECONDS)
            await asyncio.sleep(3 * standstills.POLL_SECONDS)
            assert await driver.stands_still(machine.id)
            assert not writing.done()
            filler.unlink()
            assert (await writing).text == "0\n"
        finally:
            writing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writing
        said = await host.run(
            guest, "sha256sum < large | diff - sum && echo same; dmesg | grep -ci error", timeout_seconds=START_SECONDS
        )
        assert said.text.startswith("same\n"), said.text
        await host.destroy(guest)
