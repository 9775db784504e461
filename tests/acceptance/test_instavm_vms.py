"""The `instavm` package, unmodified, on a real server: VMs and sessions; and what outlives a restart."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import httpx2
import pytest
from instavm_client import Instavm
from server_fixture import Server, server, until

pytestmark = pytest.mark.microvms


def test_the_life_of_a_vm(instavm: Instavm) -> None:
    made = instavm.sdk(
        "answer = client.vms.create(vm_lifetime_seconds=600, memory_mb=512, vcpu_count=1, metadata={'team': 'a'}, env={'KEY': 'value'})"
    )
    assert (made["status"], made["env_status"], made["vm_id"][:3]) == ("active", "applied", "vm_")
    found = instavm.sdk("answer = client.vms.get(words[0])", made["vm_id"])
    assert (found["memory_mb"], found["metadata"], found["session_id"]) == (512, {"team": "a"}, made["session_id"])
    assert made["vm_id"] in [vm["vm_id"] for vm in instavm.sdk("answer = client.vms.list()")]
    changed = instavm.sdk("answer = client.vms.update(words[0], memory_mb=1024, metadata={'team': 'b'})", made["vm_id"])
    assert (changed["next_memory_mb"], changed["metadata"]) == (1024, {"team": "b"})
    assert instavm.sdk("answer = client.list_sandboxes(metadata={'team': 'b'})")[0]["vm_id"] == made["vm_id"]
    assert instavm.sdk("answer = client.vms.stage_env(words[0], {'A': 'b'})", made["vm_id"])["staged"] == ["A"]
    assert instavm.sdk("answer = client.vms.delete(words[0])", made["vm_id"])["status"] == "killed"
    everything = {vm["vm_id"]: vm["status"] for vm in instavm.sdk("answer = client.vms.list_all_records()")}
    assert everything[made["vm_id"]] == "killed"


def test_a_session(instavm: Instavm) -> None:
    script = """
session = client.start_session()
answer = [session, client.get_session_status(), client.get_session_info(), client.is_session_active()]
"""
    session, status, info, active = instavm.sdk(script)
    assert status["session_id"] == info["session_id"] == session
    assert (status["exists"], status["vm_assigned"], active) == (True, False, False)
    made = instavm.sdk("answer = client.vms.create(session_id=words[0])", session)
    assert made["session_id"] == session
    assert instavm.sdk("answer = client.get_session_status(words[0])", session)["vm_status"] == "active"
    assert instavm.sdk("answer = client.kill(words[0])", session)["status"] == "killed"
    assert instavm.sdk("answer = client.get_session_status(words[0])", session)["vm_alive"] is False


def test_what_is_refused_names_its_field(instavm: Instavm) -> None:
    caught = "try:\n    client.vms.create(volumes=['v'])\nexcept Exception as error:\n    answer = str(error)"
    assert "422" in instavm.sdk(caught)


def test_the_command_line(instavm: Instavm) -> None:
    made = instavm.json("create", "--memory", "512", "--vcpu", "1", "--timeout", "600")
    assert made["status"] == "active"
    assert made["vm_id"] in instavm.ok("ls")
    instavm.ok("rm", made["vm_id"])
    assert made["vm_id"] not in instavm.ok("ls") and made["vm_id"] in instavm.ok("ls", "-a")


@pytest.fixture(scope="module")
def lasting(driver: str) -> Iterator[Server]:
    """A server whose guests outlive it."""
    with server("base", driver=driver, INNKEEPER_KEEP_MACHINES="true") as running:
        yield running
        if running.process is not None:
            for vm in running.client().get("/v1/vms").json():
                running.client().delete(f"/v1/vms/{vm['vm_id']}")
            running.stop()
            running.start(INNKEEPER_KEEP_MACHINES="false")


def test_vms_outlive_the_server(lasting: Server) -> None:
    made = lasting.client().post("/v1/vms", json={"vm_lifetime_seconds": 3_600, "memory_mb": 512}).json()
    empty = lasting.client().post("/v1/sessions/session", json={"memory_mb": 512}).json()["session_id"]
    machine = lasting.machine_of_vm(made["vm_id"])
    sandbox = lasting.sandbox_pids(machine)
    for end in (lasting.kill, lasting.stop):
        end()
        lasting.start()
        client = lasting.client()
        assert client.get(f"/v1/vms/{made['vm_id']}").json()["status"] == "active"
        again = client.post("/v1/vms", json={"session_id": made["session_id"]}).json()
        assert (again["vm_id"], again["status"]) == (made["vm_id"], "active")
        assert lasting.sandbox_pids(machine) == sandbox
        assert client.get(f"/v1/sessions/status/{empty}").json()["vm_assigned"] is False
    # What was asked of it while it ran is what its next one is.
    assert client.post("/v1/vms", json={"session_id": empty}).json()["session_id"] == empty
    client.delete(f"/v1/vms/{made['vm_id']}")
    assert lasting.sandbox_pids(machine) == []


def test_snapshots_outlive_the_server(lasting: Server) -> None:
    client = lasting.client()
    vm = client.post("/v1/vms", json={"vm_lifetime_seconds": 3_600, "memory_mb": 512}).json()["vm_id"]
    client.post(f"/v1/vms/{vm}/exec", json={"command": "echo kept > /dev/shm/file"})
    taken = client.post(f"/v1/vms/{vm}/snapshot", json={"name": "kept"}).json()
    client.delete(f"/v1/vms/{vm}")
    lasting.kill()
    lasting.start()
    client = lasting.client()
    assert client.get(f"/v1/snapshots/{taken['id']}").json()["status"] == "ready"
    begun = client.post("/v1/vms", json={"snapshot_id": taken["id"]}).json()["vm_id"]
    assert client.post(f"/v1/vms/{begun}/exec", json={"command": "cat /dev/shm/file"}).json()["stdout"] == "kept\n"
    assert client.delete(f"/v1/snapshots/{taken['id']}").json()["status"] == "deleted"
    client.delete(f"/v1/vms/{begun}")


def test_a_lifetime_ends_while_the_server_is_away(lasting: Server) -> None:
    made = lasting.client().post("/v1/vms", json={"vm_lifetime_seconds": 20, "memory_mb": 512}).json()
    machine = lasting.machine_of_vm(made["vm_id"])
    lasting.kill()
    lasting.start()
    client = lasting.client()
    until(lambda: client.get(f"/v1/vms/{made['vm_id']}").json()["status"] == "killed")
    assert client.get(f"/v1/vms/{made['vm_id']}").json()["end_reason"] == "expired"
    assert lasting.sandbox_pids(machine) == []


def test_the_second_vm_takes_a_warm_guest(lasting: Server) -> None:
    client = lasting.client()
    first = client.post("/v1/vms", json={}).json()
    # One of the profile `base`, one of VMs.
    until(lambda: [pool["ready"] == pool["size"] for pool in warm(lasting)] == [True, True])
    before = claimed(client)
    second = client.post("/v1/vms", json={}).json()
    assert claimed(client) == before + 1
    for vm in (first, second):
        client.delete(f"/v1/vms/{vm['vm_id']}")


def claimed(client: httpx2.Client) -> float:
    """How many instances took a warm guest since the server began."""
    (line,) = re.findall(r"^innkeeper_control_instances_claimed_total ([0-9.]+)$", client.get("/metrics").text, re.M)
    return float(line)


def warm(running: Server) -> list[dict[str, int]]:
    (host,) = json.loads(running.inn("host", "list", "--json").stdout)
    pools: list[dict[str, int]] = host["pools"]
    return pools
