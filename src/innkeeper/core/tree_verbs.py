"""What the API process asks of a host daemon about trees of a guest's files; carried like `core.host_verbs`, paths spelled like there.

All of it happens in the guest, as its user. Errors: file_not_found, forbidden, conflict (a name that is taken, a full disk), invalid_request,
instance_not_found, instance_failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar
from uuid import UUID


@dataclass(frozen=True, slots=True)
class FindWorkdir:
    """Where a command begins that names no directory. Answer: `{"path"}`."""

    verb: ClassVar[str] = "tree.workdir"
    instance_id: UUID


@dataclass(frozen=True, slots=True)
class GlobFiles:
    """A page of the entries below a directory that a pattern takes (docs/guest-protocol.md).

    Answer: `{"entries": [{"path", "type", "size", "mode", "mtime_ns"}], "unreadable": int, "next_cursor": str|None}`, paths relative to the
    directory. A page may hold few entries or none: only an absent cursor is the end.
    """

    verb: ClassVar[str] = "tree.glob"
    instance_id: UUID
    path: str
    pattern: str
    cursor: str | None = None
    limit: int = 1_000


@dataclass(frozen=True, slots=True)
class SearchFiles:
    """A page of the lines of text files below a directory, or of one file, that hold something.

    Answer: `{"matches": [{"path", "line", "column", "text", "cut"}], "binary", "unreadable", "long_lines", "next_cursor": str|None}`; else as GlobFiles.
    """

    verb: ClassVar[str] = "tree.search"
    instance_id: UUID
    path: str
    query: str
    regex: bool = False
    ignore_case: bool = False
    include: str | None = None
    cursor: str | None = None
    limit: int = 1_000


@dataclass(frozen=True, slots=True)
class MakeDirectory:
    """Make a directory; with `parents` one that exists is no error. Answer: `{}`."""

    verb: ClassVar[str] = "tree.mkdir"
    instance_id: UUID
    path: str
    parents: bool = False


@dataclass(frozen=True, slots=True)
class RenamePath:
    """Give a file or directory another name. Answer: `{}`."""

    verb: ClassVar[str] = "tree.rename"
    instance_id: UUID
    path: str
    to: str
    replace: bool = False


@dataclass(frozen=True, slots=True)
class CopyPath:
    """Copy a file, or with `recursive` a directory; the copy has its name when it is whole. CANCEL leaves nothing.

    Streams: MESSAGE `{}` every few seconds. Answer: `{"files", "bytes", "skipped"}`.
    """

    verb: ClassVar[str] = "tree.copy"
    instance_id: UUID
    path: str
    to: str
    recursive: bool = False
    replace: bool = False


@dataclass(frozen=True, slots=True)
class RemovePath:
    """Remove a file, an empty directory, or with `recursive` all of a directory. Goes on to its end also when it is cancelled.

    Streams: MESSAGE `{}` every few seconds. Answer: `{}`.
    """

    verb: ClassVar[str] = "tree.remove"
    instance_id: UUID
    path: str
    recursive: bool = False


@dataclass(frozen=True, slots=True)
class PackTree:
    """What a directory holds, or one file, as a tar stream. Streams: MESSAGE `{}`, DATA. Answer: `{"files", "bytes"}`."""

    verb: ClassVar[str] = "tree.pack"
    instance_id: UUID
    path: str


@dataclass(frozen=True, slots=True)
class UnpackTree:
    """Unpack a tar archive, plain or compressed, into a directory, whole or not at all.

    The opener sends DATA and END. Answer: `{"files", "bytes", "skipped"}`.
    """

    verb: ClassVar[str] = "tree.unpack"
    instance_id: UUID
    path: str


@dataclass(frozen=True, slots=True)
class WatchTree:
    """Tell what changes in a directory, or with `recursive` in the tree below it, until cancelled or the directory is gone.

    Streams: MESSAGE `{"directories": int}` when it began; DATA, lines of JSON: `{"type": "created"|"modified"|"deleted"|"moved", "path", "from": str|None,
    "directory": bool}`, or `{"type": "overflow"}` where events were lost. Not MESSAGES: a reader that falls behind slows the guest's watch, which says so,
    and costs the bus nothing. Answer: `{}`. Errors: rate_limited (too many watches of the guest).
    """

    verb: ClassVar[str] = "tree.watch"
    instance_id: UUID
    path: str
    recursive: bool = False


VERBS: tuple[type[Any], ...] = (
    FindWorkdir,
    GlobFiles,
    SearchFiles,
    MakeDirectory,
    RenamePath,
    CopyPath,
    RemovePath,
    PackTree,
    UnpackTree,
    WatchTree,
)
