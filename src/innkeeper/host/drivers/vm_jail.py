"""What a QEMU runs in: a root of its programs alone, namespaces, limits and a user of its own. It outlives the daemon.

Everything is done by the tools of util-linux, one after the other in the same process, so that the daemon does not fork itself and an operator can read
the way in. QEMU's files come as descriptors: of the host's files it sees /usr, two devices and the guest's kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from innkeeper.host.drivers.contract import StartFailedError
from innkeeper.host.linux import command
from innkeeper.host.linux.mounts import fstab_field

KERNEL, INITRAMFS = "/kernel", "/initramfs"
MOUNT_TABLE = "mounts"
START_SECONDS = 30.0
# Its threads: one for each vCPU and some of QEMU's own, and up to 64 that wait for disks.
PIDS_MAX = 256
OPEN_FILES = 256
# Of what QEMU says when it cannot start.
SAID_BYTES = 4_096
_TREES = ("bin", "sbin", "lib", "lib64")
_DEVICES = ("null", "urandom")

# Into the machine's control group, from the first moment on.
_JOIN = 'while [ "$1" != -- ]; do echo 0 > "$1" || exit; shift; done; shift; exec "$@"'
# umount and the last remount read /proc, so it goes last. Nothing of the host's tree stays behind the new root: a copy of a guest's mount
# would keep its disk busy for as long as the machine runs.
_ENTER = (
    'mount --all --fstab "$1" && cd "$2" && shift 2 && pivot_root . old && cd / && umount --lazy /old && mount -o remount,bind,ro,nosuid /'
    ' && umount --lazy /proc && exec "$@"'
)
# The first child in a new pid namespace is its first process: QEMU itself, which belongs to the reaper of orphans when the shell is gone.
_BEGIN = '"$@" > /dev/null & echo $!'
# Of /proc it sees itself: it opens memory that it has as a descriptor by its name there, and has no other way to.
_SEE = 'mount -t proc -o ro,nosuid,nodev,noexec,subset=pid proc /proc && exec "$@"'


class JailFailedError(StartFailedError):
    """The virtual machine's process could not be started."""


@dataclass(frozen=True, slots=True)
class VmJail:
    """A way to start QEMU.

    Args:
        root: a directory of the server's own, for the jails' roots; every jail has the same.
        mark: a word of the command line by which a start that was cut short is known.
        uid: the user that it runs as; nobody else's.
        gid: that user's group.
        groups: further groups, such as /dev/kvm's.
        devices: paths of devices that it opens itself.

    """

    root: Path
    mark: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    devices: tuple[Path, ...] = ()

    def prepare(self) -> None:
        """Make the root: empty places for what is mounted there. Safe to repeat."""
        for name in ("usr", "dev", "etc", "old", "proc"):
            (self.root / name).mkdir(parents=True, exist_ok=True, mode=0o755)
        for name in ("etc/ld.so.cache", "kernel", "initramfs", *(f"dev/{path.name}" for path in self._devices())):
            (self.root / name).touch()
        for name in _TREES:
            source, target = Path("/", name), self.root / name
            if source.is_symlink():
                if not target.is_symlink():
                    target.symlink_to(source.readlink())
            elif source.is_dir():
                target.mkdir(exist_ok=True, mode=0o755)

    def _devices(self) -> tuple[Path, ...]:
        return (*(Path("/dev", name) for name in _DEVICES), *self.devices)

    def mount_table(self, *, kernel: Path, initramfs: Path) -> str:
        """The fstab(5) of a start."""
        return "".join(f"{line}\n" for line in self._mounts(kernel, initramfs))

    def _mounts(self, kernel: Path, initramfs: Path) -> Iterator[str]:
        yield self._bind(self.root, "", "nosuid")
        yield self._bind(Path("/proc"), "proc", "nosuid")
        trees = [name for name in _TREES if (Path("/", name)).is_dir() and not Path("/", name).is_symlink()]
        for name in ("usr", *trees, "etc/ld.so.cache"):
            yield self._bind(Path("/", name), name, "ro,nosuid,nodev")
        for device in self._devices():
            yield self._bind(device, f"dev/{device.name}", "nosuid")
        yield self._bind(kernel, KERNEL[1:], "ro,nosuid,nodev,noexec")
        yield self._bind(initramfs, INITRAMFS[1:], "ro,nosuid,nodev,noexec")

    def _bind(self, source: Path, target: str, options: str) -> str:
        return f"{fstab_field(source)} {fstab_field(self.root / target)} none bind,{options} 0 0"

    def command(
        self, argv: Sequence[str], *, table: Path, groups: Sequence[Path], netns: Path, file_bytes: int
    ) -> list[str]:
        """The command that joins the control groups (their `cgroup.procs`), enters the jail, begins `argv` and prints its pid."""
        # fmt: off
        return [
            "sh", "-c", _JOIN, self.mark, *map(str, groups), "--",
            "nsenter", f"--net={netns}", "--",
            "unshare", "--mount", "--ipc", "--uts", "--propagation", "private", "--",
            "sh", "-c", _ENTER, self.mark, str(table), str(self.root),
            "unshare", "--pid", "--", "sh", "-c", _BEGIN, self.mark,
            "sh", "-c", _SEE, self.mark,
            "prlimit", "--core=0", f"--nofile={OPEN_FILES}", f"--fsize={file_bytes}", "--",
            "setpriv", f"--reuid={self.uid}", f"--regid={self.gid}",
            f"--groups={','.join(map(str, self.groups))}" if self.groups else "--clear-groups",
            "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", "--no-new-privs", "--",
            *argv,
        ]
        # fmt: on

    async def start(self, wrapped: Sequence[str], *, pass_fds: Sequence[int], said: int) -> int:
        """Run `command`'s answer: the pid of what began. It says what it has to say to the descriptor `said`. Raises JailFailedError, CommandFailed."""
        process = await command.spawn(wrapped, stdout=asyncio.subprocess.PIPE, stderr=said, pass_fds=pass_fds, cwd="/")
        try:
            async with asyncio.timeout(START_SECONDS):
                answer, _ = await process.communicate()
            return int(answer)
        except (TimeoutError, ValueError):
            raise JailFailedError from None
        finally:
            await asyncio.shield(_collect(process))


async def _collect(process: asyncio.subprocess.Process) -> None:
    # What it began is of its session: only one that has not ended is killed, with all that it began.
    if process.returncode is None:
        await command.end(process)


def heard(descriptor: int) -> str:
    """What was said to a pipe so far, in one line of printable characters."""
    with contextlib.suppress(BlockingIOError):
        said = os.read(descriptor, SAID_BYTES).decode(errors="replace")
        return "".join(character if character.isprintable() else " " for character in said).strip()
    return ""
