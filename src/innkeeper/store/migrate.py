"""Brings a database's schema to the newest revision, or leaves it exactly as it was."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from innkeeper.errors import InnkeeperError
from innkeeper.store.sqlite_copy import copy_file, sync

log = logging.getLogger(__name__)

KEPT_COPIES = 3
BUSY_TIMEOUT_MS = 10_000
# innkeeper.db.at-0001-20261122T061500.123456Z: the revision that the copy has, and when it was taken.
_COPY = re.compile(r"\.at-[0-9a-z]+-[0-9]{8}T[0-9]{6}\.[0-9]{6}Z")


class DatabaseNewerError(InnkeeperError):
    """The database was written by a newer version of the server."""

    code = "database_newer"


class MigrationFailedError(InnkeeperError):
    """The database could not be migrated; it is as it was."""

    code = "migration_failed"


def alembic_config(connection: sa.Connection) -> Config:
    """Alembic's configuration for a connection; the revisions come with the package."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def migrate(url: str | sa.URL, *, revision: str = "head", on_migration: Callable[[str], None] = lambda _: None) -> None:
    """Bring the schema of the database to `revision`. Does nothing where it is there already.

    All of it is one transaction, and a copy of the file is taken first: `<file>.at-<revision>-<time>`, of which the last three stay.
    `on_migration` is called before an existing database is changed.

    Raises:
        DatabaseNewerError: the database has a revision that this version does not know; nothing is changed.
        MigrationFailedError: nothing is changed, so the version that used the database before can go on with it.

    """
    # Parameters of statements hold what users stored, and the error is shown.
    engine = sa.create_engine(url, poolclass=sa.NullPool, hide_parameters=True)
    copy: Path | None = None
    try:
        with engine.begin() as connection:
            sqlite = connection.dialect.name == "sqlite"
            if sqlite:
                # Two servers that start at once on one file migrate one after the other.
                connection.exec_driver_sql(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            config = alembic_config(connection)
            scripts = ScriptDirectory.from_config(config)
            before = _revision(connection, scripts)
            target = scripts.get_current_head() if revision == "head" else revision
            if before == target:
                return
            if before is not None:
                on_migration(before)
                copy = _copy(engine, before) if sqlite else None
            command.upgrade(config, revision)
            if sqlite:
                _check_references(connection)
    except DatabaseNewerError:
        raise
    except Exception as error:
        if copy is not None:
            # The file itself is what it was: a server that is started again and again must not push the older copies out.
            copy.unlink(missing_ok=True)
        log.exception("the database could not be migrated")
        raise MigrationFailedError(
            f"the database could not be brought up to date: {_reason(error)}. Nothing of it was changed: "
            "the version of the server that used it before can go on with it"
        ) from error
    finally:
        engine.dispose()
    if copy is not None:
        log.info("the database was migrated; a copy of how it was before is kept: %s", copy.name)
        _drop_old_copies(copy)


def _revision(connection: sa.Connection, scripts: ScriptDirectory) -> str | None:
    """The revision of the database, None for one without tables."""
    before = MigrationContext.configure(connection).get_current_revision()
    if before is None:
        return None
    try:
        scripts.get_revision(before)
    except CommandError:
        known = scripts.get_current_head()
        raise DatabaseNewerError(
            f"the database has revision {before!r}, which this version of the server (up to {known}) does not know: "
            "a newer version wrote it\nFIX: start that version, or restore a backup that this one can read"
        ) from None
    return before


def _copy(engine: sa.Engine, revision: str) -> Path:
    """A copy of the file as it was committed last, whole or not at all. Opened read-only, so that not even the log of SQLite moves."""
    path = Path(engine.url.database or "").absolute()
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    target = path.with_name(f"{path.name}.at-{revision}-{stamp}")
    fresh = path.with_name(f"{path.name}.at.new")
    fresh.unlink(missing_ok=True)
    try:
        copy_file(path, fresh)
        fresh.rename(target)
        sync(path.parent)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    finally:
        fresh.unlink(missing_ok=True)
    return target


def _drop_old_copies(newest: Path) -> None:
    name = newest.name[: _COPY.search(newest.name).start()]  # type: ignore[union-attr]
    copies = [
        path
        for path in newest.parent.iterdir()
        if path.name.startswith(name) and _COPY.fullmatch(path.name[len(name) :])
    ]
    by_time = sorted(copies, key=lambda path: path.name.rpartition("-")[2])
    for path in by_time[:-KEPT_COPIES]:
        path.unlink(missing_ok=True)


def _check_references(connection: sa.Connection) -> None:
    """References are not enforced while tables are rebuilt, so they are looked at before the commit."""
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
    if broken:
        raise MigrationFailedError(f"rows of {broken[0][0]!r} would refer to {broken[0][2]!r} that are not there")


def _reason(error: Exception) -> str:
    if isinstance(error, sa.exc.DBAPIError):
        return str(error.orig)
    return str(error) or type(error).__name__
