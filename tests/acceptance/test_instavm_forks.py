"""The `instavm` package, unmodified, on a real server: clones of a VM at work, and forks, each somebody else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from instavm_client import Instavm
from server_fixture import Server

pytestmark = pytest.mark.microvms

FORKS = 2
SCRIPT = """
def run(vm, code, language='python'):
    client.session_id = vm['session_id']
    said = client.execute(code, language=language)
    assert said['exit_code'] in (0, None), said
    return said['stdout'].strip()
vm = client.vms.create(vm_lifetime_seconds=3600, memory_mb=512, vcpu_count=1, metadata={'n': 7}, image_variant='base', env={'KEY': 'secret'})
run(vm, "value = [41]")
run(vm, "echo before > /root/file", 'bash')
clone = client.vms.clone(vm['vm_id'], snapshot_name='of the clone')
run(vm, "value.append('original')")
run(clone, "value.append('clone'); open('/root/file', 'w').write('clone')")
WHO = 'hostname; cat /etc/machine-id; od -An -N16 -tx8 /dev/urandom; python3 -c "import random; print(random.random())"'
def look(one):
    return [run(one, 'print(value)'), run(one, 'cat /root/file; echo $KEY', 'bash'), run(one, WHO, 'bash')]
answer = {'vm': vm, 'clone': clone, 'said': [look(vm), look(clone)]}
"""


@pytest.fixture(scope="module")
def told(innkeeper: Server, instavm: Instavm) -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = instavm.sdk(SCRIPT)
    yield found
    client = innkeeper.client()
    for vm in client.get("/v1/vms/").json():
        if (vm["metadata"] or {}).get("n") == 7:
            client.delete(f"/v1/vms/{vm['vm_id']}")
    for one in client.get("/v1/snapshots").json():
        client.delete(f"/v1/snapshots/{one['id']}")


def test_both_go_on_from_the_same_moment(told: dict[str, Any]) -> None:
    (value, file, _), (other_value, other_file, _) = told["said"]
    assert (value, other_value) == ("[41, 'original']", "[41, 'clone']")
    assert (file, other_file) == ("before\nsecret", "clonesecret")


def test_a_clone_is_somebody_else(told: dict[str, Any]) -> None:
    (*_, who), (*_, other) = told["said"]
    assert not set(who.splitlines()) & set(other.splitlines())
    assert told["clone"]["session_id"] != told["vm"]["session_id"] and told["clone"]["snapshot_id"]


def test_forks_are_of_one_moment_and_leave_nothing_of_it(innkeeper: Server, told: dict[str, Any]) -> None:
    client = innkeeper.client()
    before = client.get("/v1/snapshots").json()
    made = client.post(f"/v1/vms/{told['vm']['vm_id']}/fork", json={"count": FORKS}).json()
    assert [one["status"] for one in made["vms"]] == ["active"] * FORKS
    seen = set()
    for one in made["vms"]:
        answer = client.post(
            "/execute", json={"session_id": one["session_id"], "command": "print(value)", "language": "python"}
        )
        assert answer.json()["stdout"].strip() == "[41, 'original']", answer.text
        answer = client.post(
            f"/v1/vms/{one['vm_id']}/exec", json={"command": "cat /etc/machine-id; od -An -N16 -tx8 /dev/urandom"}
        )
        seen |= set(answer.json()["stdout"].splitlines())
    assert len(seen) == 2 * FORKS
    assert client.get("/v1/snapshots").json() == before
