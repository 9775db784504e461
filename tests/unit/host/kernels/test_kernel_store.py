"""What is kept of kernels: initramfs by their content, nothing half made, nothing that nobody needs."""

# ruff: noqa: ASYNC240  # a test has nobody to keep waiting

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from innkeeper.host import temporary
from innkeeper.host.kernels import kernel_store
from innkeeper.host.kernels.kernel_package import IMAGE, MODULES, OFFERED, RECORD, KernelPackage
from innkeeper.host.kernels.kernel_store import Kernel, KernelStore

pytestmark = pytest.mark.anyio


@pytest.fixture
def store(tmp_path: Path) -> KernelStore:
    return KernelStore(tmp_path)


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    path = tmp_path / "inn-agent"
    path.write_bytes(b"agent 1")
    return path


def add(store: KernelStore, number: int) -> Kernel:
    """A kernel as `fetch` leaves it."""
    package = KernelPackage(f"linux-image-6.1.0-{number}-cloud-amd64", f"6.1.{number}-1")
    folder = store.directory / f"{package.package}_{package.version}"
    (folder / MODULES).mkdir(parents=True)
    (folder / OFFERED).mkdir()
    (folder / OFFERED / "modules.dep").touch()
    (folder / IMAGE).write_bytes(b"kernel")
    (folder / MODULES / "00-virtio.ko").write_bytes(b"module")
    (folder / RECORD).write_text(json.dumps({"package": package.package, "version": package.version}))
    os.utime(folder / RECORD, (number, number))
    return Kernel(package, folder)


async def test_an_initramfs_is_made_once_and_for_its_parts(store: KernelStore, agent: Path) -> None:
    kernel = add(store, 1)
    assert store.kernels() == [kernel]
    assert kernel.package.release == "6.1.0-1-cloud-amd64"
    first = await store.boot_files(kernel, agent)
    made = first.initramfs.stat()
    assert b"agent 1" in gzip.decompress(first.initramfs.read_bytes())
    assert b"modules/00-virtio.ko" in gzip.decompress(first.initramfs.read_bytes())
    assert await store.boot_files(kernel, agent) == first
    # Not all of it: it was read meanwhile, which moves the time of that.
    again = first.initramfs.stat()
    assert (again.st_ino, again.st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    agent.write_bytes(b"agent 2")
    second = await store.boot_files(kernel, agent)
    assert second.identity != first.identity
    assert (await store.boot_files(add(store, 2), agent)).identity not in (first.identity, second.identity)


async def test_a_kill_while_one_is_made_leaves_nothing_that_counts(
    store: KernelStore, agent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = add(store, 1)

    def die(path: Path) -> None:
        raise KeyboardInterrupt(path)

    with monkeypatch.context() as patch:
        patch.setattr(kernel_store, "sync", die)
        with pytest.raises(KeyboardInterrupt):
            kernel_store._boot_files(kernel, agent)
    assert [path.name.rpartition(".")[2] for path in kernel.directory.glob("initramfs-*")] == ["new"]
    assert temporary.abandoned(store.directory.parent) == list(kernel.directory.glob("*.new"))
    assert (await store.boot_files(kernel, agent)).initramfs.exists()


async def test_what_is_not_in_use_is_collected_but_for_the_newest_kernel(store: KernelStore, agent: Path) -> None:
    oldest, older, newest = (add(store, number) for number in (1, 2, 3))
    used = await store.boot_files(older, agent)
    unused = [await store.boot_files(kernel, agent) for kernel in (oldest, newest)]
    doomed = store.doomed(frozenset({used.identity}))
    assert doomed == [oldest.directory, unused[1].initramfs]
    for path in (*doomed, *doomed):
        store.drop(path)
    assert store.doomed(frozenset({used.identity})) == []
    assert store.kernels() == [older, newest]
    assert used.initramfs.exists()
    assert not any(files.initramfs.exists() for files in unused)
    assert newest.image.exists()
    assert store.doomed(frozenset()) == [older.directory]
    # Other servers boot what is shared with them.
    link = store.directory.parent / "sharing" / "kernels"
    link.parent.mkdir()
    link.symlink_to(store.directory)
    assert KernelStore(link.parent).kernels() and KernelStore(link.parent).doomed(frozenset()) == []
    link.unlink()
    link.mkdir()
    for kernel in (older, newest):
        (link / kernel.name).symlink_to(kernel.directory)
    assert len(KernelStore(link.parent).kernels()) == 2 and KernelStore(link.parent).doomed(frozenset()) == []


def test_a_folder_without_a_record_is_no_kernel(store: KernelStore) -> None:
    kernel = add(store, 1)
    (kernel.directory / RECORD).write_text("{")
    (store.directory / ".fetch-x").mkdir()
    assert store.kernels() == []
