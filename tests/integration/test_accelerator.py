"""The boot that decides what runs microVMs, on the real QEMU: by translation, which works everywhere, and with what cannot come up."""

import asyncio
import contextlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
from tests.integration.booted_vm import NEEDS_QEMU, PATIENCE_SECONDS, boot_files

from innkeeper.host.drivers.accelerator import QEMU, tsc_khz, why_not
from innkeeper.host.drivers.qemu_command import Accelerator
from innkeeper.host.probes.virtual_machines import boot_by_kvm, locate_qemu

pytestmark = [pytest.mark.anyio, NEEDS_QEMU]
NOBODY = 65_534
RATE = tsc_khz(Path("/proc/cpuinfo").read_text())


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def boot(directory: Path, *, seconds: float = PATIENCE_SECONDS, qemu: str = QEMU, **files: Path) -> str | None:
    found = await why_not(
        qemu,
        Accelerator.TCG,
        boot=replace(boot_files(), **files),  # type: ignore[arg-type]
        user=(NOBODY, NOBODY),
        directory=directory,
        tsc_khz=RATE,
        seconds=seconds,
    )
    assert not [name for name in os.listdir(directory) if name.startswith(".")]  # noqa: PTH208
    return found


async def test_a_guest_whose_first_program_runs_has_come_up(tmp_path: Path) -> None:
    assert await boot(tmp_path) is None


async def test_one_that_is_too_slow_has_not(tmp_path: Path) -> None:
    # No kernel is that fast.
    assert await boot(tmp_path, seconds=0.05) == "a guest did not come up within 0.05 s"


@pytest.mark.long
async def test_a_kernel_without_a_first_program_has_not(tmp_path: Path) -> None:
    empty = tmp_path / "initramfs"
    empty.write_bytes(bytes(512))
    assert await boot(tmp_path, initramfs=empty) == "a guest's kernel did not come up"


async def test_what_qemu_says_is_the_reason(tmp_path: Path) -> None:
    said = await boot(tmp_path, kernel=tmp_path / "no-kernel")
    assert said is not None
    assert "no-kernel" in said


async def test_without_a_qemu_there_is_a_reason(tmp_path: Path) -> None:
    assert await boot(tmp_path, qemu="no-such-qemu") == "no-such-qemu is not installed"


async def test_it_runs_in_a_jail_and_ends_with_whoever_asked(tmp_path: Path) -> None:
    asked = asyncio.ensure_future(boot(tmp_path))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (found := probing_qemus(tmp_path)):
            assert not asked.done()
            await asyncio.sleep(0.01)
    assert_jailed(found[0], tmp_path)
    asked.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asked
    assert not probing_qemus(tmp_path)
    assert not list(tmp_path.iterdir())  # noqa: ASYNC240


def assert_jailed(pid: int, folder: Path) -> None:
    process, ours = Path("/proc", str(pid)), Path("/proc/self")
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
    assert (status["Uid"], status["CapEff"], status["NoNewPrivs"]) == ("\t".join([str(NOBODY)] * 4), "0" * 16, "1")
    for name in ("net", "mnt", "pid", "ipc", "uts"):
        assert (process / "ns" / name).readlink() != (ours / "ns" / name).readlink(), name
    assert not Path(f"{process}/root{folder}").exists()


def probing_qemus(directory: Path) -> list[int]:
    """QEMUs that run, not what starts them, whose jail's root is below a directory."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if (process / "exe").readlink().name == QEMU and str(directory) in (process / "mountinfo").read_text():
                found.append(int(process.name))
    return found


async def test_without_a_kernel_nothing_is_tried_and_nothing_made(tmp_path: Path) -> None:
    assert locate_qemu() is not None
    assert await boot_by_kvm(None, tmp_path, Path("/bin/true")) is None  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []  # noqa: PTH208
