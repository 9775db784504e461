"""How much is kept of an instance's executions, which of them go first, and when it is worth looking."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

INSTANCE_BYTES = 512 * 1_048_576
# Records without output are small but not free: a room that runs a million commands keeps the newest of them.
INSTANCE_EXECUTIONS = 10_000
# Everything that an execution leaves: the last one is its file changes, which the scanner writes. Earlier versions left `.new`.
SUFFIXES = (".json", ".new", ".running", ".head", ".tail", ".channels", ".results", ".changes")
# What may come before the folders are looked through: before they were for the first time, and beyond the limits.
UNSEEN_EXECUTIONS, UNSEEN_BYTES = 64, 16 * 1_048_576
OVER_EXECUTIONS, OVER_BYTES = INSTANCE_EXECUTIONS // 16, INSTANCE_BYTES // 16


@dataclass(slots=True)
class Headroom:
    """What may still come of an instance's executions before it is worth looking whether some have to go.

    To look through the folders of a full instance takes 0.13 s of processor time, while every other guest's commands wait for the interpreter's lock: a
    command must not have that done for a few hundred kilobytes.
    """

    executions: int = UNSEEN_EXECUTIONS
    bytes: int = UNSEEN_BYTES

    def take(self, size_bytes: int) -> None:
        """Count an execution that has come."""
        self.executions -= 1
        self.bytes -= size_bytes

    @property
    def used_up(self) -> bool:
        """Whether it is time to look."""
        return self.executions <= 0 or self.bytes <= 0


def size_of(execution: str, *directories: Path) -> int:
    """The bytes that one execution takes in all of its instance's folders."""
    size = 0
    for directory in directories:
        for suffix in SUFFIXES:
            with suppress(FileNotFoundError):
                # Not a Path: every command comes by here.
                size += os.stat(f"{directory}/{execution}{suffix}").st_blocks * 512  # noqa: PTH116
    return size


def _sizes(directories: tuple[Path, ...]) -> Iterator[tuple[str, float, int]]:
    """(execution, time of its last change, bytes) of every file; none of a folder that went meanwhile."""
    for directory in directories:
        try:
            entries = list(os.scandir(directory))
        except FileNotFoundError:
            continue
        for entry in entries:
            stem, _, suffix = entry.name.partition(".")
            if f".{suffix}" in SUFFIXES:
                # Renamed or removed since the directory was read.
                with suppress(FileNotFoundError):
                    info = entry.stat(follow_symlinks=False)
                    yield stem, info.st_mtime, info.st_blocks * 512


@dataclass(frozen=True, slots=True)
class Excess:
    """The executions that have to go, with their bytes, and what the others leave of the limits."""

    sizes: dict[str, int]
    headroom: Headroom


def beyond_limits(
    *directories: Path,
    keep: frozenset[str],
    max_bytes: int = INSTANCE_BYTES,
    max_executions: int = INSTANCE_EXECUTIONS,
    older_than: float = 0.0,
) -> Excess:
    """The oldest executions of an instance beyond its limits, and those from before `older_than` (Unix time).

    None of `keep` (running) is among them. May take a second.
    """
    found: dict[str, tuple[float, int]] = {}
    for stem, changed_at, size in _sizes(directories):
        newest, total = found.get(stem, (0.0, 0))
        found[stem] = (max(newest, changed_at), total + size)
    used, count = sum(size for _, size in found.values()), len(found)
    beyond: dict[str, int] = {}
    for stem, (newest, size) in sorted(found.items(), key=lambda item: item[1][0]):
        if used <= max_bytes and count <= max_executions and newest >= older_than:
            break
        if stem not in keep:
            beyond[stem] = size
            used, count = used - size, count - 1
    return Excess(beyond, Headroom(max_executions - count + OVER_EXECUTIONS, max_bytes - used + OVER_BYTES))


def prune(
    *directories: Path,
    keep: frozenset[str],
    max_bytes: int = INSTANCE_BYTES,
    max_executions: int = INSTANCE_EXECUTIONS,
    older_than: float = 0.0,
) -> Excess:
    """Drop what is `beyond_limits`, and tell what that was. May take a second."""
    excess = beyond_limits(
        *directories, keep=keep, max_bytes=max_bytes, max_executions=max_executions, older_than=older_than
    )
    for stem in excess.sizes:
        for directory in directories:
            for suffix in SUFFIXES:
                (directory / f"{stem}{suffix}").unlink(missing_ok=True)
    return excess
