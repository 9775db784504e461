"""Which files of a build context a COPY takes, and under which names they arrive. Pure: it works on an index of the context's tar stream."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from innkeeper.path_pattern import PatternError, wildcard

LINKS_MAX = 40


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
    mtime: int = 0


@dataclass(frozen=True, slots=True)
class Selected:
    """An entry under the name that it gets below the destination; "" is the destination itself."""

    name: str
    entry: ContextEntry


def select(index: Mapping[str, ContextEntry], sources: Iterable[str]) -> list[Selected]:
    """What the sources take, in order of their names below the destination: a file by its own name, a directory by what it holds.

    A symlink that is named itself is followed within the context; one below a directory is copied as it is.

    Raises:
        ContextError: a source takes nothing.

    """
    found: dict[str, Selected] = {}
    for name, path in _taken(index, sources):
        entry = index.get(path)
        if path and entry is not None and entry.type != "dir":
            found[name] = Selected(name, entry)
            continue
        prefix = f"{path}/" if path else ""
        for below in index.values():
            if below.path.startswith(prefix) and below.path != path:
                found[below.path[len(prefix) :]] = Selected(below.path[len(prefix) :], below)
    return [found[name] for name in sorted(found)]


def takes_one_file(index: Mapping[str, ContextEntry], sources: Iterable[str]) -> bool:
    """Whether the sources are a single file, which may then take the destination as its name. Raises ContextError."""
    taken = [path for _, path in _taken(index, sources)]
    return len(taken) == 1 and (entry := index.get(taken[0])) is not None and entry.type != "dir"


def content_digest(selected: Iterable[Selected]) -> str:
    """A digest of names, types, modes and contents: what a cached step depends on. Times are no part of it, as a checkout changes them all."""
    digest = hashlib.sha256()
    for one in selected:
        entry = one.entry
        for field in (one.name, entry.type, f"{entry.mode:o}", entry.target, entry.digest):
            encoded = field.encode("utf-8", "surrogateescape")
            digest.update(b"%d:" % len(encoded) + encoded)
    return digest.hexdigest()


def _taken(index: Mapping[str, ContextEntry], sources: Iterable[str]) -> list[tuple[str, str]]:
    """(name, path) of what the sources name, links followed."""
    taken = []
    for source in sources:
        found = [
            (posixpath.basename(path), resolved)
            for path in _matches(index, source)
            if (resolved := _resolve(index, path)) is not None
        ]
        if not found:
            raise ContextError(f"{source}: no such file or directory in the build context")
        taken += found
    return taken


def _matches(index: Mapping[str, ContextEntry], source: str) -> list[str]:
    if not any(char in source for char in "*?[\\"):
        return ["" if source == "." else source]
    try:
        pattern = wildcard(source)
    except PatternError as error:
        raise ContextError(str(error)) from None
    return sorted(path for path in index if pattern.fullmatch(path))


def _resolve(index: Mapping[str, ContextEntry], path: str) -> str | None:
    """The path with every link on it followed, the context being the root; None where that leads to nothing."""
    resolved: list[str] = []
    left = path.split("/")[::-1]
    hops = 0
    while left:
        part = left.pop()
        if part in ("", "."):
            continue
        if part == "..":
            del resolved[-1:]
            continue
        entry = index.get("/".join([*resolved, part]))
        if entry is None:
            return None
        if entry.type != "symlink":
            resolved.append(part)
            continue
        hops += 1
        if hops > LINKS_MAX:
            return None
        if entry.target.startswith("/"):
            resolved = []
        left += entry.target.split("/")[::-1]
    return "/".join(resolved)
