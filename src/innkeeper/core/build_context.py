"""Which files of a build context a COPY takes, and under which names they arrive. Pure: it works on an index of the context's tar stream."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from innkeeper.path_pattern import PatternError, wildcard


class ContextError(ValueError):
    """A source that is not there, or a name that cannot be; the message says which."""


@dataclass(frozen=True, slots=True)
class ContextEntry:
    """One member of the context: type `file`, `dir` or `symlink`. `path` is relative, without `.` and `..`; `offset` is where a file's bytes lie.

    `digest` is the SHA-256 of a file's bytes, "" for others; `archive` whether ADD unpacks it.
    """

    path: str
    type: str
    mode: int
    size: int = 0
    offset: int = 0
    target: str = ""
    digest: str = ""
    archive: bool = False


@dataclass(frozen=True, slots=True)
class Selected:
    """An entry under the name that it gets below the destination; "" is the destination itself."""

    name: str
    entry: ContextEntry


def select(index: Mapping[str, ContextEntry], sources: Iterable[str]) -> list[Selected]:
    """What the sources take, in order of their names below the destination: a file by its own name, a directory by what it holds.

    Raises:
        ContextError: a source takes nothing.

    """
    found: dict[str, Selected] = {}
    for source in sources:
        taken = _matches(index, source)
        if not taken:
            raise ContextError(f"{source}: no such file or directory in the build context")
        for path in taken:
            entry = index.get(path)
            if path and entry is not None and entry.type != "dir":
                name = posixpath.basename(path)
                found[name] = Selected(name, entry)
                continue
            prefix = f"{path}/" if path else ""
            for below in index.values():
                if below.path.startswith(prefix) and below.path != path:
                    name = below.path[len(prefix) :]
                    found[name] = Selected(name, below)
    return [found[name] for name in sorted(found)]


def takes_one_file(index: Mapping[str, ContextEntry], sources: tuple[str, ...]) -> bool:
    """Whether the sources are a single file, which may then take the destination as its name."""
    taken = [path for source in sources for path in _matches(index, source)]
    return len(taken) == 1 and bool(taken[0]) and (entry := index.get(taken[0])) is not None and entry.type != "dir"


def content_digest(selected: Iterable[Selected]) -> str:
    """A digest of names, types, modes and contents: what a cached step depends on. Times are no part of it, as a checkout changes them all."""
    digest = hashlib.sha256()
    for one in selected:
        entry = one.entry
        for field in (one.name, entry.type, f"{entry.mode:o}", entry.target, entry.digest):
            encoded = field.encode("utf-8", "surrogateescape")
            digest.update(b"%d:" % len(encoded) + encoded)
    return digest.hexdigest()


def _matches(index: Mapping[str, ContextEntry], source: str) -> list[str]:
    if source == ".":
        return [""]
    if not any(char in source for char in "*?[\\"):
        return [source] if source in index else []
    try:
        pattern = wildcard(source)
    except PatternError as error:
        raise ContextError(str(error)) from None
    return sorted(path for path in index if pattern.fullmatch(path))
