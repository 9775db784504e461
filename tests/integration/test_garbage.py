"""`host.gc` on a running daemon: what it finds, what it leaves, and that what lives goes on living."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from pathlib import Path
from uuid import uuid4

import pytest
from tests.integration.daemon_fixture import Host, running_host

from innkeeper.core import host_verbs as verbs
from innkeeper.host import kept_executions
from innkeeper.host.disks.checkpoint_store import Checkpoint, write_manifest
from innkeeper.host.garbage import STALE_SECONDS
from innkeeper.host.kept_executions import Excess

pytestmark = pytest.mark.anyio

NOBODYS, SOMEBODYS = uuid4(), uuid4()


def age(path: Path) -> Path:
    """As if nobody had touched it for longer than anything takes."""
    old = time.time() - STALE_SECONDS - 60
    for one in (*path.rglob("*"), path):
        os.utime(one, (old, old))
    return path


def plant(host: Host) -> dict[str, set[str]]:
    """One of each kind of garbage, and beside each something like it that is none; the garbage's names by kind."""
    base = host.settings.host_dir
    (base / "images" / ("a" * 64 + ".erofs")).write_bytes(b"x" * 10_000)
    (base / "images" / ("b" * 64 + ".erofs")).write_bytes(b"x" * 10_000)
    (base / "images" / ("b" * 64 + ".kept")).touch()
    for name in (".build-old", ".build-new"):
        (base / "images" / name).mkdir()
        (base / "images" / name / "tree").write_bytes(b"x" * 10_000)
    age(base / "images" / ".build-old")
    (base / ".pool-old").write_bytes(b"x")
    age(base / ".pool-old")
    (base / "trash" / "instances-old").mkdir()
    age(base / "trash" / "instances-old")
    (base / "agent" / "0123456789abcdef").mkdir()
    age(base / "agent" / "0123456789abcdef")
    (base / "pool" / "disks" / "nobodys.img").write_bytes(b"x" * 10_000)
    for one, age_seconds in ((NOBODYS, STALE_SECONDS + 60), (SOMEBODYS, STALE_SECONDS + 60), (uuid4(), 0)):
        folder = base / "pool" / "checkpoints" / str(one)
        folder.mkdir()
        write_manifest(folder, Checkpoint(one, uuid4(), time.time() - age_seconds, "b" * 64, 64, 0, folder))
        volume = base / "pool" / "volumes" / f"{one}.img"
        volume.write_bytes(b"x" * 10_000)
        if age_seconds:
            age(volume)
    for name, fetched_at in (("old", 1), ("new", 2)):
        (base / "kernels" / name).mkdir(parents=True)
        (base / "kernels" / name / "kernel.json").write_text('{"package": "linux-image-1", "version": "1"}')
        (base / "kernels" / name / "initramfs-0123.gz").touch()
        os.utime(base / "kernels" / name / "kernel.json", (fetched_at, fetched_at))
    (base / "pool" / "machine-templates" / ("c" * 64)).mkdir()
    (base / "changes" / str(uuid4())).mkdir()
    (gone,) = (one.name for one in (base / "changes").iterdir() if not (base / "instances" / one.name).exists())
    return {
        "image": {"a" * 64},
        "temporary": {"images/.build-old", ".pool-old"},
        "trash": {"trash/instances-old"},
        "agent": {"agent/0123456789abcdef"},
        "disk": {"nobodys"},
        "checkpoint": {str(NOBODYS)},
        "volume": {str(NOBODYS)},
        "template": {"c" * 64},
        "kernel": {"kernels/old", "kernels/new/initramfs-0123.gz"},
        "baseline": {f"changes/{gone}"},
    }


async def gc(host: Host, *, remove: bool, volumes: bool = True) -> dict[str, set[str]]:
    answer = await host.request(verbs.CollectGarbage(remove, ("b" * 64,), (SOMEBODYS,), (SOMEBODYS,), volumes))
    found: dict[str, set[str]] = {}
    for item in answer["items"]:
        found.setdefault(item["kind"], set()).add(item["name"])
        assert item["size_bytes"] >= 0
    return found


async def test_garbage_goes_and_what_lives_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_host(tmp_path) as host:
        kept = await host.ensure()
        asleep = await host.ensure()
        for one in (kept, asleep):
            await host.ok(one, "echo content > /home/user/file.txt")
        await host.request(verbs.DestroyMachine(asleep, keep_disk=True))
        assert await gc(host, remove=False) == {}
        planted = plant(host)
        assert await gc(host, remove=False) == planted
        running = asyncio.create_task(host.ok(kept, "sleep 1; cat /home/user/file.txt"))
        building = asyncio.create_task(host.ensure())
        # Beside a command that runs and a machine on its way up.
        but_volumes = {kind: names for kind, names in planted.items() if kind != "volume"}
        assert await gc(host, remove=True, volumes=False) == but_volumes
        # They are users' data: they are told of, and stay until somebody says so.
        assert await gc(host, remove=False) == await gc(host, remove=True) == {"volume": {str(NOBODYS)}}
        assert (await running).text == "content\n"
        assert (await host.ok(await building, "echo new")).text == "new\n"
        assert await gc(host, remove=False) == {}
        base = host.settings.host_dir
        assert [path.name for path in (base / "kernels" / "new").iterdir()] == ["kernel.json"]
        new = base / "images" / ".build-new"
        assert (new / "tree").exists() and (base / "images" / ("b" * 64 + ".erofs")).exists()
        assert [leak["name"] for leak in (await host.status())["leaks"]] == [str(new)]
        shutil.rmtree(new)
        await host.ensure(asleep)
        assert (await host.ok(asleep, "cat /home/user/file.txt")).text == "content\n"

        # Journals beyond the limits go, the newest stays.
        executions = [(await host.ok(kept, f"echo {number}")).execution_id for number in range(3)]
        monkeypatch.setattr(kept_executions, "beyond_limits", _beyond)
        assert await gc(host, remove=True) == {"journals": {str(kept), str(asleep)}}
        said, data = await host.output(kept, executions[-1])
        assert (data, said["exit_code"]) == (b"2\n", 0)
        assert (await host.status())["leaked"] == 0


_limits = kept_executions.beyond_limits


def _beyond(*folders: Path, keep: frozenset[str], **_: int) -> Excess:
    """The limits as if an instance might keep one execution."""
    return _limits(*folders, keep=keep, max_executions=1)


async def test_a_record_that_cannot_be_read_keeps_every_disk_and_image(tmp_path: Path) -> None:
    async with running_host(tmp_path) as host:
        instance_id = await host.ensure()
        planted = plant(host)
        record = host.settings.host_dir / "instances" / str(instance_id) / "instance.json"
        content = record.read_bytes()
        record.write_text("not JSON")
        try:
            found = await gc(host, remove=True)
        finally:
            record.write_bytes(content)
        assert "disk" not in found and "image" not in found and found["trash"] == planted["trash"]
        assert (host.settings.host_dir / "pool" / "disks" / "nobodys.img").exists()
        await gc(host, remove=True)
