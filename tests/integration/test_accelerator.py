"""The boot that decides what runs microVMs, on the real QEMU: by translation, which works everywhere, and with what cannot come up."""

import os
from pathlib import Path

import pytest
from tests.integration.booted_vm import NEEDS_QEMU, PATIENCE_SECONDS, boot_files

from innkeeper.host.drivers.accelerator import QEMU, tsc_khz, why_not
from innkeeper.host.drivers.qemu_command import Accelerator
from innkeeper.host.probes.virtual_machines import boot_by_kvm, locate_qemu

pytestmark = [pytest.mark.anyio, NEEDS_QEMU]
RATE = tsc_khz(Path("/proc/cpuinfo").read_text())


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def boot(
    initramfs: Path, directory: Path, *, kernel: Path | None = None, seconds: float = PATIENCE_SECONDS
) -> str | None:
    found = await why_not(
        QEMU,
        Accelerator.TCG,
        kernel=kernel or boot_files().kernel,
        initramfs=initramfs,
        directory=directory,
        tsc_khz=RATE,
        seconds=seconds,
    )
    assert not [name for name in os.listdir(directory) if name.startswith(".")]  # noqa: PTH208
    return found


async def test_a_guest_whose_first_program_runs_has_come_up(tmp_path: Path) -> None:
    assert await boot(boot_files().initramfs, tmp_path) is None


async def test_one_that_is_too_slow_has_not(tmp_path: Path) -> None:
    # No kernel is that fast.
    assert await boot(boot_files().initramfs, tmp_path, seconds=0.05) == "a guest did not come up within 0.05 s"


@pytest.mark.long
async def test_a_kernel_without_a_first_program_has_not(tmp_path: Path) -> None:
    empty = tmp_path / "initramfs"
    empty.write_bytes(bytes(512))
    assert await boot(empty, tmp_path) == "a guest's kernel did not come up"


async def test_what_qemu_says_is_the_reason(tmp_path: Path) -> None:
    said = await boot(boot_files().initramfs, tmp_path, kernel=tmp_path / "no-kernel")
    assert said is not None
    assert "no-kernel" in said


async def test_without_a_kernel_nothing_is_tried_and_nothing_made(tmp_path: Path) -> None:
    assert locate_qemu() is not None
    assert await boot_by_kvm(None, tmp_path, Path("/bin/true")) is None  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []  # noqa: PTH208
