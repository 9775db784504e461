"""Clones and forks over HTTP: what they are, what is left of the moment that they are of, and what is refused before anything begins."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest

from innkeeper.control import forks, organizations, snapshot_taking, snapshots
from innkeeper.core import checkpoint_verbs as verbs
from innkeeper.core.checkpoint_verbs import SuspendMachine
from innkeeper.core.host_verbs import DestroyMachine, EnsureMachine
from innkeeper.core.vm import parse_vm_id
from innkeeper.errors import CheckpointFailedError, UnavailableError
from innkeeper.store import snapshots as store

pytestmark = pytest.mark.anyio


async def make(api: Any, **fields: Any) -> dict[str, Any]:
    answer = await api.client.post("/v1/vms", json=fields)
    assert answer.status_code == 200, answer.text
    found = await api.client.get(f"/v1/vms/{answer.json()['vm_id']}")
    made: dict[str, Any] = found.json()
    return made


async def get(api: Any, vm_id: str) -> dict[str, Any]:
    found: dict[str, Any] = (await api.client.get(f"/v1/vms/{vm_id}")).json()
    return found


async def fork(api: Any, vm: dict[str, Any], path: str = "fork", **fields: Any) -> Any:
    return await api.client.post(f"/v1/vms/{vm['vm_id']}/{path}", json=fields)


def entry_of(api: Any, vm_id: str) -> Any:
    parsed = parse_vm_id(vm_id)
    assert parsed is not None
    return api.world.control.live.by_instance(parsed[0])


async def rows(api: Any) -> list[Any]:
    found: list[Any] = await api.world.control.database.read(store.on_host, api.world.host.id)
    return found


async def test_a_clone_is_as_its_original_and_somebody_else(api: Any) -> None:
    vm = await make(
        api, memory_mb=512, vcpu_count=1, metadata={"n": 1}, env={"KEY": "secret"}, vm_lifetime_seconds=600, idle_seconds=60,
        egress_policy={"allow_http": False}, auto_suspend=True, min_isolation="none",
    )  # fmt: skip
    assert vm["min_isolation"] == "none"
    answer = await fork(api, vm, "clone")
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert (told["status"], told["snapshot_id"], told["volumes"]) == ("active", None, [])
    clone = await get(api, told["vm_id"])
    same = (
        "memory_mb",
        "vcpu_count",
        "metadata",
        "vm_lifetime_seconds",
        "idle_seconds",
        "egress_policy",
        "image",
        "auto_suspend",
        "env_status",
        "min_isolation",
    )
    assert {name: clone[name] for name in same} == {name: vm[name] for name in same}
    assert clone["vm_id"] != vm["vm_id"] and clone["session_id"] != vm["session_id"] and clone["restored"] == "memory"
    sealed = entry_of(api, clone["vm_id"]).vm
    ids = {"organization_id": sealed.organization_id, "object_id": sealed.session_id}
    assert api.world.control.box.open_env(sealed.env_sealed, **ids) == {"KEY": "secret"}
    # The moment goes when all that are made of it have begun, and nobody saw it.
    assert (await api.client.get("/v1/snapshots")).json() == []
    await api.world.until(lambda: api.world.host.checkpoints.kept == {})
    await api.world.until(lambda: not api.world.control.forking)
    assert await rows(api) == []
    # Its session's next VM is what the first one's would be.
    await api.client.delete(f"/v1/vms/{clone['vm_id']}")
    again = await make(api, session_id=clone["session_id"])
    assert (again["snapshot_id"], again["memory_mb"], again["metadata"]) == (None, 512, {"n": 1})


async def test_a_suspended_vm_sleeps_on_while_others_go_on_from_there(api: Any) -> None:
    vm = await make(api, auto_resume=False)
    assert (await api.client.post(f"/v1/vms/{vm['vm_id']}/suspend")).status_code == 200
    asked = api.world.host.count(EnsureMachine)
    told = (await fork(api, vm, count=2)).json()
    assert [one["status"] for one in told["vms"]] == ["active"] * 2, told
    taken = await api.client.post(f"/v1/vms/{vm['vm_id']}/snapshot", json={"name": "kept"})
    assert (taken.status_code, taken.json()["status"], taken.json()["memory"]) == (200, "ready", True), taken.text
    found = await get(api, vm["vm_id"])
    assert (found["vm_id"], found["status"], found["woken_by"]) == (vm["vm_id"], "suspended", None)
    assert api.world.host.count(EnsureMachine) == asked
    # Its disk alone lacks what was in its memory: that wakes it, which is not allowed.
    refused = await api.client.post(f"/v1/vms/{vm['vm_id']}/snapshot", json={"memory": False})
    assert (refused.status_code, refused.json()["code"]) == (409, "instance_suspended")


async def test_a_clone_that_is_asked_for_while_its_original_is_suspended_waits_and_does_not_wake_it(api: Any) -> None:
    vm, host = await make(api), api.world.host
    host.hold_suspend.clear()
    suspending = asyncio.ensure_future(api.client.post(f"/v1/vms/{vm['vm_id']}/suspend"))
    await api.world.until(lambda: host.count(SuspendMachine) == 1)
    cloning = asyncio.ensure_future(fork(api, vm, "clone"))
    await asyncio.sleep(0)
    host.hold_suspend.set()
    assert (await suspending).status_code == (await cloning).status_code == 200
    assert (await get(api, vm["vm_id"]))["status"] == "suspended"


async def test_a_fork_of_several_is_of_one_moment(api: Any) -> None:
    vm = await make(api)
    answer = await fork(api, vm, count=3, snapshot_name="kept")
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert [one["status"] for one in told["vms"]] == ["active"] * 3
    assert len({one["vm_id"] for one in told["vms"]} | {vm["vm_id"]}) == 4
    assert len({one["session_id"] for one in told["vms"]}) == 3
    taken = [one for one in api.world.host.asked if isinstance(one, verbs.TakeCheckpoint)]
    assert [str(one.checkpoint_id) for one in taken] == [told["snapshot_id"]]
    (kept,) = (await api.client.get("/v1/snapshots")).json()
    assert (kept["id"], kept["name"], kept["status"]) == (told["snapshot_id"], "kept", "ready")
    for one in told["vms"]:
        assert (await get(api, one["vm_id"]))["snapshot_id"] == kept["id"]


async def test_what_is_refused_begins_nothing(api: Any) -> None:
    vm, control = await make(api, memory_mb=512), api.world.control
    for count in (0, 101):
        refused = await fork(api, vm, count=count)
        assert (refused.status_code, refused.json()["detail"][0]["loc"]) == (422, ["body", "count"])
    unknown = await api.client.post("/v1/vms/vm_" + "a" * 26 + "/clone", json={})
    assert (unknown.status_code, unknown.json()["code"]) == (404, "vm_not_found")
    await organizations.set_limits(control, api.world.operator, "default", {"max_instances": 3})
    refused = await fork(api, vm, count=3)
    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
    assert not [one for one in api.world.host.asked if isinstance(one, verbs.TakeCheckpoint)]
    assert (await fork(api, vm, count=2)).status_code == 200
    await organizations.set_limits(control, api.world.operator, "default", {"max_instances": None})
    api.world.host.checkpoints.take_error = CheckpointFailedError("a deleted file is open")
    before = len((await api.client.get("/v1/vms/")).json())
    refused = await fork(api, vm, "clone")
    assert (refused.status_code, refused.json()["code"]) == (409, "checkpoint_failed")
    assert len((await api.client.get("/v1/vms/")).json()) == before


async def test_where_none_comes_up_the_reason_is_told_and_nothing_is_left(api: Any) -> None:
    vm = await make(api)
    api.world.host.checkpoints.restore_error = UnavailableError("The host is full")
    refused = await fork(api, vm, count=2)
    assert refused.status_code == 503, refused.text
    assert len((await api.client.get("/v1/vms/")).json()) == 1
    await api.world.until(lambda: api.world.host.checkpoints.kept == {})


async def test_of_some_that_come_up_each_is_told(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vm, host = await make(api), api.world.host
    restore, count = host.checkpoints._ensure, 0

    async def every_other(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count % 2:
            raise UnavailableError("The host is full")
        return await restore(*given)

    monkeypatch.setattr(host.checkpoints, "_ensure", every_other)
    told = (await fork(api, vm, count=4)).json()
    assert sorted(one["status"] for one in told["vms"]) == ["active", "active", "error", "error"]
    for one in told["vms"]:
        assert (one["vm_id"] is None) == (one["session_id"] is None) == (one["error"] is not None)
    assert len((await api.client.get("/v1/vms/")).json()) == 3


async def test_a_repeated_request_makes_no_more(api: Any) -> None:
    vm = await make(api)
    path = f"/v1/vms/{vm['vm_id']}/fork"
    first, second = [
        await api.client.post(path, json={"count": 2}, headers={"Idempotency-Key": "k1"}) for _ in range(2)
    ]
    assert first.status_code == 200 and first.json() == second.json()
    assert len((await api.client.get("/v1/vms/")).json()) == 3


async def test_the_moment_of_a_fork_that_was_killed_goes(api: Any) -> None:
    vm, control, host = await make(api), api.world.control, api.world.host
    entry = entry_of(api, vm["vm_id"])
    begun = await snapshot_taking.begin(control, api.world.me, entry, name="n", memory=True, passing=True)
    ready = await snapshot_taking.capture(control, entry, *begun)
    # As long as its fork goes on it stays.
    control.forking.add(ready.id)
    await forks.settle(control, host.id)
    assert set(host.checkpoints.kept) == {ready.id}
    control.forking.clear()
    await forks.settle(control, host.id)
    assert host.checkpoints.kept == {} and await rows(api) == []
    kept = await snapshots.take(control, api.world.me, vm["vm_id"], name="kept", memory=True, wait=True)
    await forks.settle(control, host.id)
    assert set(host.checkpoints.kept) == {kept.id}
    assert not [one for one in host.asked if isinstance(one, DestroyMachine)]
    assert UUID(str(kept.id))
