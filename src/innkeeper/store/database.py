"""The database behind one small door: `write` and `read` run plain synchronous functions of a Connection.

Which engine is behind it is decided by the URL. Queries never know, nor does anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import sqlalchemy as sa

P = ParamSpec("P")
T = TypeVar("T")

Query = Callable[Concatenate[sa.Connection, P], T]


@dataclass(slots=True)
class DatabaseLoad:
    """What a database did since it was opened. Seconds are those that callers waited; a transaction may hold several writes."""

    writes: int = 0
    write_seconds: float = 0.0
    transactions: int = 0
    reads: int = 0
    read_seconds: float = 0.0
    waiting: int = 0


class Database(Protocol):
    """One database. Every function runs in a transaction of its own, off the event loop."""

    load: DatabaseLoad
    # One process owns the database: leases that it finds at its start are its own dead ones.
    exclusive: bool

    async def write(self, query: Query[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What the query returns, once its transaction is committed. An exception rolls it back and comes out here.

        A cancelled caller does not undo a write that has begun.
        """
        ...

    async def read(self, query: Query[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What the query returns; it sees all writes that were answered before."""
        ...

    async def copy_to(self, path: Path, prepare: Callable[[sa.Connection], None]) -> None:
        """Make a copy in a new file (0600), of all writes that were answered before, and let `prepare` change the copy. Raises FileExistsError, OSError."""
        ...

    async def close(self) -> None:
        """Finish the queued writes and let go. Idempotent."""
        ...


async def open_database(url: str, *, on_migration: Callable[[str], None] = lambda _: None) -> Database:
    """The database of a SQLAlchemy URL, its schema brought to the newest revision; `on_migration` hears of the one that it had, in a thread.

    Raises:
        ValueError: a kind of database that this server cannot use.
        DatabaseNewerError, MigrationFailedError: see `store.migrate`; nothing was changed.

    """
    from innkeeper.store.sqlite import SqliteDatabase

    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise ValueError("database_url: not a SQLAlchemy URL") from error
    if parsed.get_backend_name() != "sqlite" or parsed.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise ValueError(f"database_url: {parsed.drivername!r} is not supported; use sqlite:////path/to/file")
    if not parsed.database or parsed.database == ":memory:" or "mode=memory" in parsed.database:
        raise ValueError("database_url: a SQLite database needs a file; one in memory is not supported")
    return await SqliteDatabase.open(parsed, on_migration=on_migration)
