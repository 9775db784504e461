"""The change scanner against a naive model: what differs between two walks of everything that the guest sees."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.integration.scanned_guest import run

from innkeeper.host.change_scanner import ChangeScanner, ScanTarget

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root"),
    pytest.mark.skipif(shutil.which("go") is None, reason="the agent is built with go"),
]

SCANNER_UID = 64124
OPTIONS = "userxattr,redirect_dir=nofollow,metacopy=off,index=off"
NAMES = (
    "a",
    "b",
    "c",
    "d.e",
    "d",
)  # few, so that operations meet; "d" and "d.e" sort differently as paths and as bytes

Change = tuple[str, bytes]
Seen = dict[bytes, tuple[object, ...]]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("model")
    mounted = root / "disk"
    mounted.mkdir()
    run("truncate", "-s", "256M", root / "disk.img")
    run("mkfs.ext4", "-q", "-N", "60000", root / "disk.img")
    run("mount", "-o", "loop,noatime", root / "disk.img", mounted)
    try:
        base = mounted / "base"
        for path in ("a/a/a", "a/a/b", "a/b/a", "a/c", "b/a", "b/d/a", "c", "d/a/b", "d.e"):
            (base / path).parent.mkdir(parents=True, exist_ok=True)
            (base / path).write_text(path)
        yield mounted
    finally:
        run("umount", mounted)


@contextlib.contextmanager
def overlay(home: Path, *lowers: Path) -> Iterator[Path]:
    for name in ("upper", "work", "merged", "state"):
        (home / name).mkdir(parents=True)
    os.chown(home / "state", SCANNER_UID, SCANNER_UID)
    layers = ":".join(str(lower) for lower in lowers)
    options = f"lowerdir={layers},upperdir={home}/upper,workdir={home}/work,{OPTIONS}"
    run("mount", "-t", "overlay", "-o", options, "overlay", home / "merged")
    try:
        yield home / "merged"
    finally:
        run("umount", home / "merged")


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def restore(path: Path) -> None:
    """Take the file away and put an equal one back, as `cp -p` and tar do."""
    if not path.is_file() or path.is_symlink():
        return
    status, content = path.stat(), path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    os.chown(path, status.st_uid, status.st_gid)
    path.chmod(stat.S_IMODE(status.st_mode))
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))


def operate(root: Path, operation: str, one: str, two: str, dice: random.Random) -> None:
    """Do one thing that may fail, as in any guest's script."""
    path, other = root / one, root / two
    actions: dict[str, Callable[[], object]] = {
        "write": lambda: path.write_bytes(dice.randbytes(8)),
        "write through": lambda: (path.parent.mkdir(parents=True, exist_ok=True), path.write_bytes(dice.randbytes(8))),
        "append": lambda: os.truncate(path, path.stat().st_size + 1),
        "remove": lambda: remove(path),
        "empty": lambda: (remove(path), path.mkdir()),
        "mkdir": lambda: path.mkdir(parents=True, exist_ok=True),
        "rename": lambda: path.rename(other),
        "symlink": lambda: path.symlink_to(two),
        "link": lambda: other.hardlink_to(path),
        "chmod": lambda: path.chmod(dice.choice((0o600, 0o644, 0o755))),
        "chown": lambda: os.lchown(path, dice.choice((0, 1000)), dice.choice((0, 1000))),
        "touch": lambda: os.utime(path),
        "copy up": lambda: os.lchown(path, path.lstat().st_uid, -1),
        "restore": lambda: restore(path),
        "fifo": lambda: os.mkfifo(path),
    }
    with contextlib.suppress(OSError, shutil.Error):
        actions[operation]()


OPERATIONS = (
    *("write", "write through", "append", "remove", "empty", "mkdir", "rename", "symlink", "link", "chmod", "chown"),
    *("touch", "copy up", "restore", "fifo"),
)


def look(root: Path) -> Seen:
    """Everything listed that a user sees: path to kind, size, time, mode, owner and content."""
    seen: Seen = {}
    top = os.fsencode(root)
    for directory, directories, files in os.walk(top):
        for name in (*directories, *files):
            path = os.path.join(directory, name)  # noqa: PTH118  (names are bytes)
            status = os.lstat(path)
            about = (status.st_size, status.st_mtime_ns, status.st_mode, status.st_uid, status.st_gid)
            if stat.S_ISLNK(status.st_mode):
                seen[path[len(top) :]] = (*about, os.readlink(path))  # noqa: PTH115
            elif stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:  # noqa: PTH123
                    seen[path[len(top) :]] = (*about, file.read())
    return seen


def difference(before: Seen, after: Seen) -> list[Change]:
    found = [("deleted", path) for path in before.keys() - after.keys()]
    found += [("created", path) for path in after.keys() - before.keys()]
    found += [("modified", path) for path in before.keys() & after.keys() if before[path] != after[path]]
    return sorted(found, key=lambda change: change[1].split(b"/"))


paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)
commands = st.lists(st.tuples(st.sampled_from(OPERATIONS), paths, paths), max_size=8)


@settings(
    max_examples=int(os.environ.get("INNKEEPER_MODEL_EXAMPLES", "60")),
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(snapshots=st.lists(commands, max_size=2), history=st.lists(commands, min_size=1, max_size=5), seed=st.integers())
def test_the_scanner_reports_what_a_naive_walk_finds(
    agent: Path,
    disk: Path,
    snapshots: list[list[tuple[str, str, str]]],
    history: list[list[tuple[str, str, str]]],
    seed: int,
) -> None:
    dice = random.Random(seed)
    home = disk / "example"
    lowers = [disk / "base"]
    try:
        for number, operations in enumerate(snapshots):
            with overlay(home / f"snapshot-{number}", *lowers) as root:
                for operation, one, two in operations:
                    operate(root, operation, one, two, dice)
            lowers.insert(0, home / f"snapshot-{number}" / "upper")
        with overlay(home / "guest", *lowers) as root:
            target = ScanTarget(home / "guest/upper", tuple(lowers), home / "guest/state/baseline")
            asyncio.run(live(agent, target, root, history, dice))
    finally:
        shutil.rmtree(home)


async def live(
    agent: Path, target: ScanTarget, root: Path, history: list[list[tuple[str, str, str]]], dice: random.Random
) -> None:
    async with ChangeScanner.start(agent, uid=SCANNER_UID, gid=SCANNER_UID) as scanner:
        scanner.watch(target.upper)
        before = look(root)
        for number, operations in enumerate(history):
            if number == 0:
                await scanner.baseline(target)
            for operation, one, two in operations:
                operate(root, operation, one, two, dice)
            after = look(root)
            found = await scanner.changes(target, result=target.baseline.with_name(f"result-{number}"))
            assert [(row.status, row.path) for row in found.rows] == difference(before, after)
            for row in found.rows:
                assert row.size == (after[row.path][0] if row.path in after else 0)
            assert (await scanner.changes(target, result=target.baseline.with_name("again"))).total == 0
            before = after
