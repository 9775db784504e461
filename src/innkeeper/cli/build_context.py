"""What `inn image build` sends: a folder as a tar stream, without what its .dockerignore names."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from innkeeper.cli.dockerignore import IgnoreRule, ignore_rules, is_ignored
from innkeeper.cli.printing import USAGE, fail, note
from innkeeper.path_pattern import PatternError

PIECE_BYTES = 262_144
_BLOCK = 512


def read_rules(folder: Path) -> list[IgnoreRule]:
    """The rules of the folder's .dockerignore; none where there is no such file."""
    try:
        return ignore_rules((folder / ".dockerignore").read_text())
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, PatternError) as error:
        fail(f"{folder / '.dockerignore'}: {error}", status=USAGE)


def tar_pieces(folder: Path, rules: Sequence[IgnoreRule]) -> Iterator[bytes]:
    """The folder as a tar stream, names in order, so that the same folder gives the same stream."""
    try:
        yield from _folder(folder, "", rules)
    except OSError as error:
        fail(f"{error.filename or folder}: {error.strerror or error}")
    yield b"\0" * (2 * _BLOCK)


def _folder(folder: Path, prefix: str, rules: Sequence[IgnoreRule]) -> Iterator[bytes]:
    # A folder that is left out may still hold what a later rule takes back.
    takes_back = any(rule.again for rule in rules)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = prefix + entry.name
        ignored = is_ignored(name, rules)
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            if not ignored:
                yield _header(name, path, tarfile.DIRTYPE)
            if not ignored or takes_back:
                yield from _folder(path, f"{name}/", rules)
        elif ignored:
            continue
        elif entry.is_symlink():
            yield _header(name, path, tarfile.SYMTYPE, target=os.readlink(path))  # noqa: PTH115  # Path would tidy it up
        elif entry.is_file(follow_symlinks=False):
            yield from _file(name, path)
        else:
            note(f"inn: {path} is left out: neither a file, a directory nor a symlink")


def _file(name: str, path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        yield _header(name, path, tarfile.REGTYPE, size=size)
        left = size
        while left:
            piece = file.read(min(PIECE_BYTES, left))
            if not piece:
                raise OSError(0, "the file became shorter while it was read", str(path))
            left -= len(piece)
            yield piece
        yield b"\0" * (-size % _BLOCK)


def _header(name: str, path: Path, kind: bytes, *, target: str = "", size: int = 0) -> bytes:
    status = path.lstat()
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    # Owners of this machine mean nothing in an image.
    info.mode, info.mtime = status.st_mode & 0o7777, int(status.st_mtime)
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
