"""An older database is brought up to date as a whole or not at all, with a copy taken first; a newer one is refused."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory

from innkeeper.core.instance import Isolation
from innkeeper.core.isolation import Wish
from innkeeper.store import migrate as migrations
from innkeeper.store import sessions, tables, vms
from innkeeper.store.migrate import DatabaseNewerError, MigrationFailedError, alembic_config, migrate

FIRST = "0001"
NOW = "2025-01-02 03:04:05.000006"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A database as the first revision makes it, with a row of everything that it knows."""
    path = tmp_path / "old.db"
    migrate(f"sqlite:///{path}", revision=FIRST)
    filled(path)
    return path


def filled(path: Path) -> None:
    organization, profile, gone = uuid4().hex, uuid4().hex, uuid4().hex
    living = uuid4().hex
    rows: dict[str, list[dict[str, object]]] = {
        "organizations": [{"id": organization, "name": "default", "created_at": NOW}],
        "users": [{"id": uuid4().hex, "organization_id": organization, "email": "a@b", "created_at": NOW}],
        "tokens": [
            {
                "id": uuid4().hex, "organization_id": organization, "name": "first", "prefix": "rk", "digest": b"\1" * 32,
                "scopes": '["rooms"]', "dialect": "gentility", "created_at": NOW,
            }
        ],
        "profiles": [
            {
                "id": profile, "organization_id": organization, "name": "base", "image": "base", "created_at": NOW, "vcpu_count": 1,
                "memory_mb": 512, "disk_mb": 2048, "env_names": '["A"]', "env_sealed": b"sealed", "egress_policy": '{"mode": "none"}',
                "driver": "auto", "min_isolation": "gvisor", "warm_pool_size": 0, "command_timeout_seconds": 120,
                "public_files": "reported", "revision": 1,
            }
        ],
        "hosts": [{"id": uuid4().hex, "name": "h", "address": "", "draining": 0, "last_seen_at": NOW}],
        "instances": [
            {
                "id": instance, "organization_id": organization, "public_id": uuid4().hex, "profile_id": profile, "image": "base",
                "image_digest": "d", "vcpu_count": 1, "memory_mb": 512, "disk_mb": 2048, "desired": desired, "state": state,
                "boot_trace": "[]", "labels": "{}", "created_at": NOW, "revision": 3,
            }
            for instance, state, desired in ((living, "ready", "running"), (gone, "destroyed", "destroyed"))
        ],
        "rooms": [{"profile_id": profile, "room_id": "r", "instance_id": living, "created_at": NOW}],
        "images": [{"name": "base", "status": "ready", "digest": "d", "report": "{}", "reported_at": NOW}],
        "audit_events": [
            {
                "id": uuid4().hex, "organization_id": organization, "at": NOW, "actor": "a", "action": "room.create",
                "object_type": "instance", "object_id": living, "details": "{}",
            }
        ],
        "server": [{"key": "server_uuid", "value": "u"}],
    }  # fmt: skip
    with sqlite3.connect(path) as database:
        for table, several in rows.items():
            for row in several:
                columns = ", ".join(f'"{column}"' for column in row)
                marks = ", ".join("?" * len(row))
                database.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})", tuple(row.values()))
    database.close()


def content(path: Path) -> dict[str, list[dict[str, object]]]:
    with sqlite3.connect(path) as database:
        database.row_factory = sqlite3.Row
        names = [
            row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        ]
        found = {name: [dict(row) for row in database.execute(f"SELECT * FROM {name}")] for name in names}
    database.close()
    return found


def copies(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.at-*"))


def revisions() -> list[str]:
    """All revisions, oldest first."""
    engine = sa.create_engine("sqlite://")
    with engine.connect() as connection:
        scripts = ScriptDirectory.from_config(alembic_config(connection))
        found = [script.revision for script in scripts.walk_revisions()][::-1]
    engine.dispose()
    return found


def test_every_row_of_the_first_revision_survives(old: Path) -> None:
    before = content(old)
    heard: list[str] = []
    migrate(f"sqlite:///{old}", on_migration=heard.append)
    after = content(old)
    assert heard == [FIRST]
    assert after["alembic_version"] == [{"version_num": revisions()[-1]}]
    for table, rows in before.items():
        if table != "alembic_version":
            # The images' report became columns of its own.
            there = [
                column for column in rows[0] if (table, column) not in {("images", "report"), ("images", "reported_at")}
            ]
            kept = [{column: row[column] for column in there} for row in after[table]]
            assert kept == [{column: row[column] for column in there} for row in rows], table
    # And the present code reads them.
    engine = sa.create_engine(f"sqlite:///{old}")
    with engine.connect() as connection:
        for table in tables.metadata.sorted_tables:
            assert connection.execute(sa.select(table)).all() or table.name not in before, table.name
    engine.dispose()
    assert [row["destroyed_at"] is not None for row in after["instances"]] == [False, True]


def test_each_revision_goes_to_the_next(old: Path) -> None:
    """Servers are upgraded from whatever version they have."""
    for revision in revisions()[1:]:
        migrate(f"sqlite:///{old}", revision=revision)
        assert content(old)["alembic_version"] == [{"version_num": revision}]


def test_a_copy_of_how_it_was_is_kept(old: Path) -> None:
    before = content(old)
    migrate(f"sqlite:///{old}")
    (copy,) = copies(old)
    assert copy.name.startswith("old.db.at-0001-")
    assert content(copy) == before
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    # It is a database that an older server can be given.
    shutil.copy(copy, old)
    migrate(f"sqlite:///{old}")


def test_the_last_three_copies_stay(old: Path) -> None:
    original = old.read_bytes()
    taken: list[str] = []
    for _ in range(5):
        old.write_bytes(original)
        migrate(f"sqlite:///{old}")
        taken.append(next(copy.name for copy in copies(old) if copy.name not in taken))
    assert [copy.name for copy in copies(old)] == taken[-3:]


def test_nothing_is_copied_where_nothing_is_to_do(old: Path, tmp_path: Path) -> None:
    migrate(f"sqlite:///{old}")
    (copy,) = copies(old)
    migrate(f"sqlite:///{old}")
    assert copies(old) == [copy]
    migrate(f"sqlite:///{tmp_path}/new.db")
    assert copies(tmp_path / "new.db") == []


@pytest.fixture
def in_the_way(old: Path) -> Path:
    """A column is there that a later revision makes: the migration fails at it, in the middle of its work."""
    with sqlite3.connect(old) as database:
        database.execute("ALTER TABLE instances ADD COLUMN destroyed_at DATETIME")
    database.close()
    return old


def test_a_failed_migration_leaves_the_file_byte_for_byte(in_the_way: Path) -> None:
    before = in_the_way.read_bytes()
    for _ in range(2):
        with pytest.raises(MigrationFailedError, match="duplicate column name: destroyed_at") as failed:
            migrate(f"sqlite:///{in_the_way}")
        assert "Nothing of it was changed" in failed.value.message
        assert in_the_way.read_bytes() == before
        assert sorted(path.name for path in in_the_way.parent.iterdir()) == [in_the_way.name]
    # The older server's own start: at its revision there is nothing to do, and every row is readable.
    migrate(f"sqlite:///{in_the_way}", revision=FIRST)
    assert content(in_the_way)["rooms"]


def test_what_was_not_checkpointed_yet_survives_a_failure(in_the_way: Path, tmp_path: Path) -> None:
    """The older server was killed: its last writes are in the log beside the file."""
    writer = sqlite3.connect(in_the_way, isolation_level=None)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("INSERT INTO server VALUES ('last', 'write')")
    killed = tmp_path / "killed" / "old.db"
    killed.parent.mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(f"{in_the_way}{suffix}", f"{killed}{suffix}")
    writer.close()
    with pytest.raises(MigrationFailedError):
        migrate(f"sqlite:///{killed}")
    assert {"key": "last", "value": "write"} in content(killed)["server"]
    assert content(killed)["alembic_version"] == [{"version_num": FIRST}]


def test_a_migration_that_breaks_references_is_taken_back(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = old.read_bytes()
    upgrade = migrations.command.upgrade

    def careless(config: object, revision: str) -> None:
        upgrade(config, revision)
        config.attributes["connection"].exec_driver_sql("DELETE FROM profiles")  # type: ignore[attr-defined]

    monkeypatch.setattr(migrations.command, "upgrade", careless)
    with pytest.raises(MigrationFailedError, match="'rooms' would refer to 'profiles'"):
        migrate(f"sqlite:///{old}")
    assert old.read_bytes() == before


def test_no_copy_no_migration(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = old.read_bytes()
    monkeypatch.setattr(migrations, "sync", full)
    with pytest.raises(MigrationFailedError, match="No space left"):
        migrate(f"sqlite:///{old}")
    assert (old.read_bytes(), copies(old)) == (before, [])


@pytest.fixture
def newer(old: Path) -> Path:
    migrate(f"sqlite:///{old}")
    for copy in copies(old):
        copy.unlink()
    with sqlite3.connect(old) as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    return old


def test_a_newer_database_is_refused_and_not_touched(newer: Path) -> None:
    before = newer.read_bytes()
    with pytest.raises(DatabaseNewerError, match=r"revision '9999'.*a newer version wrote it\nFIX: "):
        migrate(f"sqlite:///{newer}")
    assert (newer.read_bytes(), copies(newer)) == (before, [])


KILLED = """
import os, signal, sys
from innkeeper.store import migrate as migrations
migrations._check_references = lambda _: os.kill(os.getpid(), signal.SIGKILL)
migrations.migrate(sys.argv[1])
"""


def test_a_killed_migration_never_was(old: Path) -> None:
    before = content(old)
    killed = subprocess.run([sys.executable, "-c", KILLED, f"sqlite:///{old}"], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert content(old) == before
    migrate(f"sqlite:///{old}")


def test_vms_that_are_older_than_their_isolation_asked_for_nothing(old: Path) -> None:
    migrate(f"sqlite:///{old}", revision="0012")
    with sqlite3.connect(old) as database:
        instance, organization = database.execute("SELECT id, organization_id FROM instances LIMIT 1").fetchone()
        session = uuid4().hex
        database.execute(
            "UPDATE instances SET isolation = ? WHERE id = ?",
            ('["gvisor", "gvisor", "systrap", "faster here"]', instance),
        )
        database.execute(
            "INSERT INTO sessions (id, organization_id, created_at, request) VALUES (?, ?, ?, ?)",
            (session, organization, NOW, '{"memory_mb": 512, "egress_policy": null}'),
        )
        database.execute(
            "INSERT INTO vms (instance_id, organization_id, session_id, generation, lifetime_seconds, expires_at, memory_mb, metadata)"
            " VALUES (?, ?, ?, 1, 300, ?, 512, '{}')",
            (instance, organization, session, NOW),
        )
    database.close()
    migrate(f"sqlite:///{old}")
    engine = sa.create_engine(f"sqlite:///{old}")
    with engine.connect() as connection:
        found = vms.get(connection, UUID(instance))
        asked = sessions.get(connection, UUID(session))
    engine.dispose()
    assert found is not None and asked is not None
    assert found[0].wish == asked.request.wish == Wish()
    assert found[1].isolation == Isolation("gvisor", "gvisor", "systrap", "faster here", accelerator=None)
