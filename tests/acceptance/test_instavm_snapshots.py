"""The `instavm` package, unmodified, on a real server: snapshots of VMs with what runs in them, and VMs that begin with those."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from instavm_client import Instavm
from server_fixture import Server

pytestmark = pytest.mark.microvms

# What a VM is before its snapshot: an interpreter with a value, a file, a program that counts, and who it is.
PREPARE = """
vm = client.vms.create(vm_lifetime_seconds=3600, memory_mb=512, vcpu_count=1, metadata={'n': 1}, image_variant='base')
client.session_id = vm['session_id']
def run(code, language='python'):
    said = client.execute(code, language=language)
    assert said['exit_code'] in (0, None), said
    return said['stdout'].strip()
"""
STATE = """
run("value = [41]; opened = open('/root/open', 'w+'); opened.write('half'); opened.flush()")
run("echo before > /root/file", 'bash')
run("nohup bash -c 'for ((n = 0; ; n++)); do echo $n > /tmp/new; mv /tmp/new /tmp/count; sleep 0.05; done' > /dev/null 2>&1 &", 'bash')
"""
LOOK = """
def look():
    return [run("value.append(len(value)); print(value, end='')"), run("opened.write('+'); opened.seek(0); print(opened.read(), end='')"),
            run('cat /root/file', 'bash'), run('hostname; cat /etc/machine-id', 'bash'),
            run('cat /proc/sys/kernel/random/uuid; python3 -c "import random; print(random.random())"', 'bash')]
def counts():
    import time
    first = run('cat /tmp/count', 'bash')
    for _ in range(200):
        if run('cat /tmp/count', 'bash') != first:
            return True
        time.sleep(0.1)
    return False
"""


@pytest.fixture(scope="module")
def taken(innkeeper: Server, instavm: Instavm) -> Iterator[dict[str, Any]]:
    """A VM at work, and a snapshot of it with its memory: both answers, and what the VM said of itself after it was changed."""
    script = f"""{PREPARE}{STATE}{LOOK}
snapshot = client.vms.snapshot(vm['vm_id'], name='at work')
run("value.clear()")
run("echo after > /root/file", 'bash')
answer = {{'vm': vm, 'snapshot': snapshot, 'said': look(), 'counts': counts()}}
"""
    made = instavm.sdk(script)
    yield made
    client = innkeeper.client()
    for vm in client.get("/v1/vms").json():
        if (vm["metadata"] or {}).get("n") == 1:
            client.delete(f"/v1/vms/{vm['vm_id']}")
    for one in client.get("/v1/snapshots").json():
        client.delete(f"/v1/snapshots/{one['id']}")


def test_the_vm_goes_on(taken: dict[str, Any]) -> None:
    snapshot = taken["snapshot"]
    assert (snapshot["status"], snapshot["name"], snapshot["memory"]) == ("ready", "at work", True)
    assert snapshot["downtime_ms"] > 0 and snapshot["memory_bytes"] > 1_000_000
    assert taken["said"][:3] == ["[0]", "half+", "after"] and taken["counts"]
    print(f"downtime {snapshot['downtime_ms']:.0f} ms, {snapshot['memory_bytes']} + {snapshot['disk_bytes']} bytes")


def test_another_vm_goes_on_from_there(taken: dict[str, Any], instavm: Instavm, innkeeper: Server) -> None:
    script = f"""{LOOK}
vm = client.vms.create(snapshot_id=words[0], vm_lifetime_seconds=3600, metadata={{'n': 1}})
client.session_id = vm['session_id']
def run(code, language='python'):
    said = client.execute(code, language=language)
    assert said['exit_code'] in (0, None), said
    return said['stdout'].strip()
answer = {{'vm': vm, 'record': client.vms.get(vm['vm_id']), 'said': look(), 'counts': counts()}}
"""
    snapshot = taken["snapshot"]
    first, second = (instavm.sdk(script, snapshot["id"]) for _ in range(2))
    for one in (first, second):
        assert (one["record"]["snapshot_id"], one["record"]["restored"]) == (snapshot["id"], "memory")
        assert (one["record"]["memory_mb"], one["record"]["vcpu_count"]) == (512, 1)
        assert one["said"][:3] == ["[41, 1]", "half+", "before"] and one["counts"]
    assert len({taken["said"][3], first["said"][3], second["said"][3]}) == 3
    assert len({taken["said"][4], first["said"][4], second["said"][4]}) == 3
    assert len({taken["vm"]["vm_id"], first["vm"]["vm_id"], second["vm"]["vm_id"]}) == 3
    events = innkeeper.client().get(f"/v1/vms/{first['vm']['vm_id']}/events").json()
    assert [event["type"] for event in events][:2] == ["created", "restored"]


def test_the_command_line(taken: dict[str, Any], instavm: Instavm, innkeeper: Server) -> None:
    vm = taken["vm"]["vm_id"]
    made = instavm.json("snapshot", "create", vm, "--name", "by hand")
    assert made["status"] == "ready"
    assert made["id"] in instavm.ok("snapshot", "ls") and "by hand" in instavm.ok("snapshot", "get", made["id"])
    client = innkeeper.client()
    found = client.get(f"/v1/snapshots/{made['id']}").json()
    # Saved memory is nobody else's; of the disk, what the VM has not written since is shared with it.
    assert found["memory_bytes"] <= found["own_bytes"] < found["size_bytes"]
    assert found["own_bytes"] + found["shared_bytes"] == found["size_bytes"]
    assert "Deleted" in instavm.ok("snapshot", "rm", made["id"])
    assert client.get(f"/v1/snapshots/{made['id']}").json()["code"] == "snapshot_not_found"


def test_a_disk_alone_and_a_last_snapshot(innkeeper: Server) -> None:
    client = innkeeper.client()
    shape = {
        "memory_mb": 512,
        "vcpu_count": 1,
        "image_variant": "base",
        "metadata": {"n": 1},
        "vm_lifetime_seconds": 3_600,
    }
    vm = client.post("/v1/vms", json={**shape, "snapshot_on_terminate": True, "snapshot_name": "the last"}).json()[
        "vm_id"
    ]
    ran = client.post(f"/v1/vms/{vm}/exec", json={"command": "echo kept > /root/file; echo lost > /dev/shm/file"})
    assert ran.json()["exit_code"] == 0, ran.text
    disk = client.post(f"/v1/vms/{vm}/snapshot", json={"memory": False}).json()
    assert client.delete(f"/v1/vms/{vm}").json()["status"] == "killed"
    last = client.get("/v1/snapshots").json()[0]
    assert (last["name"], last["memory"], last["vm_id"]) == ("the last", True, vm)
    for snapshot, restored, shm in ((disk, "disk", "absent"), (last, "memory", "lost")):
        begun = client.post("/v1/vms", json={"snapshot_id": snapshot["id"], "metadata": {"n": 1}}).json()["vm_id"]
        assert client.get(f"/v1/vms/{begun}").json()["restored"] == restored
        command = {"command": "cat /root/file; cat /dev/shm/file || echo absent"}
        assert client.post(f"/v1/vms/{begun}/exec", json=command).json()["stdout"].split() == ["kept", shm]
        # What came of it stands on a disk of its own.
        assert client.delete(f"/v1/snapshots/{snapshot['id']}").json()["status"] == "deleted"
        assert client.post(f"/v1/vms/{begun}/exec", json={"command": "cat /root/file"}).json()["stdout"] == "kept\n"
        client.delete(f"/v1/vms/{begun}")


def test_a_snapshot_is_verified(taken: dict[str, Any], innkeeper: Server) -> None:
    client, snapshot = innkeeper.client(), taken["snapshot"]["id"]
    deadline = time.monotonic() + 120
    while client.get(f"/v1/snapshots/{snapshot}").json()["disk_digest"] is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    before = {vm["vm_id"] for vm in client.get("/v1/vms/").json()}
    answer = client.post(f"/v1/snapshots/{snapshot}/verify", json={}, timeout=600).json()
    print(answer["checks"])
    checks = {check["name"]: check["ok"] for check in answer["checks"]}
    assert checks == dict.fromkeys(("disk", "memory", "agent", "clock", "entropy", "identity", "sentinel"), True)
    assert (answer["status"], answer["damaged"]) == ("ready", False)
    assert {vm["vm_id"] for vm in client.get("/v1/vms/").json()} == before


def test_damage_is_found(taken: dict[str, Any], innkeeper: Server) -> None:
    client = innkeeper.client()
    made = client.post(f"/v1/vms/{taken['vm']['vm_id']}/snapshot", json={"name": "to be damaged"}).json()
    (manifest,) = innkeeper.home.glob(f"host/**/{made['id']}/manifest.json")
    (memory, *_) = sorted(manifest.parent.glob("memory/*"), key=lambda path: -path.stat().st_size)
    with memory.open("r+b") as file:
        file.seek(memory.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    vms = len(client.get("/v1/vms/").json())
    refused = client.post("/v1/vms", json={"snapshot_id": made["id"]})
    assert (refused.status_code, refused.json()["code"]) == (409, "snapshot_damaged"), refused.text
    assert len(client.get("/v1/vms/").json()) == vms
    answer = client.post(f"/v1/snapshots/{made['id']}/verify", json={}, timeout=600).json()
    assert ("memory", False) in {(check["name"], check["ok"]) for check in answer["checks"]} and answer["damaged"]
    assert client.delete(f"/v1/snapshots/{made['id']}").status_code == 200
