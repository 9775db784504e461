"""Loop devices by ioctl: a losetup process costs several milliseconds, the two calls cost a fraction of one."""

import asyncio
import contextlib
import errno
import fcntl
import os
import struct
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from innkeeper.host.linux import guest_written

LOOP_CLR_FD = 0x4C01
LOOP_SET_DIRECT_IO = 0x4C08
LOOP_CONFIGURE = 0x4C0A
LOOP_CTL_GET_FREE = 0x4C82

LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4
LO_FLAGS_DIRECT_IO = 16

# struct loop_config: fd, block_size, struct loop_info64 {5 x u64, 4 x u32, name[64], crypt name[64], key[32], 2 x u64},
# reserved[8 x u64].
_LOOP_CONFIG = struct.Struct("=II 5Q4I64s64s32s2Q 64s")
_ATTEMPTS = 64
UNUSED_SECONDS = 10.0


class LoopDevice:
    """An attached loop device, held open: with autoclear it disappears when neither this nor a mount holds it.

    Use as a context manager around mount(2): leaving it closes the descriptor, and the mount keeps the device.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd: int | None = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the device; safe to repeat."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def attach(
    path: str | os.PathLike[str],
    *,
    read_only: bool = False,
    autoclear: bool = True,
    direct_io: bool = False,
    block_size: int = 0,
) -> LoopDevice:
    """Attach a regular file to a free loop device. Raises OSError (EBUSY when every attempt lost the race).

    GuestWrittenError for what a virtual machine may have written: without a device nothing of it can be mounted here, whoever tries.
    `direct_io` is a wish: the kernel falls back to buffered I/O where the file system under the file cannot do it.
    """
    flags = (LO_FLAGS_READ_ONLY if read_only else 0) | (LO_FLAGS_AUTOCLEAR if autoclear else 0)
    flags |= LO_FLAGS_DIRECT_IO if direct_io else 0
    mode = os.O_RDONLY if read_only else os.O_RDWR
    backing = os.open(path, mode | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        guest_written.check(backing)
        # Only for the eyes of `losetup`: cut at 63 bytes, while sysfs has the whole path.
        name = os.fsencode(os.fspath(path))[:63]
        config = _LOOP_CONFIG.pack(
            backing, block_size, 0, 0, 0, 0, 0, 0, 0, 0, flags, name, b"", b"", 0, 0, b""
        )  # fmt: skip
        return _configure_a_free_one(config, mode)
    finally:
        os.close(backing)


def _configure_a_free_one(config: bytes, mode: int) -> LoopDevice:
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_ATTEMPTS):
            device = Path(f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}")
            try:
                fd = os.open(device, mode | os.O_CLOEXEC)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENXIO, errno.EBUSY):
                    continue
                raise
            try:
                fcntl.ioctl(fd, LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(fd)
                if error.errno == errno.EBUSY:  # somebody else took it between the two calls
                    continue
                raise
            return LoopDevice(device, fd)
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "every free loop device was taken by somebody else")


def detach(device: str | os.PathLike[str]) -> None:
    """Detach a loop device (at once, or when its last user lets go); one that is not attached is left as it is."""
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, LOOP_CLR_FD)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        finally:
            os.close(fd)


def devices_backed_by(prefix: str | os.PathLike[str]) -> dict[Path, Path]:
    """Loop device -> backing file, for every file at or below `prefix`, deleted files included."""
    top = os.path.realpath(prefix)
    found = {}
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = entry.read_bytes().decode(errors="surrogateescape").rstrip("\n").removesuffix(" (deleted)")
        except OSError:  # detached while we looked
            continue
        if backing == top or backing.startswith(top.rstrip("/") + "/"):
            found[Path("/dev") / entry.parts[3]] = Path(backing)
    return found


def clears_itself(device: Path) -> bool:
    """Whether the device detaches itself as soon as nobody has it open or mounted; true for one that did."""
    try:
        return Path("/sys/block", device.name, "loop", "autoclear").read_text().strip() == "1"
    except OSError:
        return True


async def wait_unused(path: str | os.PathLike[str]) -> None:
    """Return when no loop device holds the file. Raises OSError (EBUSY) when one still does after UNUSED_SECONDS.

    An unmounted file system lives on for a moment where a mount namespace that is being left has a copy of the mount.
    """
    deadline = time.monotonic() + UNUSED_SECONDS
    while await asyncio.to_thread(devices_backed_by, path):
        if time.monotonic() > deadline:
            raise OSError(errno.EBUSY, "still attached to a loop device", os.fspath(path))
        await asyncio.sleep(0.02)
