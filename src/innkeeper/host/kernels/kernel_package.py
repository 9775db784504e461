"""Debian's kernel for virtual machines, as apt has it: fetched and unpacked into a folder. Nothing is installed, and nothing of it runs on the host."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from innkeeper.host.disks.image_build import build_environment
from innkeeper.host.kernels.initramfs import COMPRESSION
from innkeeper.host.kernels.modules import ModuleMissingError, load_order, module_name, offered, read_module
from innkeeper.host.linux import command

# Debian's names of the processors that microVMs run on.
ARCHITECTURES: Mapping[str, str] = {"x86_64": "amd64"}
FETCH_SECONDS = 600.0
UNPACK_SECONDS = 120.0
RECORD = "kernel.json"
IMAGE = "vmlinuz"
MODULES = "modules"
OFFERED = "offered"
_DEPENDS = re.compile(r"^\s*Depends: (linux-image-\S+)$", re.MULTILINE)
_CANDIDATE = re.compile(r"^\s*Candidate: (\d\S*)$", re.MULTILINE)
# As `dpkg-deb --show` prints a package's own fields; both become part of a folder's name.
_FIELDS = "${Package} ${Version} ${Architecture}\n"
_SHOWN = re.compile(r"(linux-image-[a-z0-9.+-]+) (\d[A-Za-z0-9.+:~-]*) (\S+)\n")


class KernelUnavailableError(RuntimeError):
    """There is no kernel for microVMs and none can be fetched; the message says why, and what to do."""

    code = "kernel_unavailable"


@dataclass(frozen=True, slots=True)
class KernelPackage:
    """A package with a kernel: `linux-image-6.1.0-56-cloud-amd64`, `6.1.192-2`."""

    package: str
    version: str

    @property
    def release(self) -> str:
        """What `uname -r` says in the guest."""
        return self.package.removeprefix("linux-image-").removesuffix("-unsigned")


async def newest_package() -> KernelPackage:
    """The package that apt would install now. Raises KernelUnavailableError."""
    every = f"linux-image-cloud-{_architecture()}"
    try:
        depends = await command.run(["apt-cache", "depends", "--important", every], timeout_seconds=UNPACK_SECONDS)
        package = _DEPENDS.search(depends.stdout.decode())
        policy = depends
        if package is not None:
            policy = await command.run(["apt-cache", "policy", package[1]], timeout_seconds=UNPACK_SECONDS)
    except command.CommandFailed as error:
        raise KernelUnavailableError(
            f"apt does not say which {every} there is ({error}); run: apt-get update"
        ) from error
    version = _CANDIDATE.search(policy.stdout.decode())
    if package is None or version is None:
        raise KernelUnavailableError(f"apt knows no package {every}; run: apt-get update")
    return KernelPackage(package[1], version[1])


async def package_in(file: Path) -> KernelPackage:
    """Which kernel a package's file holds. Raises KernelUnavailableError where it holds none, or one for another processor."""
    try:
        shown = await command.run(
            ["dpkg-deb", "--show", f"--showformat={_FIELDS}", "--", str(file)], timeout_seconds=UNPACK_SECONDS
        )
    except command.CommandFailed as error:
        raise KernelUnavailableError(f"{file} is no Debian package: {error}") from error
    found = _SHOWN.fullmatch(shown.stdout.decode(errors="replace"))
    if found is None:
        raise KernelUnavailableError(f"{file} is no package of a kernel")
    if found[3] != _architecture():
        raise KernelUnavailableError(f"{file} is for {found[3]}, this machine is {_architecture()}")
    return KernelPackage(found[1], found[2])


def _architecture() -> str:
    """Debian's name of this machine's processor. Raises KernelUnavailableError."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise KernelUnavailableError(f"microVMs run on {' and '.join(ARCHITECTURES)} alone, and this is {machine}")
    return ARCHITECTURES[machine]


async def download(wanted: KernelPackage, workspace: Path) -> Path:
    """The package's file, fetched into the empty `workspace`. apt has checked the signature. Raises KernelUnavailableError."""
    # apt downloads as a user of its own, who may not write here.
    fetch = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", f"{wanted.package}={wanted.version}"]
    try:
        await command.run(fetch, cwd=workspace, env=build_environment(os.environ), timeout_seconds=FETCH_SECONDS)
        return await asyncio.to_thread(_only_package, workspace)
    except (command.CommandFailed, ValueError) as error:
        raise KernelUnavailableError(f"{wanted.package} {wanted.version} cannot be fetched: {error}") from error


async def unpack(wanted: KernelPackage, file: Path, folder: Path, workspace: Path) -> None:
    """Put the package's image, its modules in their order and a record of them into the new `folder`.

    Nothing is left but that and what is in `workspace`. Raises KernelUnavailableError, OSError.
    """
    tree = workspace / "tree"
    try:
        await command.run(["dpkg-deb", "--extract", str(file), str(tree)], timeout_seconds=UNPACK_SECONDS)
        modules = await asyncio.to_thread(_modules_folder, tree, wanted.release)
        # The package comes without the list of what needs what: that is made where it is installed.
        await command.run(["depmod", "--basedir", str(tree), wanted.release], timeout_seconds=UNPACK_SECONDS)
        await asyncio.to_thread(_keep, wanted, tree / "boot", modules, folder)
    except (command.CommandFailed, ModuleMissingError, ValueError, FileNotFoundError) as error:
        raise KernelUnavailableError(f"{wanted.package} {wanted.version}: {error}") from error


def _only_package(workspace: Path) -> Path:
    (package,) = workspace.glob("*.deb")
    return package


def _keep(wanted: KernelPackage, boot: Path, modules: Path, folder: Path) -> None:
    """Put what is used of a package into the new folder, the record last."""
    order = load_order((modules / "modules.dep").read_text(), (modules / "modules.builtin").read_text())
    folder.mkdir(mode=0o700)
    (boot / f"vmlinuz-{wanted.release}").rename(folder / IMAGE)
    (folder / MODULES).mkdir()
    for number, path in enumerate(order):
        (folder / MODULES / f"{number:02}-{module_name(path)}.ko").write_bytes(read_module(modules / path))
    lists = ("modules.dep", "modules.builtin", "modules.alias", "modules.devname")
    files, descriptions = offered(*((modules / name).read_text() for name in lists))
    (folder / OFFERED).mkdir()
    for path in files:
        # Each by itself: a guest unpacks what it loads.
        packed = gzip.compress(read_module(modules / path), COMPRESSION, mtime=0)
        (folder / OFFERED / f"{module_name(path)}.ko.gz").write_bytes(packed)
    for name, text in descriptions.items():
        (folder / OFFERED / name).write_text(text)
    (folder / RECORD).write_text(json.dumps(asdict(wanted)))


def _modules_folder(tree: Path, release: str) -> Path:
    """Where the package has its modules. Found under both names afterwards, as depmod knows only one of them, which one depends on its own release."""
    old, new = tree / "lib" / "modules", tree / "usr" / "lib" / "modules"
    there, missing = (old, new) if old.exists() else (new, old)
    if not missing.exists():
        missing.parent.mkdir(parents=True, exist_ok=True)
        missing.symlink_to(there.resolve())
    return there / release
