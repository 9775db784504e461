"""Brings a database's schema to the newest revision."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config


def alembic_config(connection: sa.Connection) -> Config:
    """Alembic's configuration for a connection; the revisions come with the package."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def migrate(url: str | sa.URL, *, revision: str = "head") -> None:
    """Bring the schema of the database to `revision`. Does nothing where it is there already."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    try:
        with engine.begin() as connection:
            if connection.dialect.name == "sqlite":
                # Two servers that start at once on one file migrate one after the other.
                connection.exec_driver_sql("PRAGMA busy_timeout = 10000")
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            command.upgrade(alembic_config(connection), revision)
    finally:
        engine.dispose()
