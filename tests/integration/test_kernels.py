"""Kernels from apt and from files: what is fetched, that nothing stays of what could not be, and the commands that do it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from innkeeper.host.kernels import kernel_store
from innkeeper.host.kernels.kernel_package import (
    ARCHITECTURES,
    IMAGE,
    MODULES,
    OFFERED,
    RECORD,
    KernelPackage,
    KernelUnavailableError,
    download,
    newest_package,
)
from innkeeper.host.kernels.kernel_store import KernelStore

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(shutil.which("depmod") is None, reason="needs kmod")]
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def inn(home: Path, *argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("inn"), "kernel", *argv, "--home", home],
        env={"PATH": os.environ["PATH"], "INNKEEPER_CONFIG": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


def package(folder: Path, name: str, version: str, *, architecture: str = "") -> Path:
    """A package without files."""
    tree = folder / f"{name}.tree"
    (tree / "DEBIAN").mkdir(parents=True)
    architecture = architecture or ARCHITECTURES[platform.machine()]
    (tree / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: {version}\nArchitecture: {architecture}\nMaintainer: nobody\nDescription: nothing\n"
    )
    made = folder / f"{name}.deb"
    subprocess.run(["dpkg-deb", "--build", tree, made], check=True, capture_output=True, timeout=60)
    return made


def add(store: KernelStore, number: int) -> str:
    """A kernel as `fetch` leaves it; its name."""
    made = KernelPackage(f"linux-image-6.1.0-{number}-cloud-amd64", f"6.1.{number}-1")
    folder = store.directory / f"{made.package}_{made.version}"
    (folder / MODULES).mkdir(parents=True)
    (folder / OFFERED).mkdir()
    (folder / OFFERED / "modules.dep").touch()
    (folder / IMAGE).write_bytes(b"kernel")
    (folder / RECORD).write_text(json.dumps({"package": made.package, "version": made.version}))
    os.utime(folder / RECORD, (number, number))
    return folder.name


async def test_a_package_that_apt_has_not_got(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def newest() -> KernelPackage:
        return KernelPackage("linux-image-0.0.0-0-cloud-amd64", "0-1")

    monkeypatch.setattr(kernel_store, "newest_package", newest)
    store = KernelStore(tmp_path)
    with pytest.raises(KernelUnavailableError, match="linux-image-0"):
        await store.fetch(progress=print)
    assert list(store.directory.iterdir()) == []


@NEEDS_ROOT
async def test_a_file_that_is_no_kernel_for_this_machine_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "text.deb").write_text("no package")
    kernel = "linux-image-6.1.0-9-cloud-none"
    for file, why in (
        (tmp_path / "text.deb", "text.deb is no Debian package"),
        (tmp_path / "missing.deb", "missing.deb is no Debian package"),
        (package(tmp_path, "hello", "1.0"), "hello.deb is no package of a kernel"),
        (package(tmp_path, kernel, "6.1-1", architecture="s390x"), f"{kernel}.deb is for s390x"),
    ):
        ended = inn(tmp_path / "home", "fetch", file)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert why in ended.stderr
    assert not (tmp_path / "home").exists()
    ended = inn(tmp_path / "home", "fetch", package(tmp_path, "linux-image-6.1.0-9-cloud", "6.1-1"))
    assert ended.returncode == 1
    assert list((tmp_path / "home/host/kernels").iterdir()) == []


@NEEDS_ROOT
async def test_kernels_are_listed_chosen_and_removed(tmp_path: Path) -> None:
    listed = inn(tmp_path, "list")
    assert listed.stdout.splitlines() == ["NAME\tRELEASE\tSIZE\tFETCHED"]
    assert not (tmp_path / "host").exists()
    store = KernelStore(tmp_path / "host")
    names = [add(store, number) for number in (1, 2)]
    assert [one["name"] for one in json.loads(inn(tmp_path, "list", "--json").stdout)] == names
    # Asked for again, the older one is what new guests boot.
    again = inn(tmp_path, "fetch", package(tmp_path, "linux-image-6.1.0-1-cloud-amd64", "6.1.1-1"))
    assert again.stdout.split()[0] == names[0], again.stderr
    assert [kernel.name for kernel in store.kernels()] == names[::-1]
    assert "there is no kernel" in inn(tmp_path, "rm", "linux-image").stderr
    with (tmp_path / "host" / "lock").open("w") as lock:
        # As a server that runs.
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = inn(tmp_path, "rm", names[0])
        assert (refused.returncode, "the server runs" in refused.stderr) == (1, True)
        assert len(store.kernels()) == 2
    assert inn(tmp_path, "rm", names[0]).stdout.startswith(f"removed {names[0]}, ")
    assert [path.name for path in store.directory.iterdir()] == [names[1]]


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


@pytest.mark.long
@NEEDS_ROOT
async def test_a_package_that_was_brought_along_gives_the_same_kernel(tmp_path: Path) -> None:
    (tmp_path / "download").mkdir()
    file = await download(await newest_package(), tmp_path / "download")
    fetched = await KernelStore(tmp_path / "apt").fetch(progress=print)
    ended = inn(tmp_path / "home", "fetch", file)
    assert ended.returncode == 0, ended.stderr
    (brought,) = KernelStore(tmp_path / "home" / "host").kernels()
    assert brought.package == fetched.package
    # As a server's start does it, once.
    store = KernelStore(tmp_path / "server")
    at_start = await store.newest(brought=file)
    assert at_start is not None and at_start.image.read_bytes() == fetched.image.read_bytes()
    made = at_start.fetched_at
    again = await store.newest(brought=file)
    assert again is not None and again.fetched_at == made
    assert brought.image.read_bytes() == fetched.image.read_bytes()
    assert [path.name for path in brought.modules] == [path.name for path in fetched.modules]
