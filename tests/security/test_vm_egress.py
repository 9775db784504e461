"""Egress policies of VMs, from inside real guests against servers that really answer: side by side, warm guests, and across restarts and `kill -9`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from guest_side import PROGRAMS
from internet_fixture import ADDRESS, FORBIDDEN, Internet
from server_fixture import Server, server, until
from tests.integration.daemon_fixture import NEEDS_RUNSC

pytestmark = NEEDS_RUNSC

PRIVATE = FORBIDDEN[0]
NAME = "plain.test"
HTTP, HTTPS, INSIDE, LOOKUP = ("tcp", ADDRESS, 80), ("tcp", ADDRESS, 443), ("tcp", PRIVATE, 80), ("name", NAME, 0)
TARGETS = (HTTP, HTTPS, INSIDE, LOOKUP)
NEITHER = {"allow_http": False, "allow_https": False}
# What each opens. Names are looked up by our resolver under all of them; a private network stays closed, whoever allows it.
POLICIES: dict[str, tuple[dict[str, Any] | None, set[tuple[str, str, int]]]] = {
    "the internet": (None, {HTTP, HTTPS, LOOKUP}),
    "HTTP": ({"allow_https": False}, {HTTP, LOOKUP}),
    "HTTPS and a private network": ({"allow_http": False, "allowed_cidrs": ["10.0.0.0/8"]}, {HTTPS, LOOKUP}),
    "one address": ({**NEITHER, "allowed_cidrs": [f"{ADDRESS}/32"]}, {HTTP, HTTPS, LOOKUP}),
    "another network": ({**NEITHER, "allowed_cidrs": ["9.0.0.0/8"]}, {LOOKUP}),
    "nothing": (NEITHER, {LOOKUP}),
}  # fmt: skip


@pytest.fixture(scope="module")
def lasting(world: Internet, driver: str) -> Iterator[Server]:
    """A server whose guests outlive it, behind the world's host."""
    settings = {"INNKEEPER_HOST_NETNS": world.host, "INNKEEPER_DNS_UPSTREAMS": world.address, "INNKEEPER_VM_MEMORY_MB": "512"}  # fmt: skip
    with server(
        "base", driver=driver, INNKEEPER_KEEP_MACHINES="true", INNKEEPER_VM_POOL_SIZE="1", **settings
    ) as running:
        yield running
        for vm in running.client().get("/v1/vms").json():
            running.client().delete(f"/v1/vms/{vm['vm_id']}")
        running.stop()
        running.start(INNKEEPER_KEEP_MACHINES="false")


class Vm:
    """A VM with a policy."""

    def __init__(self, running: Server, policy: dict[str, Any] | None) -> None:
        self.running = running
        body = (
            {"vm_lifetime_seconds": 3_600}
            if policy is None
            else {"vm_lifetime_seconds": 3_600, "egress_policy": policy}
        )
        answer = running.client().post("/v1/vms", json=body)
        assert answer.status_code == 200, answer.text
        self.path = f"/v1/vms/{answer.json()['vm_id']}"

    def put(self, name: str, content: bytes) -> None:
        answer = self.running.client().put(
            f"{self.path}/files/content", params={"path": f"/tmp/{name}"}, content=content
        )
        assert answer.status_code in (200, 201), answer.text

    def run(self, command: str, **more: Any) -> Any:
        answer = self.running.client().post(f"{self.path}/exec", json={"command": command, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def knock(self) -> set[tuple[str, str, int]]:
        """What of TARGETS it reaches."""
        self.put("targets.json", json.dumps(TARGETS).encode())
        self.put("knock.py", (PROGRAMS / "knock.py").read_bytes())
        said = self.run("python3 /tmp/knock.py /tmp/targets.json")
        assert said["exit_code"] == 0, said
        answers = dict(zip(TARGETS, json.loads(said["stdout"]), strict=True))
        return {target for target, answer in answers.items() if answer in ("reached", ADDRESS)}

    def keep_knocking(self) -> None:
        self.put("keep_knocking.py", (PROGRAMS / "keep_knocking.py").read_bytes())
        words = " ".join(f"{address}:{port}" for _, address, port in (HTTP, HTTPS, INSIDE))
        said = self.run(f"setsid python3 /tmp/keep_knocking.py /tmp/knocks.json {words} > /tmp/knocks.log 2>&1 &")
        assert said["exit_code"] == 0, said

    def knocks(self) -> dict[tuple[str, str, int], tuple[int, int]]:
        """How often each was reached and was not, since it began."""
        answer = self.running.client().get(f"{self.path}/files/content", params={"path": "/tmp/knocks.json"})
        if answer.status_code != 200:
            return dict.fromkeys((HTTP, HTTPS, INSIDE), (0, 0))
        return {
            ("tcp", (where := at.partition(":"))[0], int(where[2])): tuple(counts)
            for at, counts in answer.json().items()
        }

    def delete(self) -> None:
        self.running.client().delete(self.path)


def claimed(running: Server) -> float:
    (line,) = re.findall(
        r"^innkeeper_control_\w+_claimed_total ([0-9.]+)$", running.client().get("/metrics").text, re.M
    )
    return float(line)


def pools_are_full(running: Server) -> bool:
    (host,) = json.loads(running.inn("host", "list", "--json").stdout)
    return all(pool["ready"] == pool["size"] for pool in host["pools"]) and len(host["pools"]) >= 2


def test_each_vm_reaches_what_its_own_policy_opens(lasting: Server) -> None:
    """Side by side, each asked as soon as its client heard of it."""
    made = {}
    for name, (policy, opened) in POLICIES.items():
        made[name] = Vm(lasting, policy)
        assert made[name].knock() == opened, name
    for name, (_, opened) in POLICIES.items():
        # The policies of the others have changed nothing.
        assert made[name].knock() == opened, name
    # One that waited warm, as those without a policy do while VMs are used.
    until(lambda: pools_are_full(lasting))
    before = claimed(lasting)
    made["warm"] = Vm(lasting, None)
    assert claimed(lasting) == before + 1
    assert made["warm"].knock() == POLICIES["the internet"][1]
    for vm in made.values():
        vm.delete()


def policies_outlive(lasting: Server, end: Callable[[], object]) -> None:
    closed, http = Vm(lasting, POLICIES["nothing"][0]), Vm(lasting, POLICIES["HTTP"][0])
    for vm in (closed, http):
        vm.keep_knocking()
    until(lambda: http.knocks()[HTTP][0] > 0 and closed.knocks()[HTTP][1] > 0)
    before = http.knocks()[HTTP][0], closed.knocks()[HTTP][1]
    end()
    lasting.start()
    until(lambda: http.knocks()[HTTP][0] > before[0] and closed.knocks()[HTTP][1] > before[1])
    assert [reached for reached, _ in closed.knocks().values()] == [0, 0, 0]
    assert [http.knocks()[target][0] for target in (HTTPS, INSIDE)] == [0, 0]
    assert closed.knock() == {LOOKUP} and http.knock() == {HTTP, LOOKUP}
    for vm in (closed, http):
        vm.delete()


def test_a_policy_outlives_kill_9(lasting: Server) -> None:
    """Guests try all the while, also while nobody is there: what is closed stays closed, what is open opens again."""
    policies_outlive(lasting, lasting.kill)


@pytest.mark.long
def test_a_policy_outlives_a_restart(lasting: Server) -> None:
    policies_outlive(lasting, lasting.stop)
