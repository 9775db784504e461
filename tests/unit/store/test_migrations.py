"""The revisions make exactly the tables that the code thinks it has; unknown databases are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from innkeeper.store.database import open_database
from innkeeper.store.migrate import migrate
from innkeeper.store.tables import metadata

pytestmark = pytest.mark.anyio


@pytest.fixture
def migrated(tmp_path: Path) -> sa.Engine:
    url = f"sqlite:///{tmp_path}/m.db"
    migrate(url)
    migrate(url)
    return sa.create_engine(url, poolclass=sa.NullPool)


def test_metadata_and_migrations_agree(migrated: sa.Engine) -> None:
    with migrated.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_constraints_and_names_agree(migrated: sa.Engine, tmp_path: Path) -> None:
    """What autogenerate does not compare on SQLite: primary keys, uniqueness, foreign keys, and all the names."""
    created = sa.create_engine(f"sqlite:///{tmp_path}/created.db", poolclass=sa.NullPool)
    metadata.create_all(created)
    ours, theirs = sa.inspect(migrated), sa.inspect(created)
    assert set(ours.get_table_names()) - {"alembic_version"} == set(theirs.get_table_names())
    for table in metadata.tables:
        assert ours.get_pk_constraint(table) == theirs.get_pk_constraint(table)
        for listing in ("get_foreign_keys", "get_unique_constraints", "get_indexes", "get_columns"):
            by_name = [
                sorted(({k: spelled(v) for k, v in row.items()} for row in getattr(side, listing)(table)), key=str)
                for side in (ours, theirs)
            ]
            assert by_name[0] == by_name[1], (table, listing)


def spelled(value: object) -> str:
    """A value as text; clauses, which stand for themselves otherwise, by their SQL."""
    return str({k: str(v) for k, v in value.items()} if isinstance(value, dict) else value)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql+asyncpg://u@h/d", "not supported"),
        ("sqlite+aiosqlite:////tmp/x.db", "not supported"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("nonsense", "not a SQLAlchemy URL"),
    ],
)
async def test_other_databases_are_refused(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        await open_database(url)


async def test_a_path_with_percent_signs(tmp_path: Path) -> None:
    folder = tmp_path / "100%"
    folder.mkdir()
    opened = await open_database(f"sqlite:///{folder}/x.db")
    await opened.close()
    assert (folder / "x.db").exists()
