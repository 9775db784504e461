"""Processes that a killed daemon's starts left outside of any machine's group, known by their command lines."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Set
from pathlib import Path

from innkeeper.host.linux.pidfd import PidFd

STRAY_SECONDS = 10.0
WORDS_SHOWN = 120


class Strays:
    """What a driver's starts leave.

    Args:
        mark: a word of the command line that only this server's processes have.
        machine: finds the ids of machines in a command line, as its first group.

    """

    def __init__(self, mark: bytes, machine: re.Pattern[bytes]) -> None:
        self._mark = mark
        self._machine = machine

    def names(self, keep: Set[str]) -> list[tuple[str, str]]:
        """The strays that name no machine of `keep`: pid and the beginning of the command line, and the machine's id."""
        found = []
        for process, line in self._all(keep):
            with process:
                words = line.replace(b"\0", b" ").decode(errors="replace")[:WORDS_SHOWN].strip()
                found.append((f"{process.pid} {words}", min(self._machines_in(line), default="unknown")))
        return found

    async def end(self, keep: Set[str]) -> int:
        """Kill the strays that name no machine of `keep`; how many there were. Raises TimeoutError when one does not go."""
        strays = [process for process, _ in self._all(keep)]
        try:
            for process in strays:
                process.send_signal(signal.SIGKILL)
            async with asyncio.timeout(STRAY_SECONDS):
                for process in strays:
                    await process.wait()
        finally:
            for process in strays:
                process.close()
        return len(strays)

    def _all(self, keep: Set[str]) -> list[tuple[PidFd, bytes]]:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - names only, thousands of them
        return [stray for pid in pids if (stray := self._stray(pid, keep)) is not None]

    def _stray(self, pid: int, keep: Set[str]) -> tuple[PidFd, bytes] | None:
        """A process and its command line, if it is a stray. And root's, since anybody may have such a command line."""
        path = Path(f"/proc/{pid}")
        try:
            if self._mark not in (path / "cmdline").read_bytes():
                return None
            process = PidFd(pid)
        except OSError:
            return None
        try:
            # Again, now that the pid cannot become another process's.
            line = (path / "cmdline").read_bytes()
            if self._mark in line.split(b"\0") and path.stat().st_uid == 0 and not self._machines_in(line) & keep:
                return process, line
        except OSError:
            pass
        process.close()
        return None

    def _machines_in(self, line: bytes) -> set[str]:
        return {name.decode(errors="replace") for name in self._machine.findall(line)}
