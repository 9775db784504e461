"""Admission: whether another guest fits the host."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from innkeeper.errors import NoHostError

FROZEN_SHARE = 0.25
MIB = 1_048_576
# A machine and its first commands take some dozens.
RESERVED_FILES = 1_000


@dataclass(frozen=True, slots=True)
class Load:
    """One guest's claim on memory."""

    memory_mb: int
    frozen: bool


@dataclass(frozen=True, slots=True)
class Admission:
    """The host's limits (docs/architecture.md section 5).

    The sum of the guests' memory, frozen ones counting a quarter, stays under (RAM - reserve) x overcommit; free disk over its reserve, in bytes
    and in files.
    """

    memory_overcommit: float
    memory_reserve_mb: int
    disk_reserve_mb: int
    disk_free_bytes: Callable[[], int]
    disk_free_files: Callable[[], int]

    def memory_limit_mb(self) -> int:
        """MiB that guests may be given in all."""
        return int((total_memory_mb() - self.memory_reserve_mb) * self.memory_overcommit)

    def check(self, wanted_mb: int, loads: Iterable[Load]) -> None:
        """Raise NoHostError when a guest of `wanted_mb` does not fit beside `loads`."""
        if committed_mb(loads) + wanted_mb > self.memory_limit_mb():
            raise NoHostError
        if self.disk_free_bytes() < self.disk_reserve_mb * MIB or self.disk_free_files() < RESERVED_FILES:
            raise NoHostError(f"{inspect.getdoc(NoHostError)}: the host's disk is full")


def committed_mb(loads: Iterable[Load]) -> int:
    """The memory that guests count for."""
    return int(sum(load.memory_mb * (FROZEN_SHARE if load.frozen else 1.0) for load in loads))


def total_memory_mb() -> int:
    """RAM of the host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB


def free_bytes(path: Path) -> int:
    """Free bytes of the file system under `path`, for unprivileged use."""
    return shutil.disk_usage(path).free
