"""Collecting orphans: the daemon is a child subreaper, so what a dying runsc leaves behind becomes its child.

Somebody must wait for those, or they stay as zombies: `runsc delete` polls for up to 1.7 s for a zombie to vanish.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator

import structlog

from innkeeper.host.linux.command import OwnChildren, own_children
from innkeeper.host.linux.mounts import libc, oserror

log = structlog.stdlib.get_logger(__name__)

PR_SET_CHILD_SUBREAPER = 36
# Only children of the calling thread: orphans are given to the main thread, while a child that a worker thread
# started with `subprocess` is that thread's to wait for.
WNOTHREAD = 0x20000000
_WAIT_FLAGS = os.WEXITED | os.WNOHANG | os.WNOWAIT | WNOTHREAD
_RESCAN_SECONDS = 0.002
_RESCANS_BEFORE_LISTING = 5

libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)


def become_subreaper() -> None:
    """Orphaned descendants become children of this process from now on."""
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) < 0:
        raise oserror("prctl")


class OrphanReaper:
    """Collects every exited child that nobody here waits for, on SIGCHLD, in the event loop of the main thread.

    Children started through `command` are left to their owners. Code on the main thread that starts children in any
    other way must announce them to `command.own_children`.
    """

    def __init__(self, children: OwnChildren = own_children) -> None:
        self._children = children
        self._rescan: asyncio.TimerHandle | None = None
        self._blocked = 0
        self.reaped = 0

    @contextlib.contextmanager
    def running(self) -> Iterator["OrphanReaper"]:
        """Reap until the block ends. Needs a running event loop in the main thread."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self.reap)
        self.reap()  # those that ended before we listened
        try:
            yield self
        finally:
            loop.remove_signal_handler(signal.SIGCHLD)
            if self._rescan is not None:
                self._rescan.cancel()
                self._rescan = None

    def reap(self) -> None:
        """Collect the orphans that have ended; looks again soon while a child of our own is in the way."""
        if self._rescan is not None:
            self._rescan.cancel()
            self._rescan = None
        if self._children.spawning or not self._collect_until_one_of_ours():
            # A child without a known pid, or an own zombie that its owner is about to collect and that waitid(2) keeps
            # showing first. Both last well under a millisecond.
            self._blocked += 1
            if self._blocked > _RESCANS_BEFORE_LISTING and not self._children.spawning:
                self._collect_listed()
            delay = _RESCAN_SECONDS * min(self._blocked, 25)
            self._rescan = asyncio.get_running_loop().call_later(delay, self.reap)
        else:
            self._blocked = 0

    def _collect_until_one_of_ours(self) -> bool:
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, _WAIT_FLAGS)
            except ChildProcessError:
                return True
            if found is None:
                return True
            if found.si_pid in self._children:
                return False
            self._collect(found.si_pid)

    def _collect_listed(self) -> None:
        """The slow way round an own zombie that stays: look at every process."""
        ourselves = os.getpid()
        for entry in os.listdir("/proc"):  # noqa: PTH208 - names only, several hundred of them
            if entry.isdigit() and _zombie_of(int(entry), ourselves) and int(entry) not in self._children:
                self._collect(int(entry))

    def _collect(self, pid: int) -> None:
        with contextlib.suppress(ChildProcessError):
            collected, status = os.waitpid(pid, os.WNOHANG | WNOTHREAD)
            if collected:
                self.reaped += 1
                log.debug("orphan reaped", pid=pid, status=os.waitstatus_to_exitcode(status))


def _zombie_of(pid: int, parent: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:  # noqa: PTH123 - hundreds of times in a row
            state, ppid = stat.read().rpartition(b")")[2].split()[:2]
    except OSError:
        return False
    return state == b"Z" and int(ppid) == parent
