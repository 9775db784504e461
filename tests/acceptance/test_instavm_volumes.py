"""The `instavm` package, unmodified, on a real server: volumes that outlive their VMs, one writer, checkpoints, and what a full one does."""

from __future__ import annotations

from typing import Any

import pytest
from instavm_client import Instavm
from server_fixture import Server

pytestmark = pytest.mark.microvms

SCRIPT = """
import time
def made(**more):
    return client.vms.create(vm_lifetime_seconds=3600, memory_mb=512, vcpu_count=1, image_variant='base', **more)
def run(vm, code):
    client.session_id = vm['session_id']
    said = client.execute(code, language='bash')
    return said['exit_code'], said['stdout'].strip()
def refused(work):
    try:
        work()
    except Exception as error:
        answered = getattr(error, 'response', None)
        return str(error) if answered is None else answered.text
    return None
volume = client.volumes.create(name='models', quota_bytes=128 << 20)
first = made(volumes=[{'volume_id': volume['id'], 'mount_path': '/models'}])
answer = {'volume': volume}
answer['written'] = run(first, 'echo one > /models/a && sync && echo done')
second = made()
answer['second writer'] = refused(lambda: client.vms.mount_volume(second['vm_id'], volume_id=volume['id'], mount_path='/models'))
kept = client.volumes.create_checkpoint(volume['id'], name='first')
run(first, 'echo two > /models/a')
client.vms.mount_volume(second['vm_id'], volume_id=volume['id'], mount_path='/seen', mode='ro', checkpoint_id='latest')
answer['seen'] = run(second, 'cat /seen/a; touch /seen/b 2>&1 | grep -c Read-only')
answer['mounts'] = [one['mount_path'] for one in client.vms.list_volumes(second['vm_id'])]
answer['full'] = run(first, 'head -c 200000000 /dev/zero 2>&1 > /models/large; rm /models/large; echo more > /root/own && cat /root/own')
answer['in use'] = refused(lambda: client.volumes.delete(volume['id']))
client.session_id = first['session_id']
client.execute('hold = open("/models/a")', language='python')
answer['open'] = refused(lambda: client.vms.unmount_volume(first['vm_id'], volume['id'], mount_path='/models'))
client.execute('hold.close()', language='python')
client.vms.unmount_volume(first['vm_id'], volume['id'], mount_path='/models')
client.vms.delete(first['vm_id'])
client.vms.mount_volume(second['vm_id'], volume_id=volume['id'], mount_path='/mine')
answer['outlives'] = run(second, 'cat /mine/a && echo three > /mine/a && sync')
client.vms.delete(second['vm_id'])
answer['usage'] = client.volumes.get(volume['id'], refresh_usage=True)
answer['deleted'] = [client.volumes.delete_checkpoint(volume['id'], kept['id'])['status'], client.volumes.delete(volume['id'])['status']]
"""


@pytest.fixture(scope="module")
def said(instavm: Instavm) -> dict[str, Any]:
    found: dict[str, Any] = instavm.sdk(SCRIPT, seconds=600)
    return found


def test_one_vm_writes_and_another_is_told_who_does(said: dict[str, Any]) -> None:
    assert said["written"] == [0, "done"]
    assert "attached to vm_" in said["second writer"] and "attached to vm_" in said["in use"]


def test_a_checkpoint_is_as_it_was_and_cannot_be_written(said: dict[str, Any]) -> None:
    assert said["seen"] == [0, "one\n1"] and said["mounts"] == ["/seen"]


def test_a_full_volume_is_full_for_its_vm_alone(said: dict[str, Any]) -> None:
    code, text = said["full"]
    assert (code, text.splitlines()[-1]) == (0, "more") and "No space left" in text


def test_it_is_not_taken_from_a_program_that_has_it_open(said: dict[str, Any]) -> None:
    assert said["open"] is not None and "in use" in said["open"]


def test_it_outlives_its_vms(said: dict[str, Any]) -> None:
    assert said["outlives"] == [0, "two"]
    assert said["usage"]["mounts"] == [] and said["usage"]["used_bytes"] > 0
    assert said["deleted"] == ["deleted", "deleted"]


def test_the_command_line(innkeeper: Server, instavm: Instavm) -> None:
    made = instavm.json("volume", "create", "of the shell", "--quota", "128mb")
    listed = instavm.ok("volume", "ls", "--refresh")
    assert made["id"] in listed and "of the shell" in listed
    vm = instavm.json("create", "--volume", f"{made['id']}:/data", "--memory", "512")
    client = innkeeper.client()
    mounted = client.get(f"/v1/vms/{vm['vm_id']}/volumes").json()
    assert [(one["volume_id"], one["mount_path"], one["mode"]) for one in mounted] == [(made["id"], "/data", "rw")]
    assert client.delete(f"/v1/vms/{vm['vm_id']}").status_code == 200
    instavm.ok("volume", "update", made["id"], "--name", "renamed", "--quota", "256mb")
    assert client.get(f"/v1/volumes/{made['id']}").json()["quota_bytes"] == 256 << 20
    instavm.ok("volume", "rm", made["id"])
    assert client.get(f"/v1/volumes/{made['id']}").status_code == 404
