"""A newer server takes over what an older one left: its database, its records, and guests that run with its agent."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import sqlite3
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from server_fixture import Room, Server, server

from innkeeper.store.migrate import migrate

pytestmark = pytest.mark.gvisor_only(reason="no release before this one had another driver")

REPOSITORY = Path(__file__).parents[2]
FIRST_REVISION = "0001"


@dataclass
class Older:
    """A state directory as an older version left it while its guests run on."""

    server: Server
    profile: str
    instance: str
    sandbox: list[int]
    agents: set[str]
    token: str

    @property
    def database(self) -> Path:
        return self.server.home / "api" / "innkeeper.db"

    @property
    def room(self) -> Room:
        return Room(self.server.client(), self.profile, "kept")


@pytest.fixture(scope="module")
def older_agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent of another version: the same protocol, other bytes."""
    binary = tmp_path_factory.mktemp("agent") / "inn-agent"
    subprocess.run(
        ["go", "build", "-trimpath", "-ldflags", "-s -w -X main.version=0.0.1", "-o", binary, "."],
        cwd=REPOSITORY / "guest",
        env={**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false"},
        check=True,
    )
    return binary


@pytest.fixture(scope="module")
def older(older_agent: Path, driver: str) -> Iterator[Older]:
    settings = {"INNKEEPER_KEEP_MACHINES": "true", "INNKEEPER_AGENT_BINARY": str(older_agent)}
    with server("base", driver=driver, **settings) as running:
        api = running.api()
        profile = api.make_profile(env={"COLOR": "green"})
        room = api.room(profile, "kept")
        instance = str(room.create()["instance_id"])
        room.output("echo kept > kept.txt; echo memory > /dev/shm/memory; (nohup sleep 1000 > /dev/null 2>&1 &)")
        api.room(profile, "gone").output("true")
        api.room(profile, "gone").delete()
        sandbox = running.sandbox_pids(running.machine_of(instance))
        assert sandbox
        running.stop()
        left = Older(running, profile, instance, sandbox, agents(running), running.token)
        as_first_release(running.home)
        del running.settings["INNKEEPER_AGENT_BINARY"]
        yield left
        if running.process is None:
            # Its guests have outlived it until here.
            running.start(INNKEEPER_KEEP_MACHINES="false")


def agents(of: Server) -> set[str]:
    return {folder.name for folder in (of.home / "host" / "agent").iterdir()}


def as_first_release(home: Path) -> None:
    """The state as the first release wrote it: a database that its only migration made, records without a format number."""
    database = home / "api" / "innkeeper.db"
    first = database.with_name("first.db")
    migrate(f"sqlite:///{first}", revision=FIRST_REVISION)
    with contextlib.closing(sqlite3.connect(first)) as made:
        made.execute("ATTACH ? AS newer", (str(database),))
        names = [row[0] for row in made.execute("SELECT name FROM main.sqlite_master WHERE type = 'table'")]
        for name in names:
            # Images: what the host reports of them, anew at every start.
            if name not in ("alembic_version", "images"):
                columns = ", ".join(f'"{row[1]}"' for row in made.execute(f"PRAGMA main.table_info({name})"))
                made.execute(f"INSERT INTO main.{name} ({columns}) SELECT {columns} FROM newer.{name}")
        made.commit()
        made.execute("DETACH newer")
        made.execute("PRAGMA journal_mode = WAL")
    for old in database.parent.glob("innkeeper.db*"):
        old.unlink()
    first.rename(database)
    account = pwd.getpwnam("innkeeper")
    os.chown(database, account.pw_uid, account.pw_gid)
    for record in (*home.glob("host/machines/*/machine.json"), *home.glob("host/instances/*/instance.json")):
        body = json.loads(record.read_text())
        del body["format"]
        record.write_text(json.dumps(body))


def revision(database: Path) -> str:
    with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as opened:
        return str(opened.execute("SELECT version_num FROM alembic_version").fetchone()[0])


def test_a_failed_migration_leaves_all_of_it_to_the_older_server(older: Older) -> None:
    """A column that the next revision makes is there: the real migration fails at it, after its first steps."""
    with contextlib.closing(sqlite3.connect(older.database)) as database:
        database.execute("ALTER TABLE instances ADD COLUMN destroyed_at DATETIME")
        database.commit()
    before = snapshot(older)
    refused = older.server.inn("serve", "--home", str(older.server.home), "--port", str(older.server.port))
    assert refused.returncode == 1
    last = refused.stderr.strip().splitlines()[-1]
    assert last.startswith("inn: the database could not be brought up to date: duplicate column name: destroyed_at")
    assert snapshot(older) == before
    assert older.sandbox and all(Path(f"/proc/{pid}").exists() for pid in older.sandbox)
    with contextlib.closing(sqlite3.connect(older.database)) as database:
        assert database.execute("SELECT count(*) FROM rooms WHERE room_id = 'kept'").fetchone() == (1,)
        database.execute("ALTER TABLE instances DROP COLUMN destroyed_at")
        database.commit()


def test_a_newer_database_is_refused_and_guests_run_on(older: Older) -> None:
    with contextlib.closing(sqlite3.connect(older.database)) as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
        database.commit()
    before = snapshot(older)
    refused = older.server.inn("serve", "--home", str(older.server.home), "--port", str(older.server.port))
    assert refused.returncode == 1
    assert "the database has revision '9999'" in refused.stderr
    assert "\nFIX: start that version" in refused.stderr
    assert snapshot(older) == before
    assert all(Path(f"/proc/{pid}").exists() for pid in older.sandbox)
    with contextlib.closing(sqlite3.connect(older.database)) as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (FIRST_REVISION,))
        database.commit()


def test_a_newer_server_takes_everything_over(older: Older) -> None:
    assert revision(older.database) == FIRST_REVISION
    older.server.start(INNKEEPER_KEEP_MACHINES="false")
    assert revision(older.database) > FIRST_REVISION
    (copy,) = older.database.parent.glob("innkeeper.db.at-0001-*")
    assert revision(copy) == FIRST_REVISION
    assert older.server.token == older.token
    room = older.room
    assert room.create()["instance_id"] == older.instance
    # The same guest, not one that was started again on its disk.
    assert older.server.sandbox_pids(older.server.machine_of(older.instance)) == older.sandbox
    assert room.output("cat kept.txt /dev/shm/memory; pgrep -c -x sleep; echo $COLOR") == "kept\nmemory\n1\ngreen"
    assert room.changes("echo new > new.txt") == {"/home/user/new.txt": "created"}
    # What starts from now on has the newer agent; the guest that was adopted keeps its own.
    fresh = Room(room.client, older.profile, "fresh")
    assert fresh.output("echo hello") == "hello"
    assert len(agents(older.server) - older.agents) == 1
    rows = {row["room_id"] for row in room.client.get("/v1/rooms").json()}
    assert {"kept", "fresh"} <= rows and "gone" not in rows
    assert '"leaked": 0' in older.server.inn("host", "list", "--json").stdout


def snapshot(older: Older) -> dict[str, bytes]:
    """Everything that another server would go on with, byte for byte: the database's folder and the daemon's records."""
    home = older.server.home
    files = [*(home / "api").glob("innkeeper.db*"), home / "api" / "master.key"]
    files += [path for path in (home / "host").glob("machines/*/*") if path.is_file()]
    files += [path for path in (home / "host").glob("instances/**/*") if path.is_file()]
    assert len(files) > 4
    # SQLite's own working files, empty or rebuilt at will.
    return {str(path): path.read_bytes() for path in files if not path.name.endswith(("-shm", "-wal"))}
