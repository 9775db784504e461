"""The kernels of one server, each with the initramfs for its agent: made once, found again by what is in them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from innkeeper.host.kernels.initramfs import LAYOUT, initramfs
from innkeeper.host.kernels.kernel_package import (
    IMAGE,
    MODULES,
    OFFERED,
    RECORD,
    KernelPackage,
    download,
    newest_package,
    package_in,
    unpack,
)
from innkeeper.host.linux.durable import sync, sync_tree
from innkeeper.host.linux.hold import held_folder

log = structlog.stdlib.get_logger(__name__)

WORKSPACE = ".fetch-"
_PREFIX, _SUFFIX = "initramfs-", ".gz"
_FOLDER = "{package}_{version}"


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel: `image` is what QEMU loads, `modules` what the initramfs is made with, in the order of their names."""

    package: KernelPackage
    directory: Path

    @property
    def name(self) -> str:
        """What it is known by among the kernels of a server."""
        return self.directory.name

    @property
    def size_bytes(self) -> int:
        """What it and its initramfs take."""
        return sum(path.stat().st_size for path in self.directory.rglob("*") if path.is_file())

    @property
    def fetched_at(self) -> float:
        """When it was last asked for, in seconds since 1970."""
        return (self.directory / RECORD).stat().st_mtime

    @property
    def image(self) -> Path:
        """A bzImage."""
        return self.directory / IMAGE

    @property
    def offered(self) -> list[Path]:
        """What a guest may load later, and what describes it; nothing of a kernel that was fetched by a version of the server that kept none."""
        return sorted((self.directory / OFFERED).glob("*"))

    @property
    def modules(self) -> list[Path]:
        """`NN-name.ko`, uncompressed."""
        return sorted((self.directory / MODULES).glob("*.ko"))


@dataclass(frozen=True, slots=True)
class BootFiles:
    """What a microVM is started with. `identity` stands for the content of both: a memory image of a guest fits no others.

    `agent` is the program in the initramfs, which starts QEMU on the host, too.
    """

    kernel: Path
    initramfs: Path
    identity: str
    agent: Path


class KernelStore:
    """Kernels below `<host_dir>/kernels`. Holds no state of its own, so servers and tests may share one."""

    def __init__(self, host_dir: Path) -> None:
        self.directory = host_dir / "kernels"

    def kernels(self) -> list[Kernel]:
        """Every kernel that is here, the one that was fetched last at the end."""
        found = []
        for record in self.directory.glob(f"*/{RECORD}"):
            try:
                found.append(
                    (record.stat().st_mtime_ns, Kernel(KernelPackage(**json.loads(record.read_text())), record.parent))
                )
            except (OSError, ValueError, TypeError):
                # Removed meanwhile. It is written before its folder has this name, so there is no half of one.
                continue
        return [kernel for _, kernel in sorted(found, key=lambda item: item[0])]

    async def fetch(self, *, progress: Callable[[str], None], file: Path | None = None) -> Kernel:
        """The newest kernel that apt knows (27 MB), or the one in a package's `file`: made unless it is here, and from now on the newest of this store.

        Raises KernelUnavailableError, OSError.
        """
        wanted = await (newest_package() if file is None else package_in(file))
        target = self.directory / _FOLDER.format(package=wanted.package, version=wanted.version.replace(":", "%3a"))
        if (target / OFFERED).exists():
            await asyncio.to_thread(os.utime, target / RECORD)
            return Kernel(wanted, target)
        source = "apt" if file is None else file
        progress(f"kernel for microVMs: {wanted.package} {wanted.version}, from {source}")
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with held_folder(self.directory, WORKSPACE) as workspace:
            fresh = workspace / "kernel"
            await unpack(wanted, file or await download(wanted, workspace), fresh, workspace)
            await asyncio.to_thread(sync_tree, fresh)
            try:
                fresh.rename(target)
            except OSError:
                if not target.exists():
                    raise
                with contextlib.suppress(OSError):
                    # An earlier version was here, which kept less; or somebody else was faster.
                    (fresh / OFFERED).rename(target / OFFERED)
                os.utime(target / RECORD)
            sync(self.directory)
        return Kernel(wanted, target)

    async def newest(self, *, brought: Path | None) -> Kernel | None:
        """What new guests boot: the kernel that was fetched last, or one made of the package that was `brought` along since, in two seconds.

        Raises KernelUnavailableError, OSError.
        """
        if brought is not None and self.is_older(brought):
            return await self.fetch(progress=log.info, file=brought)
        return next(reversed(self.kernels()), None)

    def is_older(self, brought: Path) -> bool:
        """Whether there is no kernel, or the last one was fetched before that package came here, or by a version that kept less of it. Raises OSError."""
        last = next(reversed(self.kernels()), None)
        # Its times of content are those of its own making, elsewhere.
        return last is None or not last.offered or last.fetched_at < brought.stat().st_ctime

    def remove(self, kernel: Kernel) -> int:
        """Remove a kernel and its initramfs; how many bytes that were. No server may be about to use it."""
        freed = kernel.size_bytes
        # First out of sight, and gone with the workspace: half of a kernel must not look like one, nor be in the way of the next that has its name.
        with held_folder(self.directory, WORKSPACE) as workspace:
            kernel.directory.rename(workspace / "removed")
        return freed

    async def boot_files(self, kernel: Kernel, agent: Path) -> BootFiles:
        """What a guest of that kernel is booted with, with this agent as its init; made where it is not here yet, in a second. Raises OSError."""
        return await asyncio.to_thread(_boot_files, kernel, agent)

    def doomed(self, in_use: frozenset[str]) -> list[Path]:
        """Folders of kernels and files of initramfs that no identity of `in_use` stands for, but for the newest kernel.

        None of what is reached by a link: that is shared with other servers, whose guests boot others.
        """
        if self.directory.is_symlink():
            return []
        kernels = self.kernels()
        folders = [
            kernel.directory
            for kernel in kernels[:-1]
            if not kernel.directory.is_symlink()
            and not any(_initramfs_of(kernel, identity).exists() for identity in in_use)
        ]
        every = sorted(self.directory.glob(f"*/{_PREFIX}*{_SUFFIX}"))
        files = [path for path in every if path.name.removeprefix(_PREFIX).removesuffix(_SUFFIX) not in in_use]
        return [
            *folders,
            *(path for path in files if path.parent not in folders and not path.parent.is_symlink()),
        ]

    def drop(self, path: Path) -> None:
        """Remove what `doomed` named; harmless when it is gone."""
        kernel = next((kernel for kernel in self.kernels() if kernel.directory == path), None)
        if kernel is not None:
            self.remove(kernel)
        elif path.parent.parent == self.directory:
            path.unlink(missing_ok=True)


def _initramfs_of(kernel: Kernel, identity: str) -> Path:
    return kernel.directory / f"{_PREFIX}{identity}{_SUFFIX}"


def _boot_files(kernel: Kernel, agent: Path) -> BootFiles:
    program = agent.read_bytes()
    digest = hashlib.sha256(program).hexdigest()
    names = [path.name for path in (*kernel.modules, *kernel.offered)]
    identity = hashlib.sha256(
        json.dumps([LAYOUT, kernel.package.package, kernel.package.version, names, digest]).encode()
    ).hexdigest()
    path = _initramfs_of(kernel, identity)
    if not path.exists():
        # The name without the number: the initramfs gives numbers itself.
        modules = [(module.stem.partition("-")[2], module.read_bytes()) for module in kernel.modules]
        fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
        fresh.write_bytes(initramfs(program, modules, [(file.name, file.read_bytes()) for file in kernel.offered]))
        sync(fresh)
        fresh.replace(path)
        sync(path.parent)
    return BootFiles(kernel.image, path, identity, agent)
