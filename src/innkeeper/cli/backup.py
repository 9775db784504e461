"""`inn backup` and `inn restore`: the whole state of a server as one file, and back."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from innkeeper.cli.connection import connect, refused
from innkeeper.cli.options import Config, Json
from innkeeper.cli.printing import USAGE, fail, human_size, note, print_json, say
from innkeeper.cli.serve import read_settings

if TYPE_CHECKING:
    from innkeeper.restore import Restored

PROGRESS_SECONDS = 0.5
QUIET_PROGRESS_SECONDS = 30.0
# Of what a backup held: lists of its members.
UNTOLD = ("entries", "guest_written", "immutable")


class Progress:
    """How far it is, on stderr: one line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, total
        self._terminal = sys.stderr.isatty()
        self._next = time.monotonic() + (PROGRESS_SECONDS if self._terminal else QUIET_PROGRESS_SECONDS)
        self._shown = False

    def __call__(self, done: int) -> None:
        """Tell, unless it was told a moment ago."""
        if time.monotonic() < self._next:
            return
        line = f"{self._what}: {human_size(done)} of about {human_size(max(done, self._total))}"
        print(
            f"\r\x1b[K{line}" if self._terminal else line,
            end="" if self._terminal else "\n",
            file=sys.stderr,
            flush=True,
        )
        self._shown = True
        self._next = time.monotonic() + (PROGRESS_SECONDS if self._terminal else QUIET_PROGRESS_SECONDS)

    def end(self) -> None:
        """Take the changing line away."""
        if self._terminal and self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def backup(
    ctx: typer.Context,
    target: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|DIR", help="File to make, or a directory to make one in that is named by the time."
        ),
    ],
    json: Json = False,
) -> None:
    """Back the server's whole state up while it runs: database, secrets key, images, volumes and the disks of all rooms.

    Over the unix socket alone. The file holds every tenant's data and the key: keep it as secret as the state directory. It appears whole or not at all.
    """
    if target.is_dir():
        target /= time.strftime("innkeeper-%Y%m%dT%H%M%SZ.tar", time.gmtime())
    if target.exists() or target.is_symlink():
        fail(f"{target} exists already", status=USAGE)
    server = connect(ctx)
    with server.stream("POST", "/v1/backup", json={}) as response:
        if response.status_code != 200:
            refused(response)
        rooms = int(response.headers.get("innkeeper-rooms", "0"))
        progress = Progress("backing up", int(response.headers.get("innkeeper-estimated-bytes", "0")))
        size = 0
        with _appearing(target) as descriptor:
            for piece in response.iter_raw(1 << 20):
                _write_all(descriptor, piece)
                size += len(piece)
                progress(size)
        progress.end()
    if json:
        print_json({"file": str(target), "bytes": size, "rooms": rooms})
    else:
        say(
            f"{target}: {rooms} room{'' if rooms == 1 else 's'}, {human_size(size)}; look through it with: inn restore --check {target}"
        )


def _write_all(descriptor: int, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(descriptor, view) :]


@contextmanager
def _appearing(target: Path) -> Iterator[int]:
    """A descriptor of a new file (0600) that gets its name when the block ends well, and is gone otherwise."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        fail(f"{target.parent}: {error.strerror}")
    try:
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        # Not a rename, which would replace what appeared there meanwhile.
        os.link(name, target)
    except OSError as error:
        fail(f"{target}: {error.strerror}")
    finally:
        Path(name).unlink(missing_ok=True)


def restore(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that inn backup made.")],
    home: Annotated[
        Path | None, typer.Option(help="State directory, empty or not there yet.", show_default="/var/lib/innkeeper")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only read all of it and hold it against its checksums.")
    ] = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Make an empty state directory what a backup holds; then start the server on it. Needs root.

    Each room's next command starts it on its disk as it was at the moment of the backup.
    """
    import logging

    import structlog

    from innkeeper.errors import InnkeeperError
    from innkeeper.restore import restore_now, verify

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    settings = read_settings(ctx, home, config).settings
    try:
        progress = Progress("checking" if check else "restoring", file.stat().st_size)
        found = verify(file, progress=progress) if check else restore_now(settings, file, progress=progress)
        progress.end()
    except InnkeeperError as error:
        fail(error.message)
    except OSError as error:
        fail(f"{file}: {error.strerror}")
    if json:
        print_json({name: getattr(found, name) for name in type(found).__dataclass_fields__ if name not in UNTOLD})
        return
    _report(found, "is whole" if check else f"is restored: inn serve --home {settings.home}", file)


def _report(found: Restored, outcome: str, file: Path) -> None:
    rooms = f"{found.instances} room{'' if found.instances == 1 else 's'}"
    if found.volumes:
        rooms += f", {found.volumes} volume{'' if found.volumes == 1 else 's'}"
    say(
        f"{file} of {found.created_at} (version {found.version}) {outcome}; {rooms}, "
        f"{human_size(found.archived_bytes)}, disks of {human_size(found.disk_bytes)} with their holes"
    )
    if not found.has_key:
        note("inn: the secrets key is not in it: the server had it from INNKEEPER_MASTER_KEY, and needs it again")
