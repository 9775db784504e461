"""A server is backed up while a room writes, and another one goes on from the backup."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from server_fixture import INN, Room, Server, free_port, leftovers, plain_environment, server, until

from innkeeper.host.linux import loop_device

# Each record is on the disk before the next one begins: a file whose last record is n has all of 1..n, and so has the table of contents.
WRITER = """
import os
with open('/home/user/log', 'a') as log:
    for number in range(1, 1000000):
        log.write(f'{number:08d}\\n'); log.flush(); os.fsync(log.fileno())
        with open('/home/user/last.new', 'w') as last:
            last.write(str(number)); last.flush(); os.fsync(last.fileno())
        os.rename('/home/user/last.new', '/home/user/last')
"""
SETTINGS = {"INNKEEPER_IMAGES": "base", "INNKEEPER_POOL_DISK_MB": "20480", "INNKEEPER_RUNSC_PLATFORM": "systrap"}


@dataclass
class Made:
    """A backup, and what the rooms of its server were then."""

    archive: Path
    server: Server
    profile: str
    rooms: dict[str, str] = field(default_factory=dict)
    execution: str = ""
    said: dict[str, object] = field(default_factory=dict)
    written_before: int = 0
    token: str = ""
    volume: str = ""
    vm: str = ""


@pytest.fixture(scope="module")
def made() -> Iterator[Made]:
    folder = Path(tempfile.mkdtemp(prefix="ikb", dir="/var/tmp"))
    try:
        with server("base", INNKEEPER_SSH_PORT=str(free_port())) as running:
            api = running.api()
            profile = api.make_profile(env={"COLOR": "green"}, disk_mb=2048)
            backup = Made(folder / "all.tar", running, profile, token=running.token)
            quiet, busy, gone = (api.room(profile, name) for name in ("quiet", "busy", "gone"))
            backup.rooms = {room.room_id: str(room.create()["instance_id"]) for room in (quiet, busy, gone)}
            answer = quiet.run(
                "echo said; head -c 3000000 /dev/urandom > noise; sha256sum noise > sum; chmod 640 noise"
            )
            backup.execution = answer["result"]["execution_id"]
            busy.put("/home/user/write.py", WRITER.encode())
            busy.output("(nohup python3 write.py > /dev/null 2>&1 &)")
            until(lambda: int(busy.output("cat last 2>/dev/null || echo 0")) > 50)
            # Its disk is on its own: no machine holds it.
            gone.output("echo stopped > file")
            running.kill_sandbox(running.machine_of(backup.rooms["gone"]))
            # A volume that a VM has, and a moment of it.
            client = running.client(running.token)
            backup.volume = client.post("/v1/volumes", json={"name": "data", "quota_bytes": 64 << 20}).json()["id"]
            had = [{"volume_id": backup.volume, "mount_path": "/data", "mode": "rw"}]
            asked = {"image_variant": "base", "vm_lifetime_seconds": 3600, "volumes": had}
            backup.vm = client.post("/v1/vms", json=asked).raise_for_status().json()["vm_id"]
            inside(client, backup.vm, "echo before > /data/notes")
            client.post(f"/v1/volumes/{backup.volume}/checkpoints", json={"name": "kept"}).raise_for_status()
            backup.written_before = int(busy.output("cat last"))
            began = time.monotonic()
            done = running.inn("backup", str(backup.archive), "--json")
            print(f"inn backup took {time.monotonic() - began:.1f} s: {done.stdout}")
            assert done.returncode == 0, done.stderr
            backup.said = json.loads(done.stdout)
            # What comes later is not in it.
            inside(client, backup.vm, "echo after > /data/notes")
            api.room(profile, "later").output("true")
            assert int(busy.output("cat last")) > backup.written_before
            assert '"leaked": 0' in running.inn("host", "list", "--json").stdout
            yield backup
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def inside(client: Any, vm: str, command: str) -> str:
    answer = client.post(f"/v1/vms/{vm}/exec", json={"command": command}, timeout=120)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["stdout"])


@pytest.fixture
def empty() -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(prefix="ikr", dir="/var/tmp"))
    yield home
    shutil.rmtree(home, ignore_errors=True)


def inn(*argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**plain_environment(), **SETTINGS, **variables}
    return subprocess.run([INN, *argv], env=environment, capture_output=True, text=True, timeout=120)


def test_a_restored_server_goes_on(made: Made, empty: Path) -> None:
    # What a restore leaves that was killed between its last steps: no server starts on it, and the next restore begins anew.
    (empty / "restoring" / "host").mkdir(parents=True)
    (empty / "host").mkdir()
    (empty / "host" / "host-id").write_text("half")
    refused = inn("serve", "--home", str(empty), "--port", str(free_port()))
    assert refused.returncode == 1 and "was not finished\nFIX: inn restore" in refused.stderr
    began = time.monotonic()
    done = inn("restore", str(made.archive), "--home", str(empty))
    print(f"inn restore took {time.monotonic() - began:.1f} s: {done.stdout}")
    assert done.returncode == 0, done.stderr
    assert "4 rooms, 2 volumes" in done.stdout and f"inn serve --home {empty}" in done.stdout
    assert sorted(path.name for path in empty.iterdir()) == ["api", "host"]
    assert stat.S_IMODE((empty / "api" / "master.key").stat().st_mode) == 0o600
    key = empty / "api" / "ssh-host-key"
    assert key.read_bytes() == (made.server.home / "api" / "ssh-host-key").read_bytes()
    assert (stat.S_IMODE(key.stat().st_mode), key.stat().st_uid) == (0o600, (empty / "api").stat().st_uid)
    for disk in disks_of(empty):
        checked = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
    unmount_pool(empty)
    again = Server(empty, free_port(), {**SETTINGS, "INNKEEPER_KEEP_MACHINES": "false"})
    try:
        again.start()
        # The token of the first server: the database is the same one.
        client = again.client(made.token)
        rows = {row["room_id"]: row["instance_id"] for row in client.get("/v1/rooms").json()}
        assert rows == made.rooms
        quiet, busy, gone = (Room(client, made.profile, name) for name in ("quiet", "busy", "gone"))
        assert quiet.output("sha256sum -c sum; stat -c %a noise; echo $COLOR") == "noise: OK\n640\ngreen"
        kept = client.get(f"{quiet.path}/command/{made.execution}/output").json()
        assert (kept["output"], kept["exit_code"]) == ("said\n", 0)
        assert quiet.changes("echo new > new") == {"/home/user/new": "created"}
        assert gone.output("cat file") == "stopped"
        # The VM has its volume again, as it was.
        assert inside(client, made.vm, "cat /data/notes") == "before\n"
        (volume,) = client.get("/v1/volumes").json()
        assert (volume["id"], volume["status"], volume["mounts"][0]["vm_id"]) == (made.volume, "ready", made.vm)
        (kept,) = client.get(f"/v1/volumes/{made.volume}/checkpoints").json()
        assert (kept["name"], kept["status"]) == ("kept", "ready")
        # One moment of the disk: the log is whole, and holds all that was said to be written before the backup began.
        log = busy.output("cat log").split()
        last = int(busy.output("cat last"))
        assert log == [f"{number:08d}" for number in range(1, len(log) + 1)]
        assert made.written_before <= last <= len(log) <= last + 1
        assert '"leaked": 0' in again.inn("host", "list", "--json").stdout
    finally:
        if again.process is not None:
            again.stop()
        assert leftovers(again) == []
        again.log_path.unlink(missing_ok=True)


def disks_of(home: Path) -> list[Path]:
    """The restored disks; the pool is mounted for looking at them where it is a file system of its own."""
    pool = home / "host" / "pool"
    if (home / "host" / "pool.xfs").exists():
        pool.mkdir(exist_ok=True)
        subprocess.run(["mount", "-o", "loop,nouuid", home / "host" / "pool.xfs", pool], check=True)
    found = sorted(pool.glob("disks/*.img"))
    assert len(found) == 4
    volumes = sorted(pool.glob("volumes/*.img"))
    # A checkpoint is as it was: nobody may ever write it.
    assert [stat.S_IMODE(path.stat().st_mode) for path in volumes] == [0o600, 0o400]
    return [*found, *volumes]


def unmount_pool(home: Path) -> None:
    if (home / "host" / "pool.xfs").exists():
        subprocess.run(["umount", home / "host" / "pool"], check=True)
        until(lambda: not loop_device.devices_backed_by(home))


def test_sizes_are_what_they_are_said_to_be(made: Made) -> None:
    assert made.said["rooms"] == 4
    assert made.said["bytes"] == made.archive.stat().st_size
    assert stat.S_IMODE(made.archive.stat().st_mode) == 0o600
    done = inn("restore", str(made.archive), "--check", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["disks"], found["instances"], found["volumes"], found["has_key"]) == (4, 4, 2, True)
    # Disks of 2 GiB each, and the VM's; what they take is what guests wrote.
    vms_disk_mb = made.server.client(made.token).get(f"/v1/vms/{made.vm}").json()["disk_mb"]
    assert found["disk_bytes"] == (3 * 2048 + vms_disk_mb) * 2**20
    assert found["archived_bytes"] < made.archive.stat().st_size < 1_500 * 2**20
    with tarfile.open(made.archive) as archive:
        names = archive.getnames()
    assert names[0] == "api/innkeeper.db" and names[-1] == "manifest.json"
    assert not any("first-token" in name or "sock" in name for name in names)


def test_only_into_an_empty_directory_without_a_server(made: Made, empty: Path) -> None:
    (empty / "file").write_text("somebody's")
    refused = inn("restore", str(made.archive), "--home", str(empty))
    assert refused.returncode == 1 and "is not empty (file)" in refused.stderr
    assert sorted(path.name for path in empty.iterdir()) == ["file"]
    refused = inn("restore", str(made.archive), "--home", str(made.server.home))
    assert refused.returncode == 1 and "a server or another restore runs on" in refused.stderr
    assert made.server.client().get("/healthz").status_code == 200


@pytest.fixture(scope="module")
def broken(made: Made) -> Iterator[Path]:
    """A copy with one bit turned in the middle of it."""
    copy = made.archive.with_name("broken.tar")
    shutil.copy(made.archive, copy)
    with copy.open("r+b") as file:
        file.seek(made.archive.stat().st_size // 2)
        before = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([before[0] ^ 1]))
    yield copy
    copy.unlink()


def test_a_turned_bit_is_noticed(broken: Path) -> None:
    refused = inn("restore", str(broken), "--check")
    assert refused.returncode == 1 and "is not what it was when it was backed up" in refused.stderr


def test_a_damaged_backup_leaves_nothing(broken: Path, empty: Path) -> None:
    with broken.open("r+b") as file:
        file.truncate(broken.stat().st_size * 2 // 3)
    refused = inn("restore", str(broken), "--home", str(empty))
    assert refused.returncode == 1 and "ends too early" in refused.stderr
    assert list(empty.iterdir()) == []
    assert loop_device.devices_backed_by(empty) == {}


def test_backups_are_the_operators_on_the_socket_alone(made: Made) -> None:
    admin = made.server.inn("token", "create", "root", "--scope", "admin").stdout.strip()
    for token, status in ((admin, 403), (made.token, 403), (None, 401)):
        assert made.server.client(token).post("/v1/backup", json={}).status_code == status
    exists = made.server.inn("backup", str(made.archive))
    assert exists.returncode == 2 and "exists already" in exists.stderr


def test_an_interrupted_backup_leaves_no_file_and_the_next_one_works(made: Made) -> None:
    target = made.archive.with_name("second.tar")
    process = subprocess.Popen(
        [INN, "--home", made.server.home, "backup", target], env=plain_environment(), stderr=subprocess.PIPE
    )
    until(lambda: any(path.name.startswith(".second.tar.") for path in target.parent.iterdir()))
    process.kill()
    process.communicate()
    assert not target.exists()
    for left in target.parent.glob(".second.tar.*"):
        left.unlink()

    def works() -> bool:
        return made.server.inn("backup", str(target)).returncode == 0

    # The server notices that its reader is gone a moment later.
    until(works, seconds=60)
    target.unlink()
    assert list((made.server.home / "api").glob("backup*")) == []
