"""A root directory of its own for packages that are tested: namespaces in which only it and loopback exist."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from innkeeper.host.linux.cgroup import CgroupTree, Group
from innkeeper.settings import Settings

# $1: the directory that becomes /, with changes kept in $2; empty: what this machine's file system has, with changes kept in memory;
# $2: a directory to put the rest together in; then the pairs of what is bound where.
# The old root goes away altogether: a copy of the host's mounts would keep other people's disks busy.
ENTER = """
set -e
lower=${1:-/} work=$2 root=$2/root
# The changes lie in another file system than what they change, where that is all of this one's: overlays may not overlap.
if [ -z "$1" ]; then mount -t tmpfs -o size=2g none "$work"; fi
shift 2
mkdir -p "$root" "$work/upper" "$work/work"
mount -t overlay -o "lowerdir=$lower,upperdir=$work/upper,workdir=$work/work" overlay "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t sysfs sysfs "$root/sys"
for below in /sys/fs/cgroup /sys/kernel/tracing /sys/kernel/debug; do
    [ ! -d "$below" ] || mount --rbind "$below" "$root$below"
done
mount -t tmpfs none "$root/run"
mount -t tmpfs -o mode=1777 none "$root/tmp"
mode=rw
while [ $# -gt 0 ]; do
    if [ -d "$1" ]; then mkdir -p "$root$2"; else touch "$root$2"; fi
    mount --bind "$1" "$root$2"
    mount -o "remount,bind,$mode" "$root$2"
    # The state directory comes first. Whatever else is shown is this machine's own, and a package's script may write anywhere.
    mode=ro
    shift 2
done
if [ "$NETWORK" = none ]; then ip link set lo up; fi
cd "$root"
mkdir -p .old
pivot_root . .old
# With the old root's own program: a bare system has none.
chroot /.old umount -l /
rmdir /.old
touch /run/ready
exec sleep infinity < /dev/null
"""
PLAIN = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
READY_SECONDS = 30


class IsolatedRoot:
    """What runs in it sees its own files, processes and, unless it was given the host's, a network of loopback alone."""

    def __init__(self, first: int, home: str) -> None:
        self._first = first
        self.home = home

    def run(
        self, *argv: str | Path, timeout: float = 120, expected: int | None = 0, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in it; its output is text."""
        done = subprocess.run(
            self._inside(argv, variables), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
        )
        assert expected in (None, done.returncode), f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def output(self, *argv: str | Path, **variables: str) -> str:
        """What a command says that has to succeed."""
        return self.run(*argv, **variables).stdout

    def _inside(self, argv: tuple[str | Path, ...], variables: dict[str, str]) -> list[str]:
        enter = ["nsenter", "--target", str(self._first), "--mount", "--pid", "--net", "--wdns=/"]
        environment = [f"{name}={value}" for name, value in {**PLAIN, **variables}.items()]
        return [*enter, "--", "env", "-i", *environment, *map(str, argv)]

    @property
    def files(self) -> Path:
        """Its /, as this side sees it."""
        return Path(f"/proc/{self._first}/root")

    def configure(self, **settings: str) -> str:
        """Write the settings file for a server on `home`; its text."""
        lines = [f'{name} = "{value}"\n' for name, value in {"home": self.home, **settings}.items()]
        file = self.files / "etc/innkeeper/innkeeper.toml"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(lines))
        return "".join(lines)

    @contextlib.contextmanager
    def serving(self, *, seconds: float = 120, **variables: str) -> Iterator[Path]:
        """`inn serve`, ready; the path of its log on this side. It ends by SIGTERM and has to end well."""
        log = self.files / "run" / "serve.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                self._inside(("sh", "-c", "echo $$ > /run/serve.pid; exec inn serve"), variables),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        try:
            deadline = time.monotonic() + seconds
            while "Innkeeper is ready" not in log.read_text(errors="replace"):
                assert process.poll() is None, log.read_text(errors="replace")
                assert time.monotonic() < deadline, log.read_text(errors="replace")
                time.sleep(0.05)
            yield log
        finally:
            if process.poll() is None:
                self.run("sh", "-c", "kill -TERM $(cat /run/serve.pid)")
            assert process.wait(60) == 0, log.read_text(errors="replace")


@contextlib.contextmanager
def isolated_root(
    work: Path, *, state: Path, root: Path | None = None, bound: dict[Path, str] | None = None, network: str = "none"
) -> Iterator[IsolatedRoot]:
    """A root that is ready: `root` with every change in `work`, or this machine's with every change forgotten at the end.

    `state` is the state directory of the one server that may run in it, shown under a name of its own; `bound` is shown
    inside too, read-only: {here: there}. `network`: "none", or "host".
    """
    # Control groups are the one thing that cannot be isolated everywhere, and they are named after this path.
    home = f"/srv/innkeeper-{uuid4().hex[:8]}"
    binds = [str(word) for pair in ((state, home), *(bound or {}).items()) for word in pair]
    separate = ["--net"] if network == "none" else []
    process = subprocess.Popen(
        [
            *("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child=KILL", *separate),
            *("sh", "-c", ENTER, "sh", str(root or ""), str(work), *binds),
        ],
        env={**PLAIN, "NETWORK": network},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        yield IsolatedRoot(_first_process(process), home)
        left = groups_of(home)
    finally:
        process.kill()
        # A frozen guest does not die of its namespace's end.
        asyncio.run(_end(groups_of(home)))
        process.communicate()
    assert left == [], [group.path for group in left]


def groups_of(home: str) -> list[Group]:
    """The control groups that exist of the server with that state directory, innermost first."""
    top = CgroupTree.detect().group(f"/innkeeper-{Settings(home=Path(home)).server_id}")
    return [*(top.child(name) for name in top.children()), top] if top.exists() else []


async def _end(groups: list[Group]) -> None:
    for group in groups:
        await group.kill_all()
        await group.remove()


def _first_process(process: subprocess.Popen[bytes]) -> int:
    """The pid, on this side, of what is process 1 inside, once everything is mounted."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + READY_SECONDS
    while True:
        with contextlib.suppress(OSError, ValueError):
            first = int(children.read_text())
            if os.path.exists(f"/proc/{first}/root/run/ready"):  # noqa: PTH110 - nothing to resolve
                return first
        if process.poll() is not None:
            raise AssertionError((process.stderr.read() if process.stderr else b"").decode())
        assert time.monotonic() < deadline, "the root is not ready"
        time.sleep(0.02)
