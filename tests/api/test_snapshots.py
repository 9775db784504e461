"""Snapshots over HTTP: what is kept, what begins with it, what is refused, and what a crash leaves of it."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest
from tests.scripted_checkpoints import DISK_BYTES, MEMORY_BYTES, OWN_BYTES, in_use

from innkeeper.control import garbage, organizations, reconciler, snapshot_taking, tokens
from innkeeper.core import checkpoint_verbs as verbs
from innkeeper.core.host_verbs import CollectGarbage, DestroyMachine, EnsureMachine
from innkeeper.core.snapshot import Snapshot, SnapshotStatus
from innkeeper.core.token import Principal
from innkeeper.core.vm import parse_vm_id
from innkeeper.errors import (
    CheckpointDamagedError,
    CheckpointFailedError,
    CheckpointNotFoundError,
    MemoryUnusableError,
    UnavailableError,
)
from innkeeper.store import audit_events
from innkeeper.store import snapshots as store

pytestmark = pytest.mark.anyio


async def make(api: Any, **fields: Any) -> dict[str, Any]:
    answer = await api.client.post("/v1/vms", json=fields)
    assert answer.status_code == 200, answer.text
    found = await api.client.get(f"/v1/vms/{answer.json()['vm_id']}")
    made: dict[str, Any] = found.json()
    return made


async def take(api: Any, vm: dict[str, Any], **fields: Any) -> dict[str, Any]:
    answer = await api.client.post(f"/v1/vms/{vm['vm_id']}/snapshot", json=fields)
    assert answer.status_code == 200, answer.text
    taken: dict[str, Any] = answer.json()
    return taken


async def get(api: Any, snapshot: dict[str, Any]) -> dict[str, Any]:
    answer = await api.client.get(f"/v1/snapshots/{snapshot['id']}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def asked(api: Any, verb: type[Any]) -> list[Any]:
    return [request for request in api.world.host.asked if isinstance(request, verb)]


async def stored(api: Any) -> list[Snapshot]:
    found: list[Snapshot] = await api.world.control.database.read(store.on_host, api.world.host.id)
    return found


async def test_a_snapshot_and_what_is_told_of_it(api: Any) -> None:
    vm = await make(api, memory_mb=512, vcpu_count=1)
    taken = await take(api, vm, name="before the upgrade")
    assert (taken["status"], taken["name"], taken["memory"], taken["downtime_ms"]) == (
        "ready", "before the upgrade", True, 12.5,
    )  # fmt: skip
    assert (taken["id"], taken["vm_id"], taken["type"]) == (taken["snapshot_id"], vm["vm_id"], "user")
    found = await get(api, taken)
    assert (found["size_bytes"], found["disk_bytes"], found["memory_bytes"]) == (
        DISK_BYTES + MEMORY_BYTES, DISK_BYTES, MEMORY_BYTES,
    )  # fmt: skip
    assert (found["own_bytes"], found["shared_bytes"]) == (OWN_BYTES, DISK_BYTES + MEMORY_BYTES - OWN_BYTES)
    assert (found["memory_mb"], found["vcpu_count"], found["image"], found["driver"]) == (512, 1, vm["image"], "gvisor")
    assert (found["parent_id"], found["children"], found["volumes"], found["last_error"]) == (None, [], [], None)
    disk = await take(api, vm, memory=False)
    assert (disk["memory"], disk["memory_bytes"], disk["name"]) == (False, None, vm["vm_id"])
    listed = (await api.client.get("/v1/snapshots")).json()
    assert [one["id"] for one in listed] == [disk["id"], taken["id"]]
    assert [one["own_bytes"] for one in listed] == [OWN_BYTES, OWN_BYTES]
    assert (await api.client.get("/v1/snapshots", params={"type": "system"})).json() == []
    assert (await api.client.get("/v1/snapshots", params={"type": "else"})).status_code == 422
    renamed = await api.client.patch(f"/v1/snapshots/{taken['id']}", json={"name": "after"})
    assert (renamed.status_code, renamed.json()["name"], (await get(api, taken))["name"]) == (200, "after", "after")
    for name in ("x" * 201, "a\x1bb"):
        for method, path in (("POST", f"/v1/vms/{vm['vm_id']}/snapshot"), ("PATCH", f"/v1/snapshots/{taken['id']}")):
            refused = await api.client.request(method, path, json={"name": name})
            assert (refused.status_code, refused.json()["detail"][0]["loc"]) == (422, ["body", "name"])
    gone = await api.client.delete(f"/v1/snapshots/{taken['id']}")
    assert (gone.status_code, gone.json()["status"]) == (200, "deleted")
    assert (await api.client.get(f"/v1/snapshots/{taken['id']}")).json()["code"] == "snapshot_not_found"
    assert set(api.world.host.checkpoints.kept) == {UUID(disk["id"])}
    events = await api.world.control.database.read(
        audit_events.page, api.world.me.organization_id, before=None, limit=99
    )
    told = [event.action for event in events if event.object_type == "snapshot" and event.object_id == taken["id"]]
    assert told == ["snapshot.delete", "snapshot.rename", "snapshot.create"]


async def test_a_vm_begins_with_a_snapshot(api: Any) -> None:
    vm = await make(api, memory_mb=512, vcpu_count=1, egress_policy={"allow_http": False})
    snapshot = await take(api, vm)
    before = len(asked(api, EnsureMachine))
    begun = await make(api, snapshot_id=snapshot["id"])
    assert len(asked(api, EnsureMachine)) == before
    (request,) = asked(api, verbs.RestoreCheckpoint)
    assert (str(request.checkpoint_id), request.disk_only) == (snapshot["id"], False)
    shape = request.machine.shape
    assert (shape.memory_mb, shape.vcpu_count, shape.image_digest) == (512, 1, vm["image_digest"])
    assert begun["vm_id"] != vm["vm_id"] and begun["session_id"] != vm["session_id"]
    assert (begun["snapshot_id"], begun["restored"], begun["status"]) == (snapshot["id"], "memory", "active")
    # Whoever begins with it gets no more network than where it was taken, unless it is asked for.
    assert begun["egress_policy"] == vm["egress_policy"] != None  # noqa: E711
    kinds = [event["type"] for event in (await api.client.get(f"/v1/vms/{begun['vm_id']}/events")).json()]
    assert kinds == ["created", "restored", "ready"]
    # Once it is up it stands on its own disk.
    entry = api.world.control.live.by_instance(parse_vm_id(begun["vm_id"])[0])
    api.world.host.machines.clear()
    await reconciler.adopt(api.world.control, api.world.host.id)
    assert (await api.client.get(f"/v1/vms/{begun['vm_id']}")).json()["status"] == "suspended"
    assert (await api.client.post(f"/v1/vms/{begun['vm_id']}/exec", json={"command": "true"})).status_code == 200
    assert entry.origin is None and len(asked(api, verbs.RestoreCheckpoint)) == 1
    child = await take(api, begun)
    assert child["parent_id"] == snapshot["id"] and (await get(api, snapshot))["children"] == [child["id"]]
    # Nothing stands on the first one but what has begun with it long since.
    assert (await api.client.delete(f"/v1/snapshots/{snapshot['id']}")).status_code == 200
    assert (await get(api, child))["parent_id"] == snapshot["id"]
    refused = await api.client.post("/v1/vms", json={"snapshot_id": snapshot["id"]})
    assert (refused.status_code, refused.json()["code"]) == (404, "snapshot_not_found")


async def test_what_a_vm_of_a_snapshot_cannot_be(api: Any) -> None:
    vm = await make(api, memory_mb=512, vcpu_count=1)
    whole, disk = await take(api, vm), await take(api, vm, memory=False)
    for fields, name in (
        ({"memory_mb": 1024}, "memory_mb"), ({"vcpu_count": 2}, "vcpu_count"), ({"image_variant": "base"}, "image_variant"),
        ({"driver": "qemu"}, "driver"), ({"snapshot_id": "nonsense"}, "snapshot_id"),
    ):  # fmt: skip
        answer = await api.client.post("/v1/vms", json={"snapshot_id": whole["id"], **fields})
        assert answer.status_code == 422, answer.text
        assert answer.json()["detail"][0]["loc"][:2] == ["body", name]
    assert len((await api.client.get("/v1/vms/")).json()) == 1
    larger = await make(api, snapshot_id=disk["id"], memory_mb=1024, driver="gvisor")
    assert (larger["memory_mb"], larger["disk_mb"]) == (1024, vm["disk_mb"])
    assert asked(api, verbs.RestoreCheckpoint)[0].machine.shape.memory_mb == 1024
    again = await api.client.post("/v1/vms", json={"session_id": vm["session_id"], "snapshot_id": disk["id"]})
    assert (again.status_code, again.json()["detail"].split(":")[0]) == (409, "snapshot_id")


async def test_memory_that_does_not_fit_any_more_leaves_the_disk(api: Any) -> None:
    snapshot = await take(api, await make(api))
    api.world.host.checkpoints.restore_error = MemoryUnusableError("The memory was saved with another cpu")
    begun = await make(api, snapshot_id=snapshot["id"])
    assert (begun["status"], begun["restored"]) == ("active", "disk")
    events = (await api.client.get(f"/v1/vms/{begun['vm_id']}/events")).json()
    (told,) = [event for event in events if event["type"] == "restored"]
    assert told["reason"] == "The memory was saved with another cpu"
    assert told["details"] == {"snapshot_id": snapshot["id"], "what": "disk"}
    assert [request.disk_only for request in asked(api, verbs.RestoreCheckpoint)] == [False, True]


async def test_a_damaged_snapshot_is_refused_and_nothing_is_left(api: Any) -> None:
    snapshot = await take(api, await make(api))
    api.world.host.checkpoints.restore_error = CheckpointDamagedError()
    refused = await api.client.post("/v1/vms", json={"snapshot_id": snapshot["id"]})
    assert (refused.status_code, refused.json()["code"]) == (409, "snapshot_damaged")
    assert len((await api.client.get("/v1/vms/")).json()) == 1
    assert ((await get(api, snapshot))["status"], (await get(api, snapshot))["damaged"]) == ("failed", True)
    snapshot = await take(api, (await api.client.get("/v1/vms/")).json()[0])
    api.world.host.checkpoints.restore_error = CheckpointNotFoundError()
    refused = await api.client.post("/v1/vms", json={"snapshot_id": snapshot["id"]})
    assert (refused.status_code, refused.json()["code"]) == (404, "checkpoint_not_found")
    assert len((await api.client.get("/v1/vms/")).json()) == 1
    sessions = await api.world.control.database.read(lambda c: c.exec_driver_sql("select count(*) from sessions").one())
    assert sessions == (1,)


async def test_one_that_cannot_be_taken_says_why(api: Any) -> None:
    vm = await make(api)
    api.world.host.checkpoints.take_error = CheckpointFailedError("a deleted file is open: /tmp/x")
    refused = await api.client.post(f"/v1/vms/{vm['vm_id']}/snapshot", json={"name": "n"})
    assert (refused.status_code, refused.json()) == (
        409, {"detail": "a deleted file is open: /tmp/x", "code": "checkpoint_failed"},
    )  # fmt: skip
    (failed,) = (await api.client.get("/v1/snapshots")).json()
    assert (failed["status"], failed["last_error"], failed["own_bytes"]) == (
        "failed", "a deleted file is open: /tmp/x", None,
    )  # fmt: skip
    begun = await api.client.post("/v1/vms", json={"snapshot_id": failed["id"]})
    assert begun.status_code == 409 and "a deleted file is open" in begun.json()["detail"]
    assert (await api.client.get(f"/v1/vms/{vm['vm_id']}")).json()["status"] == "active"
    assert (await api.client.delete(f"/v1/snapshots/{failed['id']}")).status_code == 200
    assert (await api.client.get("/v1/snapshots")).json() == []


async def test_one_that_is_being_taken_is_building(api: Any) -> None:
    vm, host = await make(api), api.world.host
    host.checkpoints.hold.clear()
    answer = await api.client.post(f"/v1/vms/{vm['vm_id']}/snapshot", json={}, params={"wait": "false"})
    begun = answer.json()
    assert (answer.status_code, begun["status"], begun["size_bytes"]) == (200, "building", None)
    for method, path, body in (
        ("DELETE", f"/v1/snapshots/{begun['id']}", {}),
        ("POST", "/v1/vms", {"json": {"snapshot_id": begun["id"]}}),
    ):
        early = await api.client.request(method, path, **body)
        assert (early.status_code, early.json()["code"]) == (409, "conflict"), path
    # The reconciler leaves alone what somebody works on.
    await snapshot_taking.settle(api.world.control, host.id)
    assert (await get(api, begun))["status"] == "building"
    # Whoever asked went away: it goes on.
    asking = asyncio.create_task(api.client.post(f"/v1/vms/{vm['vm_id']}/snapshot", json={"name": "left"}))
    await api.world.until(lambda: len(asked(api, verbs.TakeCheckpoint)) == 2)
    asking.cancel()
    host.checkpoints.hold.set()
    await api.world.until(lambda: len(host.checkpoints.kept) == 2)
    for _ in range(2_000):
        if {one.status for one in await stored(api)} == {SnapshotStatus.READY}:
            break
        await asyncio.sleep(0.01)
    assert {one.status for one in await stored(api)} == {SnapshotStatus.READY}


async def test_a_vm_that_is_still_to_begin_keeps_its_snapshot(api: Any) -> None:
    snapshot, host = await take(api, await make(api)), api.world.host
    host.hold.clear()
    answer = await api.client.post("/v1/vms", json={"snapshot_id": snapshot["id"]}, params={"wait": "false"})
    name = answer.json()["vm_id"]
    refused = await api.client.delete(f"/v1/snapshots/{snapshot['id']}")
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict") and name in refused.json()["detail"]
    host.hold.set()
    await api.world.until(lambda: api.world.control.live.by_instance(parse_vm_id(name)[0]).ready)
    host.checkpoints.drop_error = in_use()
    assert (await api.client.delete(f"/v1/snapshots/{snapshot['id']}")).status_code == 409
    assert (await get(api, snapshot))["status"] == "ready"
    host.checkpoints.drop_error = UnavailableError("The host is not reachable")
    assert (await api.client.delete(f"/v1/snapshots/{snapshot['id']}")).status_code == 503
    refused = await api.client.post("/v1/vms", json={"snapshot_id": snapshot["id"]})
    assert refused.status_code == 409
    host.checkpoints.drop_error = None
    await snapshot_taking.settle(api.world.control, host.id)
    # The reconciler, which was told of it, may be the one that does it.
    await api.world.until(lambda: host.checkpoints.kept == {})
    async with asyncio.timeout(20):
        while await stored(api):
            await asyncio.sleep(0.01)


async def test_what_a_crash_leaves_is_settled(api: Any) -> None:
    world = api.world
    control, host = world.control, world.host
    entry = control.live.by_instance(parse_vm_id((await make(api))["vm_id"])[0])
    made = []
    for name in ("taken", "not taken"):
        snapshot, lease = await snapshot_taking.begin(control, world.me, entry, name=name, memory=True)
        made.append(snapshot)
        if name == "taken":
            await control.bus.request(
                host.id, verbs.TakeCheckpoint.verb, {"instance_id": str(entry.instance.id), "checkpoint_id": str(snapshot.id)},
                timeout_seconds=20,
            )  # fmt: skip
        # As at the start of the process that comes after a killed one.
        await control.database.write(snapshot_taking.leases.apply, store.table, snapshot.id, lease, {}, release=True)
    ready = await take(api, {"vm_id": entry.vm.vm_id}, name="ready")
    lost = await take(api, {"vm_id": entry.vm.vm_id}, name="lost")
    del host.checkpoints.kept[UUID(lost["id"])]
    await snapshot_taking.settle(control, host.id)
    told = {one["name"]: (one["status"], one["last_error"]) for one in (await api.client.get("/v1/snapshots")).json()}
    assert told == {
        "taken": ("ready", None),
        "not taken": ("failed", snapshot_taking.INTERRUPTED),
        "ready": ("ready", None),
        "lost": ("failed", snapshot_taking.LOST),
    }
    # What no row names, or a failed one, is nobody's; the rest is kept.
    await garbage.collect(control, world.operator, host.id, remove=False)
    assert set(asked(api, CollectGarbage)[-1].keep_checkpoints) == {made[0].id, UUID(ready["id"])}


async def test_a_last_snapshot(api: Any) -> None:
    host = api.world.host
    vm = await make(api, snapshot_on_terminate=True, snapshot_name="at the end")
    assert (vm["snapshot_on_terminate"], vm["snapshot_name"]) == (True, "at the end")
    ended = await api.client.delete(f"/v1/vms/{vm['vm_id']}")
    assert (ended.status_code, ended.json()["status"]) == (200, "killed")
    (kept,) = (await api.client.get("/v1/snapshots")).json()
    assert (kept["name"], kept["status"], kept["memory"], kept["vm_id"]) == ("at the end", "ready", True, vm["vm_id"])
    order = [type(request) for request in host.asked if isinstance(request, (verbs.TakeCheckpoint, DestroyMachine))]
    assert order == [verbs.TakeCheckpoint, DestroyMachine]
    # What cannot be kept with its memory is kept without; what cannot be kept at all stays.
    vm = await make(api)
    changed = await api.client.patch(f"/v1/vms/{vm['vm_id']}", json={"snapshot_on_terminate": True})
    assert (changed.json()["snapshot_on_terminate"], changed.json()["snapshot_name"]) == (True, None)
    host.checkpoints.take_error = UnavailableError("The host's disk is full")
    refused = await api.client.delete(f"/v1/vms/{vm['vm_id']}")
    assert (refused.status_code, refused.json()["detail"]) == (503, "The host's disk is full")
    assert (await api.client.get(f"/v1/vms/{vm['vm_id']}")).json()["status"] == "active"
    host.checkpoints.take_error = CheckpointFailedError("a deleted file is open")
    assert (await api.client.delete(f"/v1/vms/{vm['vm_id']}")).status_code == 200
    newest = (await api.client.get("/v1/snapshots")).json()[0]
    assert (newest["name"], newest["status"], newest["memory"]) == (vm["vm_id"], "ready", False)
    # The next VM of a session that began with a snapshot begins with it too.
    host.checkpoints.take_error = None
    first = await make(api, snapshot_id=newest["id"])
    await api.client.delete(f"/v1/vms/{first['vm_id']}")
    second = await make(api, session_id=first["session_id"])
    assert (second["snapshot_id"], second["vm_id"] != first["vm_id"]) == (newest["id"], True)


async def test_the_limit(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = await make(api)
    control = api.world.control
    monkeypatch.setattr(control, "settings", control.settings.model_copy(update={"max_snapshots": 1}))
    await take(api, vm)
    refused = await api.client.post(f"/v1/vms/{vm['vm_id']}/snapshot", json={})
    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
    assert len(api.world.host.checkpoints.kept) == 1


async def test_of_another_organization_there_is_nothing(api: Any) -> None:
    vm = await make(api)
    snapshot = await take(api, vm)
    world = api.world
    other = await organizations.create(world.control, world.operator, "other")
    token = await tokens.create(world.control, Principal(other.id, None, tokens.DEFAULT_SCOPES, "x"), "theirs")
    headers = {"Authorization": f"Bearer {token.text}"}
    async with api.anonymous() as client:
        for method, path, body in (
            ("POST", "/v1/vms", {"snapshot_id": snapshot["id"]}),
            ("GET", f"/v1/snapshots/{snapshot['id']}", None),
            ("DELETE", f"/v1/snapshots/{snapshot['id']}", None),
        ):
            answer = await client.request(method, path, json=body, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (404, "snapshot_not_found"), path
        assert (await client.get("/v1/snapshots", headers=headers)).json() == []
    assert (await get(api, snapshot))["status"] == "ready"
