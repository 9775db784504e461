"""A host that restarts: nothing is left of its servers but files. Each room goes on with its old disk, and is told to have lost its memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_fixture import Room, Server, server, until
from tests.faults import census

from innkeeper.host.linux import loop_device, mounts, netns, nftables
from innkeeper.host.linux.cgroup import CgroupTree


@pytest.fixture(scope="module")
def rebooted(driver: str) -> Iterator[Server]:
    with server("base", driver=driver) as running:
        yield running


def reboot(running: Server) -> None:
    """All that a reboot ends: processes, control groups, mounts, loop devices, namespaces, firewall tables."""
    running.kill()
    for pid in (*census.runsc_pids(running.home), *census.vm_pids(running.home)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    asyncio.run(_reboot(running.home, running.server_id))


async def _reboot(home: Path, identifier: str) -> None:
    for suffix in ("", "-vm"):
        group = CgroupTree.detect().server_root(f"innkeeper-{identifier}{suffix}")
        for name in group.children():
            await group.child(name).kill_all()
        await group.remove()
    await mounts.umount_tree(home)
    for device in loop_device.devices_backed_by(home):
        loop_device.detach(device)
    for name in netns.names(f"ik{identifier}"):
        await netns.delete(name)
    await netns.ip_batch([f"link del ik{identifier}u"], force=True)
    await nftables.delete_table("inet", f"innkeeper_{identifier}")


def test_every_room_goes_on_with_its_disk_after_a_reboot(rebooted: Server) -> None:
    api = rebooted.api()
    pooled, cold = api.make_profile(warm_pool_size=1), api.make_profile(egress_policy={"mode": "none"})
    rooms = [api.room(profile) for profile in (pooled, cold, cold)]
    instances = [room.create()["instance_id"] for room in rooms]
    said = []
    for number, room in enumerate(rooms):
        room.output(f"echo {number} > kept; nohup sleep 1000 > /dev/null 2>&1 & echo in-memory > /dev/shm/lost")
        said.append(room.run(f"echo said {number}")["result"]["execution_id"])
    reboot(rebooted)
    assert census.runsc_pids(rebooted.home) == census.vm_pids(rebooted.home) == []
    assert list(mounts.mounts_under(rebooted.home)) == []
    rebooted.start()
    assert "adopted   0 guests" in rebooted.log().rpartition("Innkeeper is ready")[2]
    client = rebooted.client()
    lost = client.get("/v1/audit", params={"limit": 1000}).json()["events"]
    assert sum(row["action"] == "room.machine_lost" for row in lost) == len(rooms), lost
    for number, (room, instance) in enumerate(zip(rooms, instances, strict=True)):
        again = Room(client, room.profile_id, room.room_id)
        # The first thing is a command, without a request for the room.
        answer = again.run("cat kept; cat /dev/shm/lost; pgrep -c -x sleep")
        assert answer["result"]["output"].splitlines()[0] == str(number)
        assert "in-memory" not in answer["result"]["output"]
        assert answer["result"]["output"].splitlines()[-1] == "0", answer
        assert answer["instance_id"] == instance
        kept = client.get(f"{again.path}/command/{said[number]}/output").json()
        assert (kept["output"], kept["ended"]) == (f"said {number}\n", True)
    assert census.wait_for_none(rebooted.home) == []
    until(lambda: rebooted.inn("doctor", "--leaks").returncode == 0)
