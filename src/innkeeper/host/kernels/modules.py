"""Which modules a microVM's kernel is given, and in which order. Pure, but for the unpacking of one that is compressed."""

from __future__ import annotations

import lzma
from pathlib import Path, PurePosixPath

# What finds devices, in the order in which a failing boot can still be told of; then what the root is made of.
WANTED = (
    "virtio_mmio",
    "virtio_console",
    "virtio_blk",
    "virtio_rng",
    "virtio_net",
    "virtio_scsi",
    "sd_mod",
    "overlay",
    "erofs",
    "ext4",
)


class ModuleMissingError(LookupError):
    """The kernel has a module neither as a file nor built in."""


def load_order(dependencies: str, built_in: str, wanted: tuple[str, ...] = WANTED) -> list[str]:
    """The files to load, each behind those that it needs, as paths below the folder of `modules.dep`, which is `dependencies`.

    `built_in` is modules.builtin. Raises ModuleMissingError.
    """
    needs = {
        path: rest.split() for path, _, rest in (line.partition(":") for line in dependencies.splitlines() if line)
    }
    files = {module_name(path): path for path in needs}
    without_file = {module_name(path) for path in built_in.split()}
    order: dict[str, None] = {}

    def take(path: str) -> None:
        # depmod lists all that a module needs, the nearest first.
        for needed in reversed(needs.get(path, [])):
            order.setdefault(needed)
        order.setdefault(path)

    for name in wanted:
        if name in files:
            take(files[name])
        elif name not in without_file:
            raise ModuleMissingError(name)
    return list(order)


def module_name(path: str) -> str:
    """What the kernel calls the module of that file: `virtio_rng` of `kernel/…/virtio-rng.ko.xz`."""
    return PurePosixPath(path).name.partition(".")[0].replace("-", "_")


def read_module(path: Path) -> bytes:
    """The module, uncompressed, byte for byte: a stripped one has lost its signature. Raises OSError, ValueError."""
    content = path.read_bytes()
    if path.name.endswith(".ko"):
        return content
    if path.name.endswith(".ko.xz"):
        try:
            return lzma.decompress(content)
        except lzma.LZMAError as error:
            raise ValueError(f"{path}: {error}") from error
    raise ValueError(f"{path}: a module that is compressed in a way that is not known")
