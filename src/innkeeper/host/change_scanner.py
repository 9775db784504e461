"""The files that a command changed, found by one resident unprivileged process for all gVisor guests of this host.

The process (`inn-agent scan`) holds CAP_DAC_READ_SEARCH and nothing else, reads metadata only and never follows a symlink.
The overlays whose upper directories it scans must be mounted with `userxattr`: the marks of emptied directories are
otherwise in trusted.*, which only CAP_SYS_ADMIN may read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import select
import signal
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from innkeeper.host.change_result import ChangeSet, FileChange, read_changes
from innkeeper.host.inode_changes import InodeChanges, find_event
from innkeeper.host.linux import command

__all__ = ["ChangeScanError", "ChangeScanner", "ChangeSet", "FileChange", "ScanTarget", "read_changes"]

_log = logging.getLogger(__name__)
_LENGTH = struct.Struct(">I")
_MAX_ANSWER_BYTES = 64 * 1024
# A watched guest's counter is asked at every inode change of any: 101 of them made 3,000 files a third slower to create.
_MAX_WATCHES = 128
_CAPABILITIES = "-all,+dac_read_search"


class ChangeScanError(Exception):
    """A scan failed; `code` says why.

    `no_baseline`, `bad_baseline` (take a new one), `too_large` (a directory of millions of names), `unsupported_mount` (an
    overlay without `userxattr`), `no_space`, `io_error`, `bad_request`, `timeout`, `scanner_died` (ask again: a repeated
    `changes` with the same result path neither loses nor repeats a change).
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class ScanTarget:
    """One guest's files: the overlay's upper directory, the layers below it (topmost first), where its baseline is kept.

    The baseline's directory must be writable by the scanner's uid. `excluded` are absolute paths in the guest, of volumes;
    /proc, /sys, /dev, /run and /.innkeeper always are.
    """

    upper: Path
    lowers: tuple[Path, ...]
    baseline: Path
    excluded: tuple[str, ...] = ()


@dataclass
class _Process:
    process: asyncio.subprocess.Process
    pidfd: int
    waiting: dict[int, asyncio.Future[dict[str, Any]]] = field(default_factory=dict)
    alive: bool = True

    def end(self, reason: str) -> None:
        self.alive = False
        for answer in self.waiting.values():
            if not answer.done():
                answer.set_exception(ChangeScanError("scanner_died", reason))
        self.waiting.clear()
        # Not Process.kill(): that polls first, and so takes the exit status from asyncio's own waiting thread.
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)


@dataclass
class _Watch:
    changes: InodeChanges
    # How it was before the last scan of which target against which baseline file: the same again needs no scan.
    clean: tuple[int, ScanTarget, tuple[int, int]] | None = None

    def note(self, count: int | None, target: ScanTarget) -> None:
        self.clean = None if count is None else (count, _without_place(target), _identity(target.baseline))

    def is_clean(self, count: int | None, target: ScanTarget, *, result: Path) -> bool:
        """Whether a scan for a new result would find nothing."""
        if count is None or self.clean is None or self.clean[:2] != (count, _without_place(target)):
            return False
        try:
            same_device = target.upper.stat().st_dev == self.changes.device
        except OSError:
            return False
        return same_device and self.clean[2] == _identity(target.baseline) and not result.exists()


class ChangeScanner:
    """A client of the scanner process, which is started at once and again whenever it is gone."""

    def __init__(self, command: list[str], tasks: asyncio.TaskGroup, *, deadline_seconds: float) -> None:
        self._command = command
        self._tasks = tasks
        self._deadline_seconds = deadline_seconds
        self._starting = asyncio.Lock()
        self._current: _Process | None = None
        self._last_id = 0
        self._event: int | None = None
        self._watches: dict[Path, _Watch] = {}
        # Since this scanner began: scans that were not needed, and processes that were started.
        self.saved = 0
        self.started = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def start(
        cls, agent_binary: Path, *, uid: int, gid: int, deadline_seconds: float = 60
    ) -> AsyncIterator[ChangeScanner]:
        """A running scanner, as an async context manager; the caller is root. Leaving it ends the process."""
        argv = [
            *("setpriv", "--reuid", str(uid), "--regid", str(gid), "--clear-groups", "--no-new-privs"),
            *("--bounding-set", _CAPABILITIES, "--inh-caps", _CAPABILITIES, "--ambient-caps", _CAPABILITIES),
            *("--", str(agent_binary), "scan"),
        ]
        async with asyncio.TaskGroup() as tasks:
            scanner = cls(argv, tasks, deadline_seconds=deadline_seconds)
            try:
                await scanner._ask({"op": "hello"})
                try:
                    scanner._event = find_event()
                except (OSError, ValueError) as error:
                    _log.info("the kernel cannot tell that nothing changed, every command is scanned: %s", error)
                yield scanner
            finally:
                for upper in list(scanner._watches):
                    scanner.unwatch(upper)
                if scanner._current is not None:
                    scanner._current.end("the scanner was stopped")

    @property
    def pid(self) -> int | None:
        """The process that would serve the next request, if it is running."""
        return self._current.process.pid if self._current is not None and self._current.alive else None

    def watch(self, upper: Path) -> bool:
        """Have the kernel count changes on the ext4 file system that holds `upper`; scans without any are then saved.

        Whether it can. Costs a descriptor per CPU. Call `unwatch` before the file system is unmounted, or changed by any
        other means than this mount.
        """
        if upper in self._watches:
            return True
        if self._event is None or len(self._watches) >= _MAX_WATCHES:
            return False
        try:
            self._watches[upper] = _Watch(InodeChanges(upper, event=self._event))
        except OSError as error:
            _log.info("changes below %s are not counted: %s", upper, error)
            return False
        return True

    def unwatch(self, upper: Path) -> None:
        """Stop counting; nothing happens where nothing was counted."""
        watch = self._watches.pop(upper, None)
        if watch is not None:
            watch.changes.close()

    async def baseline(self, target: ScanTarget) -> int:
        """How many entries the upper directory holds, which from now on count as known. Raises `ChangeScanError`."""
        watch, count = self._count(target)
        answer = await self._ask({"op": "baseline", **_describe(target)})
        if watch is not None:
            watch.note(count, target)
        return int(answer["scanned"])

    async def changes(self, target: ScanTarget, *, result: Path, limit: int = 1000) -> ChangeSet:
        """What changed since the last baseline or report, with the first `limit` rows; all rows are kept in `result`.

        `result` is a path of its own for every command, on the baseline's file system, in a directory that the scanner
        may write; asking again with the same one gives the same rows. Without changes no file is made. Raises `ChangeScanError`.
        """
        watch, count = self._count(target)
        if watch is not None and watch.is_clean(count, target, result=result):
            self.saved += 1
            return ChangeSet(total=0, rows=(), scanned_entries=0, duration_us=0)
        answer = await self._ask({"op": "changes", **_describe(target), "result": str(result)})
        if watch is not None and answer["scanned"]:  # an earlier result that was asked for again is no scan
            watch.note(count, target)
        total = int(answer["total"])
        rows: tuple[FileChange, ...] = ()
        if total:
            try:
                rows = tuple(read_changes(result, 0, limit)[0])
            except (OSError, ValueError) as error:
                raise ChangeScanError("io_error", f"the result of a scan cannot be read: {error}") from error
        return ChangeSet(
            total=total, rows=rows, scanned_entries=int(answer["scanned"]), duration_us=int(answer["duration_us"])
        )

    def _count(self, target: ScanTarget) -> tuple[_Watch | None, int | None]:
        watch = self._watches.get(target.upper)
        return watch, None if watch is None else watch.changes.count()

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = await self._running()
        self._last_id += 1
        request_id = self._last_id
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        process.waiting[request_id] = answer
        try:
            async with asyncio.timeout(self._deadline_seconds):
                await _send(process, {"id": request_id, **request})
                received = await answer
        except TimeoutError:
            _cancel(process, request_id)
            raise ChangeScanError("timeout", f"a scan took over {self._deadline_seconds} s") from None
        except asyncio.CancelledError:
            _cancel(process, request_id)
            raise
        finally:
            process.waiting.pop(request_id, None)
        if "error" in received:
            raise ChangeScanError(str(received["error"]["code"]), str(received["error"]["message"]))
        return received

    async def _running(self) -> _Process:
        async with self._starting:
            if self._current is not None and self._current.alive and _has_exited(self._current.pidfd):
                self._current.end("the scanner died")  # its pipe says so only a moment later
            if self._current is None or not self._current.alive:
                process = await command.spawn(
                    self._command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "GOMAXPROCS": "2"},
                )
                self.started += 1
                self._current = _Process(process, os.pidfd_open(process.pid))
                self._tasks.create_task(_receive(self._current))
            return self._current


def _without_place(target: ScanTarget) -> ScanTarget:
    """The target without its baseline's path: a file that moved is known by its identity."""
    return replace(target, baseline=Path())


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_ino, status.st_mtime_ns


def _has_exited(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _describe(target: ScanTarget) -> dict[str, Any]:
    return {
        "upper": str(target.upper),
        "lowers": [str(lower) for lower in target.lowers],
        "baseline": str(target.baseline),
        "excluded": list(target.excluded),
    }


async def _send(process: _Process, request: dict[str, Any]) -> None:
    body = json.dumps(request).encode()
    stdin = process.process.stdin
    assert stdin is not None  # noqa: S101  (it is a pipe)
    try:
        stdin.write(_LENGTH.pack(len(body)) + body)
        await stdin.drain()
    except (BrokenPipeError, ConnectionResetError):
        process.end("the scanner does not take requests")


def _cancel(process: _Process, request_id: int) -> None:
    """Tell the scanner that nobody waits any more: what it has not committed yet stays for the next request."""
    stdin = process.process.stdin
    if process.alive and stdin is not None and not stdin.is_closing():
        body = json.dumps({"op": "cancel", "id": request_id}).encode()
        stdin.write(_LENGTH.pack(len(body)) + body)


async def _receive(process: _Process) -> None:
    """Hand answers to those who wait, until the process is gone."""
    stdout = process.process.stdout
    assert stdout is not None  # noqa: S101  (it is a pipe)
    reason = "the scanner died"
    try:
        while True:
            (length,) = _LENGTH.unpack(await stdout.readexactly(_LENGTH.size))
            if length > _MAX_ANSWER_BYTES:
                raise ValueError(f"an answer of {length} bytes")
            received = json.loads(await stdout.readexactly(length))
            waiting = process.waiting.get(received["id"])
            if waiting is not None and not waiting.done():
                waiting.set_result(received)
    except asyncio.IncompleteReadError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        reason = f"the scanner answered nonsense: {error}"
    finally:
        process.end(reason)
        if process.process.stdin is not None:
            process.process.stdin.close()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                await process.process.stdin.wait_closed()
        status = await process.process.wait()
        os.close(process.pidfd)
        _log.info("%s (status %d)", reason, status)
