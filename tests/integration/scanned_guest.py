"""A guest's overlay without a guest, and a scanner beside it: ext4 on a loop device above, EROFS and an older upper directory below."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from innkeeper.host.change_scanner import ChangeScanner, ScanTarget

SCANNER_MARKS = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root"),
    pytest.mark.skipif(shutil.which("go") is None, reason="the agent is built with go"),
]

SCANNER_UID = 64123
OVERLAY_OPTIONS = "userxattr,redirect_dir=nofollow,metacopy=off,index=off"


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=120)


@pytest.fixture(scope="session")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("agent") / "inn-agent"
    source = Path(__file__).parents[2] / "guest"
    subprocess.run(["go", "build", "-o", binary, "."], cwd=source, env={**os.environ, "CGO_ENABLED": "0"}, check=True)
    return binary


@dataclass
class Store:
    """Where the guests of one test module live."""

    disk: Path
    image: Path
    guests: int = 0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    root = tmp_path_factory.mktemp("store")
    tree = root / "tree"
    for path in ("etc/ssl/certs/ca.pem", "etc/passwd", "usr/lib/x/one", "usr/lib/x/two", "usr/lib/y/three", "top"):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(path.encode() * 3)
    (tree / "etc/link").symlink_to("passwd")
    (tree / "tmp").mkdir()
    for volatile in ("proc", "run", "dev", "sys"):
        (tree / volatile).mkdir()
    with contextlib.ExitStack() as stack:
        run("mkfs.erofs", "--quiet", root / "image.erofs", tree)
        store = Store(root / "disk", root / "image")
        store.disk.mkdir()
        store.image.mkdir()
        run("mount", "-t", "erofs", "-o", "loop,ro", root / "image.erofs", store.image)
        stack.callback(run, "umount", store.image)
        run("truncate", "-s", "2G", root / "disk.img")
        run("mkfs.ext4", "-q", "-N", "150000", root / "disk.img")
        run("mount", "-o", "loop,noatime,nodev", root / "disk.img", store.disk)
        stack.callback(run, "umount", store.disk)
        yield store


@dataclass
class Guest:
    """The files of one guest, changed by native processes through the merged mount."""

    home: Path
    lowers: tuple[Path, ...]
    excluded: tuple[str, ...] = ()
    commands: int = field(default=0)

    @property
    def root(self) -> Path:
        return self.home / "merged"

    @property
    def state(self) -> Path:
        return self.home / "state"

    @property
    def target(self) -> ScanTarget:
        return ScanTarget(self.home / "upper", self.lowers, self.state / "baseline", self.excluded)

    def next_result(self) -> Path:
        self.commands += 1
        return self.state / f"result-{self.commands}"

    def mount(self) -> None:
        for name in ("upper", "work", "merged", "state"):
            (self.home / name).mkdir(parents=True)
        os.chown(self.state, SCANNER_UID, SCANNER_UID)
        lowers = ":".join(str(lower) for lower in self.lowers)
        options = f"lowerdir={lowers},upperdir={self.home}/upper,workdir={self.home}/work,{OVERLAY_OPTIONS}"
        run("mount", "-t", "overlay", "-o", options, "overlay", self.root)

    def unmount(self) -> None:
        run("umount", self.root)


@contextlib.contextmanager
def new_guest(store: Store, *lowers: Path) -> Iterator[Guest]:
    store.guests += 1
    guest = Guest(store.disk / f"guest-{store.guests}", (*lowers, store.image))
    guest.mount()
    try:
        yield guest
    finally:
        guest.unmount()


@pytest.fixture
def guest(store: Store) -> Iterator[Guest]:
    with new_guest(store) as guest:
        yield guest


@pytest.fixture
async def scanner(agent: Path) -> AsyncIterator[ChangeScanner]:
    async with ChangeScanner.start(agent, uid=SCANNER_UID, gid=SCANNER_UID) as scanner:
        yield scanner


def process_status(scanner: ChangeScanner) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{scanner.pid}/status").read_text().splitlines())


def kill(pid: int) -> None:
    """Kill a process and wait for its end."""
    with contextlib.closing(os.fdopen(os.pidfd_open(pid))) as process:
        os.kill(pid, signal.SIGKILL)
        select.select([process], [], [], 5)


async def changes(scanner: ChangeScanner, guest: Guest) -> list[tuple[str, bytes]]:
    found = await scanner.changes(guest.target, result=guest.next_result(), limit=1_000_000)
    assert found.total == len(found.rows)
    return [(row.status, row.path) for row in found.rows]
