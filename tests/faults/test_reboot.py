"""A host that restarts: nothing is left of its servers but files. Each room goes on with its old disk, and is told to have lost its memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
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
    points = [Path(mount.target) for mount in mounts.mounts_under(home)]
    await mounts.umount_tree(home)
    for point in points:
        end_copies(point)
    for device in loop_device.devices_backed_by(home):
        loop_device.detach(device)
    for name in netns.names(f"ik{identifier}"):
        await netns.delete(name)
    await netns.ip_batch([f"link del ik{identifier}u"], force=True)
    await nftables.delete_table("inet", f"innkeeper_{identifier}")


def end_copies(point: Path) -> None:
    """With a mount point go the copies of its mount in namespaces of other servers on this machine, which would keep the file system and its device."""
    with contextlib.suppress(OSError):
        mode = point.stat().st_mode & 0o7777
        point.rmdir()
        point.mkdir()
        point.chmod(mode)


def test_every_room_goes_on_with_its_disk_after_a_reboot(rebooted: Server) -> None:
    api = rebooted.api()
    pooled, cold = api.make_profile(warm_pool_size=1), api.make_profile(egress_policy={"mode": "none"})
    rooms = [api.room(profile) for profile in (pooled, cold, cold)]
    instances = [room.create()["instance_id"] for room in rooms]
    said = []
    for number, room in enumerate(rooms):
        # What a microVM has not synced is lost with its kernel.
        room.output(f"echo {number} > kept; sync; nohup sleep 1000 > /dev/null 2>&1 & echo in-memory > /dev/shm/lost")
        said.append(room.run(f"echo said {number}")["result"]["execution_id"])
    reboot(rebooted)
    assert census.runsc_pids(rebooted.home) == census.vm_pids(rebooted.home) == []
    assert list(mounts.mounts_under(rebooted.home)) == []
    rebooted.start()
    assert "adopted   0 guests" in rebooted.log().rpartition("Innkeeper is ready")[2]
    client = rebooted.client()
    told = client.get("/v1/audit", params={"limit": 1000}).json()["events"]
    lost = [row for row in told if row["action"] == "room.machine_lost"]
    assert len(lost) == len(rooms), lost
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


def test_suspended_vms_go_on_after_a_reboot_with_the_memory_that_has_its_checksums(rebooted: Server) -> None:
    client = rebooted.client(timeout_seconds=300.0)
    wanted = {"vm_lifetime_seconds": 3_600, "memory_mb": 256, "vcpu_count": 1, "image_variant": "base"}
    whole, hasty = [client.post("/v1/vms", json=wanted).json()["vm_id"] for _ in range(2)]
    manifests = []
    for vm in (whole, hasty):
        line = {"command": "echo kept > /root/kept; sync; echo in-memory > /dev/shm/kept"}
        assert client.post(f"/v1/vms/{vm}/exec", json=line).json()["exit_code"] == 0
        before = set(suspended(rebooted))
        assert client.post(f"/v1/vms/{vm}/suspend").json()["status"] == "suspended"
        (manifest,) = set(suspended(rebooted)) - before
        until(lambda manifest=manifest: json.loads(manifest.read_text())["memory"]["boot"] == "")
        manifests.append(manifest)
    # As if the host went down before the checksums are made.
    body = json.loads(manifests[1].read_text())
    body["memory"]["boot"] = "an earlier one"
    body["memory"]["files"] = {name: (size, "") for name, (size, _) in body["memory"]["files"].items()}
    manifests[1].write_text(json.dumps(body))
    reboot(rebooted)
    rebooted.start()
    client = rebooted.client(timeout_seconds=300.0)
    for vm, memory, said in ((whole, "kept", "in-memory\n"), (hasty, "lost", "")):
        assert client.get(f"/v1/vms/{vm}").json()["status"] == "suspended"
        told = client.post(
            f"/v1/vms/{vm}/exec", json={"command": "cat /root/kept; cat /dev/shm/kept 2>/dev/null"}
        ).json()
        assert told["stdout"] == f"kept\n{said}", told
        woken = [event for event in client.get(f"/v1/vms/{vm}/events").json() if event["type"] == "resumed"]
        assert [event["details"]["memory"] for event in woken] == [memory], woken
        assert ("went down" in woken[0]["reason"]) == (memory == "lost"), woken
        assert client.delete(f"/v1/vms/{vm}").status_code == 200
    assert census.wait_for_none(rebooted.home) == []


def suspended(running: Server) -> list[Path]:
    """What says of each suspended guest's memory what it is."""
    return list((running.home / "host" / "pool" / "suspended").glob("*/manifest.json"))
