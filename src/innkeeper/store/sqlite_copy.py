"""A copy of a SQLite file, of what was committed last."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path


def copy_file(source: Path, target: Path) -> None:
    """Make `target` (0600, on disk) a copy of a database that may be in use. The source is opened read-only, so that not even its log moves.

    Raises FileExistsError; OSError, sqlite3.Error. A half-made target is the caller's to remove.
    """
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with (
        contextlib.closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as opened,
        contextlib.closing(sqlite3.connect(target)) as copied,
    ):
        opened.backup(copied)
        # One file, without a log beside it.
        copied.execute("PRAGMA journal_mode = DELETE")
    sync(target)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
