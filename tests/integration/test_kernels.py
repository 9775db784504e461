"""Kernels from apt: what is fetched, and that nothing stays of what could not be."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from innkeeper.host.kernels import kernel_store
from innkeeper.host.kernels.kernel_package import KernelPackage, KernelUnavailableError
from innkeeper.host.kernels.kernel_store import KernelStore

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(shutil.which("depmod") is None, reason="needs kmod")]


async def test_a_package_that_apt_has_not_got(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def newest() -> KernelPackage:
        return KernelPackage("linux-image-0.0.0-0-cloud-amd64", "0-1")

    monkeypatch.setattr(kernel_store, "newest_package", newest)
    store = KernelStore(tmp_path)
    with pytest.raises(KernelUnavailableError, match="linux-image-0"):
        await store.fetch(progress=print)
    assert list(store.directory.iterdir()) == []


@pytest.mark.long
async def test_the_newest_kernel_is_fetched_once(tmp_path: Path) -> None:
    store = KernelStore(tmp_path)
    said: list[str] = []
    kernel = await store.fetch(progress=said.append)
    assert store.kernels() == [kernel]
    assert kernel.image.stat().st_size > 1_000_000
    names = [path.stem.partition("-")[2] for path in kernel.modules]
    assert names.index("virtio_ring") < names.index("virtio") < names.index("virtio_blk")
    assert {"virtio_console", "overlay", "erofs"} <= set(names)
    assert [path.name for path in store.directory.iterdir()] == [kernel.directory.name]
    assert await store.fetch(progress=said.append) == kernel
    assert len(said) == 1
