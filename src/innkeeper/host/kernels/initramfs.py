"""The initramfs of microVMs: the guest agent as /init and the modules in the order in which it loads them. Pure, and the same bytes for the same input."""

from __future__ import annotations

import gzip
import io
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Form of what is packed: part of the name of every initramfs that is kept.
LAYOUT = 2
# 9 takes three times as long for 1 % less.
COMPRESSION = 6
_MAGIC = "070701"  # cpio's "newc", which the kernel reads
_TRAILER = "TRAILER!!!"
_ALIGNMENT = 4


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of an archive, of root and of no time. `device` is (major, minor) of a device node."""

    path: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def cpio(entries: Iterable[Entry]) -> bytes:
    """The archive. Raises ValueError for a path that is absolute, or not ASCII."""
    out = io.BytesIO()
    for number, entry in enumerate(entries, start=1):
        if entry.path.startswith("/") or not entry.path.isascii():
            raise ValueError(f"not a path in an archive: {entry.path!r}")
        _put(out, number, entry)
    _put(out, 0, Entry(_TRAILER, 0))
    return out.getvalue()


def initramfs(agent: bytes, modules: Sequence[tuple[str, bytes]], offered: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """The compressed initramfs: `agent` as /init, `modules` (name without its ending, content) as /modules/NN-name.ko, a /dev/null, and what may be loaded
    later (name, content) in /offered.

    The last one because no console is there to be a program's first three descriptors, and Go's runtime wants them before main begins.
    """
    entries = [
        Entry("dev", stat.S_IFDIR | 0o755),
        Entry("dev/null", stat.S_IFCHR | 0o666, device=(1, 3)),
        Entry("init", stat.S_IFREG | 0o755, agent),
        Entry("modules", stat.S_IFDIR | 0o755),
    ]
    entries += [
        Entry(f"modules/{number:02}-{name}.ko", stat.S_IFREG | 0o644, content)
        for number, (name, content) in enumerate(modules)
    ]
    if offered:
        entries.append(Entry("offered", stat.S_IFDIR | 0o755))
        entries += [Entry(f"offered/{name}", stat.S_IFREG | 0o644, content) for name, content in offered]
    return gzip.compress(cpio(entries), COMPRESSION, mtime=0)


def _put(out: io.BytesIO, number: int, entry: Entry) -> None:
    name = entry.path.encode("ascii") + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device of the archive, of the node, length of the name, checksum (none)
    fields = (number, entry.mode, 0, 0, 1, 0, len(entry.content), 0, 0, *entry.device, len(name), 0)
    out.write((_MAGIC + "".join(f"{field:08x}" for field in fields)).encode("ascii"))
    out.write(name)
    _pad(out)
    out.write(entry.content)
    _pad(out)


def _pad(out: io.BytesIO) -> None:
    out.write(bytes(-out.tell() % _ALIGNMENT))
