"""The `instavm` package, unmodified, on a real server: VMs suspended with what runs in them, by request and where they would end, and what wakes them."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest
from instavm_client import Instavm
from server_fixture import Server, until

pytestmark = pytest.mark.microvms

RUN = """
def run(code, language='python'):
    said = client.execute(code, language=language)
    assert said['exit_code'] in (0, None), said
    return said['stdout'].strip()
"""
PREPARE = f"""{RUN}
vm = client.vms.create(vm_lifetime_seconds=3600, memory_mb=512, vcpu_count=1, image_variant='base', **words[0])
client.session_id = vm['session_id']
run("value = [41]; opened = open('/root/open', 'w+'); opened.write('half'); opened.flush()")
run("nohup bash -c 'for ((n = 0; ; n++)); do echo $n > /tmp/new; mv /tmp/new /tmp/count; sleep 0.05; done' > /dev/null 2>&1 &", 'bash')
import time
while not run('cat /tmp/count 2>/dev/null || true', 'bash'):
    time.sleep(0.1)
"""
LOOK = """
def look():
    said = [run("value.append(1); opened.write('+'); opened.seek(0); print(value, opened.read())"), run('hostname; cat /etc/machine-id', 'bash')]
    first = run('cat /tmp/count', 'bash')
    while run('cat /tmp/count', 'bash') == first:
        time.sleep(0.1)
    return [*said, int(first)]
"""


def test_everything_goes_on_where_it_was(innkeeper: Server, instavm: Instavm) -> None:
    script = f"""{PREPARE}{LOOK}
before = look()
suspended = client.vms.suspend(vm['vm_id'])
listed = [len([one for one in found if one['vm_id'] == vm['vm_id']]) for found in (client.vms.list(), client.vms.list_all_records())]
resumed = client.vms.resume(vm['vm_id'])
after = look()
client.vms.suspend(resumed['vm_id'])
# Nobody resumes it: its use does.
woken = look()
answer = {{'vm': vm, 'suspended': suspended, 'listed': listed, 'resumed': resumed, 'said': [before, after, woken],
           'old': client.vms.get(vm['vm_id'])}}
client.vms.delete(vm['vm_id'])
"""
    told: dict[str, Any] = instavm.sdk(script, {})
    assert (told["suspended"]["status"], told["listed"]) == ("suspended", [0, 1])
    assert (told["resumed"]["status"], told["resumed"]["vm_id"]) == ("active", f"{told['vm']['vm_id']}-2")
    assert told["old"]["vm_id"] == told["resumed"]["vm_id"] and told["old"]["woken_by"].startswith("token:")
    values, identities, counts = zip(*told["said"], strict=True)
    assert values == ("[41, 1] half+", "[41, 1, 1] half++", "[41, 1, 1, 1] half+++")
    assert len(set(identities)) == 1
    assert counts[0] < counts[1] < counts[2]


def test_the_command_line(instavm: Instavm) -> None:
    vm = instavm.json(
        "create", "--memory", "512", "--vcpu", "1", "--timeout", "600", "--auto-suspend", "--no-auto-resume"
    )
    instavm.ok("vm", "suspend", vm["vm_id"])
    found = instavm.sdk("answer = client.vms.get(words[0])", vm["vm_id"])
    assert (found["status"], found["auto_suspend"], found["auto_resume"]) == ("suspended", True, False)
    caught = "client.session_id = words[0]\ntry:\n    client.execute('1')\nexcept Exception as error:\n    answer = str(error)"
    assert "409" in instavm.sdk(caught, vm["session_id"])
    assert f"{vm['vm_id']}-2" in instavm.ok("vm", "resume", vm["vm_id"])
    instavm.ok("rm", vm["vm_id"])


def test_it_is_suspended_where_it_would_end_and_a_share_wakes_it(innkeeper: Server) -> None:
    client = innkeeper.client()
    wanted = {"memory_mb": 512, "vm_lifetime_seconds": 20, "auto_suspend": True, "image_variant": "base"}
    made = client.post("/v1/vms", json={**wanted, "share": {"port": 8000, "is_public": True}}).json()
    path = f"/v1/vms/{made['vm_id']}"
    serve = "nohup python3 -m http.server 8000 --directory /etc > /dev/null 2>&1 &"
    assert client.post(f"{path}/exec", json={"command": serve}).status_code == 200
    until(lambda: client.get(path).json()["status"] == "suspended", seconds=120)
    assert client.get(path).json()["suspend_reason"] == "expired"
    told = [event["type"] for event in client.get(f"{path}/events").json()]
    assert told[-2:] == ["expiring", "suspended"], told
    host, _, port = made["share"]["url"].split("//")[1].rstrip("/").partition(":")
    until(lambda: b"200 OK" in _get(host, int(port or 80)), seconds=60)
    found = client.get(path).json()
    assert (found["status"], found["woken_by"]) == ("active", "share")
    client.delete(path)


def _get(host: str, port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(f"GET /hostname HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
        said, deadline = b"", time.monotonic() + 60
        while time.monotonic() < deadline and (piece := connection.recv(4096)):
            said += piece
    return said
