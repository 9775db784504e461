"""SQLite for asyncio: one writer thread and a few reader threads.

SQLite has one writer anyhow; a queue in front of it makes waiting fair and free of SQLITE_BUSY. Writes that queued up while
another one committed share the next transaction, each behind a savepoint of its own.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
import structlog
from sqlalchemy.pool import QueuePool

from innkeeper.errors import UnavailableError
from innkeeper.store.database import DatabaseLoad, P, Query
from innkeeper.store.migrate import migrate
from innkeeper.store.sqlite_copy import copy_file, sync

log = structlog.stdlib.get_logger(__name__)

T = TypeVar("T")

READERS = 3
GROUP_MAX = 64
BUSY_TIMEOUT_MS = 10_000
# Room in the database and its log for what is to be written while the disk is full: rooms that are deleted to make space, above all.
RESERVE_BYTES = 4 << 20
_FULL = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE})


@dataclass(slots=True)
class _Write:
    run: Callable[[sa.Connection], Any]
    future: ThreadFuture[Any] = field(default_factory=ThreadFuture)


class SqliteDatabase:
    """A SQLite file (see `Database`).

    `synchronous=NORMAL` in WAL mode: a killed process loses nothing; a power cut may lose the last moment, never the file.
    """

    exclusive = True

    def __init__(self, url: sa.URL) -> None:
        self._writes: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._write_engine = _engine(url, begin="BEGIN IMMEDIATE", query_only=False)
        self._read_engine = _engine(url, begin="BEGIN", query_only=True)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-read")
        self._writer = threading.Thread(target=self._write_loop, name="store-write", daemon=True)
        self._closed = False
        self.load = DatabaseLoad()
        self._writer.start()

    @classmethod
    async def open(cls, url: sa.URL, *, on_migration: Callable[[str], None] = lambda _: None) -> SqliteDatabase:
        """The database of a file, made and migrated where needed."""
        await asyncio.to_thread(migrate, url, on_migration=on_migration)
        opened = cls(url)
        try:
            await opened.write(_take_reserve)
            await opened.write(_free_reserve)
        except UnavailableError:
            # Full already: a server that can be asked to delete rooms is worth more than none.
            log.error("no room for the database's reserve: the disk is full")
        return opened

    async def write(self, query: Query[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """See `Database.write`."""
        if self._closed:
            raise RuntimeError("the database is closed")
        write = _Write(lambda connection: query(connection, *args, **kwargs))
        self.load.waiting += 1
        began = time.monotonic()
        answer = asyncio.wrap_future(write.future)
        # On the event loop, also for a caller that is cancelled meanwhile.
        answer.add_done_callback(lambda _: self._note_write(time.monotonic() - began))
        self._writes.put(write)
        # Shielded: cancelling a ThreadFuture that nobody runs yet would drop the write of a client that disconnected.
        result: T = await asyncio.shield(answer)
        return result

    def _note_write(self, seconds: float) -> None:
        self.load.waiting -= 1
        self.load.writes += 1
        self.load.write_seconds += seconds

    async def read(self, query: Query[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """See `Database.read`."""

        def run() -> T:
            with self._read_engine.begin() as connection:
                return query(connection, *args, **kwargs)

        began = time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, run)
        finally:
            self.load.reads += 1
            self.load.read_seconds += time.monotonic() - began

    async def copy_to(self, path: Path, prepare: Callable[[sa.Connection], None]) -> None:
        """See `Database.copy_to`."""
        await asyncio.to_thread(_copy, Path(self._read_engine.url.database or ""), path, prepare)

    async def close(self) -> None:
        """See `Database.close`."""
        if self._closed:
            return
        self._closed = True
        self._writes.put(None)
        await asyncio.to_thread(self._writer.join)
        await asyncio.to_thread(self._readers.shutdown)
        self._read_engine.dispose()
        self._write_engine.dispose()

    def _write_loop(self) -> None:
        with self._write_engine.connect() as connection:
            more = True
            while more:
                first = self._writes.get()
                if first is None:
                    return
                group = [first]
                while len(group) < GROUP_MAX:
                    try:
                        following = self._writes.get_nowait()
                    except queue.Empty:
                        break
                    if following is None:
                        more = False
                        break
                    group.append(following)
                _commit(connection, group)
                self.load.transactions += 1


def _commit(connection: sa.Connection, group: list[_Write]) -> None:
    """Run the writes in one transaction and answer each of them after the commit."""
    outcomes: list[tuple[_Write, Any, Exception | None]] = []
    try:
        with connection.begin():
            for write in group:
                if len(group) == 1:
                    outcomes.append((write, write.run(connection), None))
                    break
                savepoint = connection.begin_nested()
                try:
                    outcomes.append((write, write.run(connection), None))
                    savepoint.commit()
                except Exception as error:
                    if outcomes and outcomes[-1][0] is write:
                        outcomes.pop()
                    savepoint.rollback()
                    outcomes.append((write, None, _clear(error)))
    except Exception as error:
        # A single write that raised, or a failed commit: nothing of the group is stored.
        outcomes = [(write, None, _clear(error)) for write in group]
    for write, value, failure in outcomes:
        if failure is None:
            write.future.set_result(value)
        else:
            write.future.set_exception(failure)


def _clear(error: Exception) -> Exception:
    """What a client may read where the disk is full; any other error as it is."""
    cause = getattr(error, "orig", None)
    if getattr(cause, "sqlite_errorcode", None) in _FULL:
        return UnavailableError("The server's disk is full", retry_after_seconds=30)
    return error


def _take_reserve(connection: sa.Connection) -> None:
    """Make the write-ahead log large: it keeps its size, and its blocks are written again."""
    connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS _reserve (content BLOB)")
    connection.exec_driver_sql("INSERT INTO _reserve VALUES (zeroblob(?))", (RESERVE_BYTES,))


def _free_reserve(connection: sa.Connection) -> None:
    """Give the pages back to the file, which keeps its size too."""
    connection.exec_driver_sql("DROP TABLE IF EXISTS _reserve")


def _copy(source: Path, target: Path, prepare: Callable[[sa.Connection], None]) -> None:
    copy_file(source, target)
    engine = sa.create_engine(sa.URL.create("sqlite", database=str(target)), poolclass=sa.NullPool)
    try:
        with engine.begin() as connection:
            prepare(connection)
    finally:
        engine.dispose()
    sync(target)


def _engine(url: sa.URL, *, begin: str, query_only: bool) -> sa.Engine:
    # Connections move between the reader threads, one user at a time, which SQLite allows and pysqlite would refuse.
    engine = sa.create_engine(
        url, poolclass=QueuePool, pool_size=READERS, max_overflow=0, connect_args={"check_same_thread": False}
    )

    @sa.event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        # pysqlite's own idea of when a transaction begins is wrong for savepoints and for BEGIN IMMEDIATE.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout = {BUSY_TIMEOUT_MS}",
            "journal_mode = WAL",
            "synchronous = NORMAL",
            "foreign_keys = ON",
            *(["query_only = ON"] if query_only else []),
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def _on_begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine
