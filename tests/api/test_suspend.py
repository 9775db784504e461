"""Suspending and waking VMs over HTTP: what is answered, what wakes them, what is recorded, and what a host that cannot leaves behind."""

from __future__ import annotations

import asyncio
import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from innkeeper.control import expiry, reconciler
from innkeeper.control.vm_entry import VmEntry
from innkeeper.core.checkpoint_verbs import SuspendMachine
from innkeeper.core.host_verbs import EnsureMachine
from innkeeper.core.instance import InstanceState
from innkeeper.core.vm import parse_vm_id
from innkeeper.errors import CheckpointFailedError, InstanceNotFoundError, NoHostError, UnavailableError

pytestmark = pytest.mark.anyio


async def make(api: Any, **fields: Any) -> str:
    answer = await api.client.post("/v1/vms", json=fields)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["vm_id"])


async def act(api: Any, vm: str, verb: str, status: int = 200, **query: Any) -> dict[str, Any]:
    answer = await api.client.post(f"/v1/vms/{vm}/{verb}", params=query)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def record(api: Any, vm: str) -> dict[str, Any]:
    answer = await api.client.get(f"/v1/vms/{vm}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def run(api: Any, vm: str, status: int = 200) -> dict[str, Any]:
    body = {"vm_id": vm, "language": "bash", "command": "true"}
    answer = await api.client.post("/execute", json=body)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def events(api: Any, vm: str) -> list[tuple[str, str]]:
    rows = (await api.client.get(f"/v1/vms/{vm}/events")).json()
    return [(row["type"], row["reason"]) for row in rows]


def entry_of(api: Any, vm: str) -> VmEntry:
    parsed = parse_vm_id(vm)
    assert parsed is not None
    entry = api.world.control.live.by_instance(parsed[0])
    assert isinstance(entry, VmEntry)
    return entry


async def test_a_suspended_vm_has_no_machine_and_resumes_under_a_new_id(api: Any) -> None:
    vm = await make(api, vm_lifetime_seconds=600)
    told = await act(api, vm, "suspend")
    assert (told["vm_id"], told["status"], told["suspend_reason"]) == (vm, "suspended", "asked")
    assert not api.world.host.machines
    assert (await act(api, vm, "suspend"))["status"] == "suspended"
    assert api.world.host.count(SuspendMachine) == 1
    running, everything = [(await api.client.get(path)).json() for path in ("/v1/vms", "/v1/vms/")]
    assert (running, [row["status"] for row in everything]) == ([], ["suspended"])
    before = datetime.now(UTC)
    again = await act(api, vm, "resume")
    assert again["vm_id"] == f"{vm}-2" and again["status"] == "active"
    assert datetime.fromisoformat(again["expires_at"]) >= before + timedelta(seconds=600)
    assert (again["suspend_reason"], again["woken_by"][:6]) == (None, "token:")
    for name in (vm, again["vm_id"]):
        assert (await record(api, name))["vm_id"] == again["vm_id"]
    assert (await api.client.get(f"/v1/vms/{vm}-3")).status_code == 404
    # One that runs stays what it is called.
    assert (await act(api, vm, "resume"))["vm_id"] == again["vm_id"]
    assert await events(api, vm) == [
        ("created", ""),
        ("ready", "started"),
        ("suspended", "asked"),
        ("ready", "started"),
        ("resumed", ""),
    ]
    told = (await api.client.get("/v1/audit", params={"limit": 100})).json()["events"]
    assert [row["action"] for row in told if row["action"].startswith("vm.")] == [
        "vm.resume",
        "vm.suspend",
        "vm.create",
    ]


async def test_use_wakes_it_unless_it_is_to_sleep_on(api: Any) -> None:
    vm = await make(api)
    await act(api, vm, "suspend")
    await run(api, vm)
    found = await record(api, vm)
    # Nobody asked for another id.
    assert (found["vm_id"], found["status"], found["woken_by"][:6]) == (vm, "active", "token:")
    answer = await api.client.patch(f"/v1/vms/{vm}", json={"auto_resume": False})
    assert answer.json()["auto_resume"] is False
    await act(api, vm, "suspend")
    assert (await run(api, vm, 409))["code"] == "instance_suspended"
    session = found["session_id"]
    answer = await api.client.post("/execute", json={"session_id": session, "command": "1"})
    assert (answer.status_code, answer.json()["code"]) == (409, "instance_suspended")
    assert (await record(api, vm))["status"] == "suspended"
    assert (await act(api, vm, "resume"))["status"] == "active"
    await run(api, vm)


async def test_memory_that_was_lost_is_said(api: Any) -> None:
    vm = await make(api)
    await act(api, vm, "suspend")
    api.world.host.woken = {"with_memory": False, "reason": "The saved memory is damaged"}
    await act(api, vm, "resume")
    assert ("resumed", "The saved memory is damaged") in await events(api, vm)
    await act(api, vm, "suspend")
    api.world.host.suspended.clear()
    await run(api, vm)
    assert ("resumed", "Its memory is not on the host any more") in await events(api, vm)


async def test_a_vm_keeps_the_size_of_its_memory(api: Any) -> None:
    vm = await make(api, memory_mb=512)
    await api.client.patch(f"/v1/vms/{vm}", json={"memory_mb": 1024})
    await act(api, vm, "suspend")
    found = await act(api, vm, "resume")
    assert (found["memory_mb"], found["next_memory_mb"]) == (512, 1024)
    asked = [one for one in api.world.host.asked if isinstance(one, EnsureMachine)]
    assert [one.shape.memory_mb for one in asked] == [512, 512]


async def test_what_cannot_be_suspended_goes_on(api: Any) -> None:
    vm = await make(api)
    api.world.host.suspend_error = CheckpointFailedError("A program of the guest has a file open that was deleted")
    assert (await act(api, vm, "suspend", 409))["code"] == "checkpoint_failed"
    assert (await record(api, vm))["status"] == "active"
    api.world.host.suspend_error = UnavailableError("The host's disk is full")
    assert (await act(api, vm, "suspend", 503))["code"] == "service_unavailable"
    assert (await record(api, vm))["status"] == "active"
    assert [kind for kind, _ in await events(api, vm)][2:] == ["suspend_failed", "suspend_failed"]
    api.world.host.suspend_error = InstanceNotFoundError()
    assert (await act(api, vm, "suspend", 409))["code"] == "conflict"
    assert entry_of(api, vm).instance.state is InstanceState.STOPPED
    await run(api, vm)


async def test_a_host_without_room_leaves_it_suspended(api: Any) -> None:
    vm = await make(api)
    await act(api, vm, "suspend")
    api.world.host.ensure_error = NoHostError()
    assert (await act(api, vm, "resume", 503))["code"] == "service_unavailable"
    assert (await record(api, vm))["status"] == "suspended"
    await run(api, vm, 503)
    api.world.host.ensure_error = None
    assert (await act(api, vm, "resume"))["status"] == "active"


async def test_what_was_cut_short_is_done_again(api: Any) -> None:
    vm = await make(api)
    api.world.host.suspend_error = UnavailableError("The host is not reachable")
    entry = entry_of(api, vm)
    machine = api.world.host.machines.pop(entry.instance.id)
    await act(api, vm, "suspend", 503)
    assert (await record(api, vm))["status"] == "suspending"
    api.world.host.machines[entry.instance.id] = machine
    api.world.host.suspend_error = None
    await api.world.control.later.flush(api.world.control)
    await reconciler.adopt(api.world.control, api.world.host.id)
    async with asyncio.timeout(20):
        while entry.instance.state is not InstanceState.SUSPENDED:
            await asyncio.sleep(0.01)
    assert ("suspended", "asked") in await events(api, vm)
    await run(api, vm)


async def test_whoever_comes_while_it_is_suspended_wakes_it_after(api: Any) -> None:
    vm = await make(api)
    api.world.host.hold_suspend.clear()
    suspending = asyncio.ensure_future(act(api, vm, "suspend"))
    async with asyncio.timeout(20):
        while not api.world.host.count(SuspendMachine):
            await asyncio.sleep(0.01)
    assert (await record(api, vm))["status"] == "suspending"
    using = asyncio.ensure_future(run(api, vm))
    await asyncio.sleep(0.05)
    api.world.host.hold_suspend.set()
    await suspending
    await using
    assert (await record(api, vm))["status"] == "active"
    # And whoever ends it meanwhile ends it.
    api.world.host.hold_suspend.clear()
    suspending = asyncio.ensure_future(act(api, vm, "suspend"))
    async with asyncio.timeout(20):
        while api.world.host.count(SuspendMachine) < 2:
            await asyncio.sleep(0.01)
    ending = asyncio.ensure_future(api.client.delete(f"/v1/vms/{vm}"))
    await asyncio.sleep(0.05)
    api.world.host.hold_suspend.set()
    assert (await ending).json()["status"] == "killed"
    await asyncio.wait([suspending])
    assert suspending.exception() is None or "404" in str(suspending.exception())


async def test_a_vm_is_suspended_where_it_would_end(api: Any) -> None:
    vm = await make(api, auto_suspend=True, vm_lifetime_seconds=60)
    kept = await make(api, vm_lifetime_seconds=60)
    assert ((await record(api, vm))["auto_suspend"], (await record(api, kept))["auto_suspend"]) == (True, False)
    await act(api, kept, "suspend")
    entry = entry_of(api, vm)
    for one in (entry, entry_of(api, kept)):
        one.change_vm(expired(one))
    api.world.control.expiry_hint.set()
    await expiry.step(api.world.control)
    assert entry.instance.state is InstanceState.SUSPENDED
    assert (await record(api, vm))["suspend_reason"] == "expired"
    assert [kind for kind, _ in await events(api, vm)] == ["created", "ready", "expiring", "suspended"]
    # Time stands still for what is suspended, and begins anew when it goes on.
    api.world.control.expiry_hint.set()
    await expiry.step(api.world.control)
    assert {row["status"] for row in (await api.client.get("/v1/vms/")).json()} == {"suspended"}
    await run(api, vm)
    assert entry.vm.expires_at > datetime.now(UTC) + timedelta(seconds=30)
    # One that cannot be suspended lives on, and that is tried again later.
    api.world.host.suspend_error = CheckpointFailedError("no")
    entry.change_vm(expired(entry))
    api.world.control.expiry_hint.set()
    await expiry.step(api.world.control)
    assert entry.ready and entry.vm.expires_at > datetime.now(UTC)
    assert ("suspend_failed", "no") in await events(api, vm)


def expired(entry: VmEntry) -> Any:
    return dataclasses.replace(entry.vm, expires_at=datetime.now(UTC) - timedelta(seconds=1))


async def test_resuming_without_waiting_answers_at_once(api: Any) -> None:
    vm = await make(api)
    await act(api, vm, "suspend")
    api.world.host.hold.clear()
    told = await act(api, vm, "resume", wait="false")
    assert told["vm_id"] == f"{vm}-2" and told["status"] in ("creating", "suspended")
    api.world.host.hold.set()
    entry = entry_of(api, vm)
    async with asyncio.timeout(20):
        while not entry.ready:
            await asyncio.sleep(0.01)
    assert (await act(api, vm, "suspend"))["status"] == "suspended"
    assert (await api.client.post("/v1/vms/vm_nothing/suspend")).status_code == 404
    assert (await api.client.post("/v1/vms/vm_nothing/resume")).status_code == 404
