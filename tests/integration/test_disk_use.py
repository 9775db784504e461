"""`host.disk_use`: everything that takes space is told of, and together it is what `du` says."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections import Counter
from pathlib import Path
from uuid import uuid4

import pytest
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, running_host

from innkeeper.core import host_verbs as verbs
from innkeeper.core.checkpoint_verbs import SnapshotDisk
from innkeeper.core.volume_verbs import CreateVolume
from innkeeper.host.disk_use import OF_POOL
from innkeeper.host.linux import mounts
from innkeeper.host.linux.extents import shared_bytes

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]

MIB = 1 << 20
# What a journal or a log takes more by the time of the second look.
MEANWHILE_BYTES = 4 * MIB
IN_POOL = {*OF_POOL.values(), "shared"}


async def use(host: Host) -> dict[tuple[str, str | None], tuple[int, int]]:
    answer = await host.request(verbs.MeasureDisk())
    return {(one["kind"], one["id"]): (one["size_bytes"], one["own_bytes"]) for one in answer["items"]}


def du(path: Path) -> int:
    """What lies on the file system of a folder, without what is mounted in it."""
    said = subprocess.run(
        ["du", "--one-file-system", "--block-size=1", "--summarize", path], capture_output=True, text=True, check=False
    )
    return int(said.stdout.split()[0])


async def test_everything_is_told_and_together_it_is_what_du_says(tmp_path: Path) -> None:
    async with running_host(tmp_path) as host:
        instance, checkpoint, volume, copy = await host.ensure(), uuid4(), uuid4(), uuid4()
        await host.ok(instance, "head -c 40000000 /dev/urandom > file; sync")
        async with host.bus.open(
            host.daemon.host_id, SnapshotDisk.verb, verbs.to_wire(SnapshotDisk(instance, checkpoint))
        ) as call:
            await call.result()
        await host.request(CreateVolume(volume, 64))
        await host.request(CreateVolume(copy, 64, volume, immutable=True))
        found = await use(host)
        size, own = found["disk", str(instance)]
        # The file is on the disk and in the checkpoint, and neither's own.
        assert size > 38 * MIB and own < size - 38 * MIB
        assert found["checkpoint", str(checkpoint)][0] > 38 * MIB > found["checkpoint", str(checkpoint)][1]
        assert found["shared", None][1] > 38 * MIB
        assert {
            ("volume", str(volume)),
            ("volume", str(copy)),
            ("journals", str(instance)),
            ("image", host.image.digest),
        } <= set(found)
        assert (
            found["image", host.image.digest][0]
            >= (host.settings.host_dir / "images" / f"{host.image.digest}.erofs").stat().st_blocks * 512
        )

        await asyncio.to_thread(os.sync)
        found = await use(host)
        directory, pool = host.settings.host_dir, host.settings.host_dir / "pool"
        if mounts.is_mounted(pool):
            together = sum(own for _, own in found.values())
            assert abs(together - du(directory)) < 0.03 * du(directory) + MEANWHILE_BYTES
            used = os.statvfs(pool)
            in_pool = shared_bytes(path for path in pool.rglob("*") if path.is_file())
            told = sum(own for (kind, _), (_, own) in found.items() if kind in IN_POOL)
            assert abs(told - in_pool) < 0.03 * in_pool + MEANWHILE_BYTES
            # XFS keeps a log and its own lists.
            assert in_pool <= (used.f_blocks - used.f_bfree) * used.f_frsize + MEANWHILE_BYTES
        else:
            together = sum(size for (kind, _), (size, _) in found.items() if kind != "shared")
            assert abs(together - du(directory)) < 0.03 * du(directory) + MEANWHILE_BYTES
        kinds = Counter[str]()
        for (kind, _), (_, own) in found.items():
            kinds[kind] += own
        assert kinds["other"] < 0.03 * sum(kinds.values()) + MEANWHILE_BYTES
