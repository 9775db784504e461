"""`inn cp`: files and directories into and out of a room or a VM.

Names in a guest are its own: they are checked before they become local names, links and devices are never followed or made, and a
local file appears whole under its name or not at all.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from innkeeper.cli.connection import Server, connect, refused
from innkeeper.cli.guest_files import Entry, GuestFiles, entries, parse_place
from innkeeper.cli.options import Json
from innkeeper.cli.printing import FAILED, USAGE, fail, human_size, note, print_json, visible

if TYPE_CHECKING:
    import httpx2

CHUNK_BYTES = 1 << 20
# A guest can nest directories, and answer listings, without end.
MAX_DEPTH = 100
# How rooms and VMs say that a path is no regular file.
NOT_A_FILE = (400, 422)


@dataclass(slots=True)
class Tally:
    """What a copy did: bytes and files copied, entries that were left out."""

    files: int = 0
    size: int = 0
    skipped: int = 0

    def skip(self, what: object, why: str) -> None:
        """Leave an entry out, and say so."""
        self.skipped += 1
        note(f"inn: skipped {visible(what)}: {why}")


def cp(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="PROFILE/ROOM:/path, VM:path, or a local path.")],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="The other kind. An existing directory takes the source in.")
    ],
    json: Json = False,
) -> None:
    """Copy a file or directory into a room or VM or out of it."""
    from_, to = parse_place(source), parse_place(target)
    tally = Tally()
    if not isinstance(from_, Path) and isinstance(to, Path):
        server = connect(ctx)
        Download(server, from_.files(server), tally).copy(from_.path, to, into=target.endswith("/"))
    elif isinstance(from_, Path) and not isinstance(to, Path):
        server = connect(ctx)
        Upload(server, to.files(server), tally).copy(from_, to.path)
    else:
        fail("one of the two must be PROFILE/ROOM:/path or VM:path, the other a local path", status=USAGE)
    if json:
        print_json({"files": tally.files, "bytes": tally.size, "skipped": tally.skipped})
    else:
        note(f"{tally.files} file{'' if tally.files == 1 else 's'}, {human_size(tally.size)}")
    if tally.skipped:
        raise SystemExit(FAILED)


class Download:
    """Out of a guest."""

    def __init__(self, server: Server, files: GuestFiles, tally: Tally) -> None:
        self._server = server
        self._files = files
        self._tally = tally

    def copy(self, path: bytes, target: Path, *, into: bool) -> None:
        """Copy one path to `target`, or under its own name into it when it is a directory."""
        if (into or target.is_dir()) and (name := local_name(path.rstrip(b"/").rpartition(b"/")[2])) is not None:
            target = target / name
        with self._reading(path) as response:
            if response.status_code == 200:
                self._save(response, target, 0o644)
                return
            if response.status_code not in NOT_A_FILE:
                refused(response)
        # Not a regular file. Its listing says whether it is a directory, and if not, why not.
        self._directory(path, target, depth=0)

    def _reading(self, path: bytes) -> AbstractContextManager[httpx2.Response]:
        url, query = self._files.content(path)
        return self._server.stream("GET", url, params=query)

    def _directory(self, path: bytes, target: Path, *, depth: int) -> None:
        if depth > MAX_DEPTH:
            self._tally.skip(target, "nested too deeply")
            return
        found = entries(self._server, self._files, path)
        first = next(found, None)
        try:
            target.mkdir(exist_ok=True)
        except OSError as error:
            fail(f"{target}: {error.strerror}")
        while first is not None:
            self._entry(first, target, depth=depth)
            first = next(found, None)

    def _entry(self, entry: Entry, target: Path, *, depth: int) -> None:
        name = local_name(entry.name)
        if name is None:
            self._tally.skip(os.fsdecode(entry.path), "not a name for a file here")
        elif entry.type == "dir":
            self._directory(entry.path, target / name, depth=depth + 1)
        elif entry.type != "file":
            self._tally.skip(target / name, f"a {entry.type}, which is not copied")
        else:
            with self._reading(entry.path) as response:
                if response.status_code == 200:
                    self._save(response, target / name, entry.mode)
                elif response.status_code in (*NOT_A_FILE, 403, 404):
                    self._tally.skip(target / name, "gone, changed or not readable meanwhile")
                else:
                    refused(response)

    def _save(self, response: httpx2.Response, target: Path, mode: int) -> None:
        try:
            with written_whole(target, mode) as file:
                for chunk in response.iter_bytes(CHUNK_BYTES):
                    file.write(chunk)
                    self._tally.size += len(chunk)
        except OSError as error:
            fail(f"{target}: {error.strerror}")
        self._tally.files += 1


def local_name(name: bytes) -> str | None:
    """A name in a guest as a local file name, None when it must not become one."""
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        return None
    return os.fsdecode(name)


@contextlib.contextmanager
def written_whole(target: Path, mode: int) -> Iterator[Any]:
    """A file that takes its name when everything was written. A link at the target is replaced, not followed; never set-uid."""
    fd, name = tempfile.mkstemp(prefix=".inn-cp-", dir=target.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            mask = os.umask(0o022)
            os.umask(mask)
            os.fchmod(file.fileno(), mode & 0o777 & ~mask)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class Upload:
    """Into a guest."""

    def __init__(self, server: Server, files: GuestFiles, tally: Tally) -> None:
        self._server = server
        self._files = files
        self._tally = tally

    def copy(self, source: Path, path: bytes) -> None:
        """Copy a local file or directory to a guest path; into it when that ends in a slash or is a directory there."""
        if not source.exists():
            fail(f"{source} does not exist")
        if path.endswith(b"/") or self._is_directory(path):
            path = path.rstrip(b"/") + b"/" + os.fsencode(source.resolve().name)
        if source.is_dir():
            self._directory(source, path)
        elif source.is_file():
            self._file(source, path)
        else:
            fail(f"{source} is neither a file nor a directory")

    def _is_directory(self, path: bytes) -> bool:
        url, query = self._files.listing(path)
        with self._server.stream("GET", url, params={**query, "limit": "1"}) as response:
            return response.status_code == 200

    def _directory(self, source: Path, path: bytes) -> None:
        # The server makes parents, so an empty directory is the only thing that does not arrive.
        for entry in sorted(os.scandir(source), key=lambda one: one.name):
            below = path + b"/" + os.fsencode(entry.name)
            if entry.is_dir(follow_symlinks=False):
                self._directory(Path(entry.path), below)
            elif entry.is_file(follow_symlinks=False):
                self._file(Path(entry.path), below)
            else:
                self._tally.skip(entry.path, "neither a file nor a directory")

    def _file(self, source: Path, path: bytes) -> None:
        try:
            with source.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
                url, query = self._files.content(path)
                content = announced_chunks(file, size)
                with self._server.stream("PUT", url, params=query, content=content, headers=headers) as response:
                    if response.is_error:
                        refused(response)
                    response.read()
        except OSError as error:
            fail(f"{source}: {error.strerror}")
        self._tally.files += 1
        self._tally.size += size


def announced_chunks(file: Any, size: int) -> Iterator[bytes]:
    """Exactly `size` bytes, the announced length, though the file may grow meanwhile; a file that shrank breaks the request off."""
    while size > 0:
        chunk = file.read(min(CHUNK_BYTES, size))
        if not chunk:
            raise OSError(0, "the file became shorter while it was copied")
        size -= len(chunk)
        yield chunk
