"""What takes the space of the daemon's directory: every file of it, by what it is of; blocks that files share told apart."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from innkeeper.errors import InnkeeperError
from innkeeper.host.directories import Directories
from innkeeper.host.disks.disk_pool import DiskPool
from innkeeper.host.linux.extents import own_bytes, shared_bytes

BLOCK_BYTES = 512
# By the first folder below the daemon's directory, and below the pool. What comes to be beside them is `other`.
OF_HOST = {
    "images": "image",
    "instances": "journals",
    "changes": "journals",
    "instance-logs": "journals",
    "kernels": "kernel",
    "agent": "agent",
    "log": "log",
    "trash": "trash",
    "machines": "runtime",
    "microvms": "runtime",
    "runsc": "runtime",
    "usage": "runtime",
}
OF_POOL = {
    "disks": "disk",
    "checkpoints": "checkpoint",
    "suspended": "suspended",
    "volumes": "volume",
    "steps": "build_cache",
    "templates": "template",
    "machine-templates": "template",
}


@dataclass(slots=True)
class DiskUse:
    """What one thing takes. `size_bytes` has blocks that it shares with others in it, `own_bytes` has not.

    `kind` is a value of OF_HOST or OF_POOL, `other`, `shared` (blocks that things of the pool share, counted once) or `pool` (what the pool's file takes
    beyond what is in it). `id` is an instance's, a checkpoint's, a volume's or an image's digest; None for what is of none.
    """

    kind: str
    id: str | None
    size_bytes: int = 0
    own_bytes: int = 0


def measure(directories: Directories, pool: DiskPool) -> list[DiskUse]:
    """All of it, in a thread. The `own_bytes` of all together are what the directory takes on its file system. Raises OSError."""
    host = directories.host
    found: dict[tuple[str, str | None], DiskUse] = {}

    def row(kind: str, of: str | None) -> DiskUse:
        return found.setdefault((kind, of), DiskUse(kind, of))

    elsewhere = {pool.directory, directories.mounts.parent, pool.backing or pool.directory}
    for path, status in _below(host, skip=frozenset(elsewhere)):
        top, *rest = path.relative_to(host).parts or ("",)
        kind = OF_HOST.get(top, "other")
        of = rest[0] if rest else None
        use = row(kind, of.partition(".")[0] or None if of and kind in ("image", "journals") else None)
        use.size_bytes += status.st_blocks * BLOCK_BYTES
        use.own_bytes += status.st_blocks * BLOCK_BYTES
    own = own_of_folders = 0
    files = []
    owners = _owners(directories)
    for path, status in _below(pool.directory):
        top, *rest = path.relative_to(pool.directory).parts or ("",)
        kind = OF_POOL.get(top, "other")
        of = rest[0].removesuffix(".img") if rest else None
        use = row(kind, owners.get(of or "") if kind == "disk" else of if kind in _NAMED else None)
        taken = status.st_blocks * BLOCK_BYTES
        use.size_bytes += taken
        if stat.S_ISREG(status.st_mode):
            files.append(path)
            taken = _own(path, taken)
            own += taken
        else:
            own_of_folders += taken
        use.own_bytes += taken
    together = shared_bytes(files)
    row("shared", None).own_bytes = max(0, together - own)
    if pool.backing is not None:
        # Its file system's own, and what was deleted and is not given back yet.
        behind = pool.backing.stat().st_blocks * BLOCK_BYTES
        row("pool", None).own_bytes = max(0, behind - together - own_of_folders)
    for one in (row("shared", None), row("pool", None)):
        one.size_bytes = one.own_bytes
    return [one for one in found.values() if one.size_bytes or one.own_bytes]


_NAMED = frozenset({"checkpoint", "suspended", "volume"})


def _owners(directories: Directories) -> dict[str, str]:
    """The instances that own disks, by the disks' names."""
    found = {}
    for instance_id in directories.instance_ids():
        with suppress(InnkeeperError):
            disk = directories.disk_of(instance_id)
            if disk is not None:
                found[disk] = str(instance_id)
    return found


def _own(path: Path, otherwise: int) -> int:
    """What no other file shares; a file that is gone meanwhile, and one of which the file system does not say so, takes what was seen."""
    try:
        return own_bytes(path)
    except OSError:
        return otherwise


def _below(top: Path, *, skip: frozenset[Path] = frozenset()) -> Iterator[tuple[Path, os.stat_result]]:
    """Everything of a folder, itself included, that lies on its file system; each inode once, as du counts. Not what is in `skip`."""
    seen: set[int] = set()
    device = top.stat().st_dev
    for folder, names, files in os.walk(top):
        names[:] = [name for name in names if Path(folder, name) not in skip]
        for path in (Path(folder), *(Path(folder, name) for name in files)):
            with suppress(FileNotFoundError):
                status = path.lstat()
                if status.st_dev != device:
                    names.clear()
                elif status.st_ino not in seen and path not in skip:
                    seen.add(status.st_ino)
                    yield path, status
