"""What test servers left on this machine. Other people's servers are none of our business and are never looked at."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from innkeeper.host.linux import loop_device, mounts
from innkeeper.host.linux.cgroup import DELEGATED, CgroupTree
from innkeeper.host.linux.netns import names

# A process that was killed, and a loop device whose mount another mount namespace still copies, go a moment later.
PATIENCE_SECONDS = 20.0
# A state directory is a test's temporary directory or lies at most this deep in it.
DEPTH = 3
EMPTY_AFTERWARDS = ("machines", "trash", "mounts/machines", "runsc")


def leftovers(base: Path) -> list[str]:
    """Everything that servers with a state directory below `base` left; empty when all is well."""
    homes = {server_id(directory): directory for directory in _directories(base)}
    return [
        *_processes(base),
        *(f"mount {mount.target}" for mount in mounts.mounts_under(base)),
        *(f"loop device {device} of {file}" for device, file in loop_device.devices_backed_by(base).items()),
        *(f"netns {name}" for name in names("ik") if name[2:10] in homes),
        *_links(homes),
        *(f"cgroup {name}" for name in _groups() if name.removeprefix("innkeeper-")[:8] in homes),
        *(f"nft {table}" for table in _tables() if any(identifier in table for identifier in homes)),
        *_sockets(base),
        *(f"file {path}" for home in homes.values() for path in _files(home)),
    ]


def wait_for_none(base: Path) -> list[str]:
    """`leftovers`, asked again until there are none or the patience ends."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (left := leftovers(base)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def server_id(home: Path) -> str:
    """What names everything global of the server with that state directory."""
    return hashlib.sha256(os.fsencode(home.resolve())).hexdigest()[:8]


def _directories(base: Path) -> Iterable[Path]:
    level = [base]
    for _ in range(DEPTH + 1):
        yield from level
        level = [
            Path(entry.path) for directory in level for entry in _scan(directory) if entry.is_dir(follow_symlinks=False)
        ]


def _scan(directory: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(directory))
    except OSError:
        return []


def _processes(base: Path) -> Iterable[str]:
    mark = os.fsencode(base) + b"/"
    for entry in os.listdir("/proc"):  # noqa: PTH208 - names only, several hundred of them
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            words = Path("/proc", entry, "cmdline").read_bytes()
            # systrap's stubs have no command line of their own; they live in the sandbox's group, which is looked at.
        except OSError:
            continue
        if mark in words and not _is_ancestor(int(entry)):
            yield f"process {entry}: {words.replace(bytes(1), b' ').decode(errors='replace')[:200]}"


def _is_ancestor(pid: int) -> bool:
    """Whether it is who runs us: pytest may have been given --basetemp on a command line."""
    current = os.getpid()
    while current > 1:
        if current == pid:
            return True
        try:
            current = int(Path("/proc", str(current), "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def _groups() -> list[str]:
    try:
        tree = CgroupTree.detect()
        return [*tree.group("/").children(), *tree.group(DELEGATED).children()]
    except OSError:
        return []


def _links(homes: dict[str, Path]) -> Iterable[str]:
    for name in os.listdir("/sys/class/net"):  # noqa: PTH208 - names only
        if any(f"ik{identifier}" in name for identifier in homes):
            yield f"network interface {name}"


def _tables() -> list[str]:
    # A bare machine without nft has no tables of ours either.
    try:
        done = subprocess.run(["nft", "list", "tables"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except FileNotFoundError:
        return []
    return [line for line in done.stdout.splitlines() if "innkeeper_" in line]


def _sockets(base: Path) -> Iterable[str]:
    mark = f"{base}/"
    for line in Path("/proc/net/unix").read_text().splitlines():
        path = line.rpartition(" ")[2]
        if path.startswith(mark):
            yield f"unix socket {path}"


def _files(home: Path) -> Iterable[Path]:
    host = home / "host"
    for folder in EMPTY_AFTERWARDS:
        yield from (Path(entry.path) for entry in _scan(host / folder))
    yield from host.glob("**/*.new")
