"""What a QEMU runs in: a root of its programs alone, namespaces, limits and a user of its own. It outlives the daemon.

Made by the host's own program (guest/jail) of a plan, a file that an operator can read. QEMU's files come as descriptors: of the host's files it sees /usr,
two devices and the guest's kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from innkeeper.host.drivers.contract import StartFailedError
from innkeeper.host.linux import command

KERNEL, INITRAMFS = "/kernel", "/initramfs"
PLAN = "jail.json"
START_SECONDS = 30.0
# Its threads: one for each vCPU and some of QEMU's own, and up to 64 that wait for disks.
PIDS_MAX = 256
OPEN_FILES = 256
# Of what QEMU says when it cannot start.
SAID_BYTES = 4_096
_TREES = ("bin", "sbin", "lib", "lib64")
_DEVICES = ("null", "urandom")


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

    def plan(
        self,
        *,
        kernel: Path,
        initramfs: Path,
        file_bytes: int,
        groups: Sequence[Path] = (),
        netns: Path | None = None,
        stays: bool = False,
    ) -> dict[str, Any]:
        """What guest/jail makes of a start: it joins the control groups (their `cgroup.procs`) first of all.

        Without a network namespace it gets one that leads nowhere. One that `stays` ends when its command does, and is in no group.
        """
        return {
            "groups": [str(path) for path in groups],
            "network": "" if netns is None else str(netns),
            "stays": stays,
            "root": str(self.root),
            "mounts": list(self._mounts(kernel, initramfs)),
            "uid": self.uid,
            "gid": self.gid,
            "further_groups": list(self.groups),
            "open_files": OPEN_FILES,
            "file_bytes": file_bytes,
        }

    def _mounts(self, kernel: Path, initramfs: Path) -> Iterator[dict[str, Any]]:
        trees = [name for name in _TREES if (Path("/", name)).is_dir() and not Path("/", name).is_symlink()]
        for name in ("usr", *trees, "etc/ld.so.cache"):
            yield {"source": f"/{name}", "target": name, "read_only": True, "programs": True}
        for device in self._devices():
            yield {"source": str(device), "target": f"dev/{device.name}", "devices": True}
        yield {"source": str(kernel), "target": KERNEL[1:], "read_only": True}
        yield {"source": str(initramfs), "target": INITRAMFS[1:], "read_only": True}

    def command(self, program: Path, plan: Path, argv: Sequence[str]) -> list[str]:
        """The command that enters the jail of a `plan`'s file, begins `argv` and prints its pid. `program` is the agent. Raises JailFailedError."""
        found = shutil.which(argv[0])
        if found is None:
            raise JailFailedError
        return [str(program), "jail", self.mark, str(plan), "--", found, *argv[1:]]

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
        return printable(os.read(descriptor, SAID_BYTES))
    return ""


def printable(said: bytes) -> str:
    """What a program said, in one line of printable characters."""
    return "".join(character if character.isprintable() else " " for character in said.decode(errors="replace")).strip()
