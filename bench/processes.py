"""Memory and processor time of processes, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def pss_mb(pid: int) -> float:
    """Proportional set size; 0 for a process that is gone."""
    return _rollup_mb(pid, ("Pss:",))


def private_mb(pid: int) -> float:
    """Memory that no other process shares: what grows with use, whatever else runs on the machine."""
    return _rollup_mb(pid, ("Private_Clean:", "Private_Dirty:"))


def _rollup_mb(pid: int, names: tuple[str, ...]) -> float:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (OSError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith(names)) / 1024


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time so far, of all threads."""
    total = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (OSError, ProcessLookupError):
            continue
        total += int(fields[11]) + int(fields[12])
    return total / TICKS_PER_SECOND


def reset_peak(pid: int) -> float:
    """Forget the highest resident size so far; returns the present one in MB."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _status_mb(pid, "VmRSS")


def peak_mb(pid: int) -> float:
    """The highest resident size since `reset_peak`."""
    return _status_mb(pid, "VmHWM")


def _status_mb(pid: int, name: str) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name}:")) / 1024
