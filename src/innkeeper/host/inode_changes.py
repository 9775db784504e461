"""Whether anything on an ext4 file system changed, as the kernel itself counts it: a walk that finds nothing is saved.

Every change of an ext4 inode, its times included, is written to the journal through `ext4_mark_inode_dirty`, whose trace
point a perf counter counts per CPU for one device. A count that stayed the same since before the last scan means that a
scan would find what it found then. What moves no time (a store into a page that is dirty already) no scan can see either.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import tempfile
from pathlib import Path

from innkeeper.host.linux import mounts

_EVENT = "events/ext4/ext4_mark_inode_dirty/id"
_ONLINE = "/sys/devices/system/cpu/online"
_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
_PERF_TYPE_TRACEPOINT = 2
_PERF_FLAG_FD_CLOEXEC = 8
_PERF_EVENT_IOC_SET_FILTER = 0x40082406
_ATTRIBUTES = struct.Struct("<IIQQQQQ72x")  # perf_event_attr: type, size, config; all else 0 is counting
_COUNT = struct.Struct("<Q")


class InodeChanges:
    """Counts the inode changes of one ext4 file system from now on. Close it before the file system is unmounted."""

    def __init__(self, path: Path, *, event: int) -> None:
        """Raises OSError where the kernel cannot tell: another file system, lazy times, perf forbidden, no descriptors."""
        status = path.stat()
        self.device = status.st_dev
        mount = mounts.mount_of_device(self.device)
        if mount is None or mount.fstype != "ext4":
            raise OSError(f"{path} is not on an ext4 file system of its own")
        if "lazytime" in mount.super_options | mount.options:
            raise OSError(f"{path} is mounted with lazytime: its times change without a trace")
        self._online = _online()
        self._counters: list[int] = []
        # The kernel's own encoding of a device number, which trace points show.
        device = os.major(self.device) << 20 | os.minor(self.device)
        try:
            for cpu in _cpus(self._online):
                self._counters.append(_open_counter(event, cpu))
                fcntl.ioctl(self._counters[-1], _PERF_EVENT_IOC_SET_FILTER, f"dev == {device}".encode() + b"\0")
        except BaseException:
            self.close()
            raise

    def count(self) -> int | None:
        """How many changes there were; None when that is not known, because a CPU came or went. 5 µs, and one a CPU."""
        if not self._counters or _online() != self._online:
            return None
        return sum(int(_COUNT.unpack(os.read(counter, _COUNT.size))[0]) for counter in self._counters)

    def close(self) -> None:
        """Stop counting."""
        while self._counters:
            os.close(self._counters.pop())


def find_event() -> int:
    """The kernel's number of the event, by a tracefs mounted for a moment. Raises OSError where there is none; needs root."""
    directory = tempfile.mkdtemp(prefix="innkeeper-tracefs-")
    try:
        mounts.mount("tracefs", directory, "tracefs", mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC)
        try:
            return int((Path(directory) / _EVENT).read_text())
        finally:
            mounts.umount2(directory, mounts.MNT_DETACH)
    finally:
        Path(directory).rmdir()


def _open_counter(event: int, cpu: int) -> int:
    number = _PERF_EVENT_OPEN.get(os.uname().machine)
    if number is None:
        raise OSError("perf_event_open has another number on this architecture")
    attributes = _ATTRIBUTES.pack(_PERF_TYPE_TRACEPOINT, _ATTRIBUTES.size, event, 0, 0, 0, 0)
    fd: int = mounts.libc.syscall(
        ctypes.c_long(number), ctypes.c_char_p(attributes), -1, cpu, -1, ctypes.c_ulong(_PERF_FLAG_FD_CLOEXEC)
    )
    if fd < 0:
        raise mounts.oserror("perf_event_open")
    return fd


def _online() -> str:
    """The kernel's list of CPUs. Plain calls: it is read for every command."""
    descriptor = os.open(_ONLINE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 4_096).decode()
    finally:
        os.close(descriptor)


def _cpus(online: str) -> list[int]:
    """The numbers in a list such as `0-3,8`."""
    cpus: list[int] = []
    for part in online.strip().split(","):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return cpus
