"""Volumes over HTTP: what is made, who has it, what is refused, and what a crash leaves of it."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests.scripted_volumes import USED_BYTES

from innkeeper.control import garbage, mount_work, organizations, reconciler, tokens, volume_work
from innkeeper.core import volume_verbs as verbs
from innkeeper.core.checkpoint_verbs import TakeCheckpoint
from innkeeper.core.host_verbs import CollectGarbage
from innkeeper.core.token import Principal
from innkeeper.core.vm import parse_vm_id
from innkeeper.core.volume import Volume
from innkeeper.errors import GuestWrittenError, UnavailableError, VolumeInUseError
from innkeeper.store import audit_events, leases
from innkeeper.store import volumes as store
from innkeeper.store.tables import volumes as table

pytestmark = pytest.mark.anyio

MIB = 1 << 20


async def make(api: Any, name: str = "data", **fields: Any) -> dict[str, Any]:
    answer = await api.client.post("/v1/volumes", json={"name": name, "quota_bytes": 100 * MIB, **fields})
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def make_vm(api: Any, **fields: Any) -> dict[str, Any]:
    answer = await api.client.post("/v1/vms", json=fields)
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def attach(api: Any, vm: dict[str, Any], volume: dict[str, Any], path: str = "/data", **fields: Any) -> Any:
    body = {"volume_id": volume["id"], "mount_path": path, **fields}
    return await api.client.post(f"/v1/vms/{vm['vm_id']}/volumes", json=body)


async def get(api: Any, volume: dict[str, Any]) -> dict[str, Any]:
    answer = await api.client.get(f"/v1/volumes/{volume['id']}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def keep(api: Any, volume: dict[str, Any], **fields: Any) -> dict[str, Any]:
    answer = await api.client.post(f"/v1/volumes/{volume['id']}/checkpoints", json=fields)
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


def instance_of(vm: dict[str, Any]) -> UUID:
    found = parse_vm_id(vm["vm_id"])
    assert found is not None
    return found[0]


def attached(api: Any) -> dict[tuple[UUID, UUID], tuple[str, bool]]:
    found: dict[tuple[UUID, UUID], tuple[str, bool]] = api.world.host.volumes.attached
    return found


async def test_a_volume_and_what_is_told_of_it(api: Any) -> None:
    made = await make(api, "models", quota_bytes=100 * MIB + 1)
    assert (made["name"], made["quota_bytes"], made["used_bytes"], made["status"]) == (
        "models", 101 * MIB, USED_BYTES, "ready",
    )  # fmt: skip
    assert (made["id"], made["mounts"], made["guest_written"], made["error"]) == (made["volume_id"], [], False, None)
    assert (await api.client.get("/v1/volumes", params={"refresh_usage": "true"})).json() == [made]
    changed = await api.client.patch(f"/v1/volumes/{made['id']}", json={"name": "larger", "quota_bytes": 200 * MIB})
    assert (changed.status_code, changed.json()["name"], changed.json()["quota_bytes"]) == (200, "larger", 200 * MIB)
    assert api.world.host.volumes.kept[UUID(made["id"])]["size_mb"] == 200
    gone = await api.client.delete(f"/v1/volumes/{made['id']}")
    assert (gone.status_code, gone.json()["status"]) == (200, "deleted")
    assert (await api.client.get(f"/v1/volumes/{made['id']}")).json()["code"] == "volume_not_found"
    assert api.world.host.volumes.kept == {}
    events = await api.world.control.database.read(
        audit_events.page, api.world.me.organization_id, before=None, limit=99
    )
    told = [event.action for event in events if event.object_id == made["id"]]
    assert told == ["volume.delete", "volume.rename", "volume.grow", "volume.create"]


async def test_what_a_volume_cannot_be(api: Any) -> None:
    made = await make(api)
    limit = api.world.control.settings.max_volume_mb * MIB
    for fields, name in (
        ({"quota_bytes": 64 * MIB - MIB}, "quota_bytes"), ({"quota_bytes": limit + 1}, "quota_bytes"), ({"quota_bytes": -1}, "quota_bytes"),
        ({"name": "x" * 201}, "name"), ({"name": "a\x1bb"}, "name"), ({"name": ""}, "name"),
    ):  # fmt: skip
        body = {"name": "n", "quota_bytes": 100 * MIB, **fields}
        for method, path in (("POST", "/v1/volumes"), ("PATCH", f"/v1/volumes/{made['id']}")):
            refused = await api.client.request(method, path, json=body)
            assert (refused.status_code, refused.json()["detail"][0]["loc"]) == (422, ["body", name]), (method, fields)
    smaller = await api.client.patch(f"/v1/volumes/{made['id']}", json={"quota_bytes": 99 * MIB})
    assert (smaller.status_code, smaller.json()["detail"][0]["loc"]) == (422, ["body", "quota_bytes"])
    assert await get(api, made) == made
    assert len(api.world.host.volumes.kept) == 1


async def test_what_the_host_cannot_make_leaves_nothing(api: Any) -> None:
    api.world.host.volumes.create_error = UnavailableError("The host's disk is full")
    refused = await api.client.post("/v1/volumes", json={"name": "n", "quota_bytes": 100 * MIB})
    assert (refused.status_code, refused.json()["detail"]) == (503, "The host's disk is full")
    assert (await api.client.get("/v1/volumes")).json() == []
    assert await api.world.control.database.read(store.on_host, api.world.host.id) == []


async def test_what_has_a_row_is_no_garbage_and_goes_only_when_that_is_said(api: Any) -> None:
    made = await make(api)
    kept = await keep(api, made)
    world = api.world
    for more, said in (({}, False), ({"remove_volumes": True}, True)):
        await garbage.collect(world.control, world.operator, world.host.id, remove=True, **more)
        asked = [request for request in world.host.asked if isinstance(request, CollectGarbage)][-1]
        assert set(asked.keep_volumes) == {UUID(made["id"]), UUID(kept["id"])}
        assert (asked.remove, asked.remove_volumes) == (True, said)


async def test_the_limit(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    control = api.world.control
    monkeypatch.setattr(control, "settings", control.settings.model_copy(update={"max_volumes": 2}))
    made = await make(api)
    await keep(api, made)
    for path, body in (
        ("/v1/volumes", {"name": "n", "quota_bytes": 100 * MIB}),
        (f"/v1/volumes/{made['id']}/checkpoints", {}),
    ):
        refused = await api.client.post(path, json=body)
        assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
    assert len(api.world.host.volumes.kept) == 2


async def test_a_repeated_request_makes_one(api: Any) -> None:
    headers = {"Idempotency-Key": "k1"}
    body = {"name": "n", "quota_bytes": 100 * MIB}
    first, second = [await api.client.post("/v1/volumes", json=body, headers=headers) for _ in range(2)]
    assert first.json() == second.json() and len(api.world.host.volumes.kept) == 1


async def test_one_writer_and_several_readers(api: Any) -> None:
    volume, first, second = await make(api), await make_vm(api), await make_vm(api)
    done = await attach(api, first, volume)
    assert (done.status_code, done.json()) == (
        200, {"volume_id": volume["id"], "mount_path": "/data", "mode": "rw", "checkpoint_id": None, "status": "attached"},
    )  # fmt: skip
    assert (await attach(api, first, volume)).json() == done.json()
    assert attached(api) == {(instance_of(first), UUID(volume["id"])): ("/data", False)}
    assert (await get(api, volume))["mounts"] == [
        {"vm_id": first["vm_id"], "mount_path": "/data", "mode": "rw", "checkpoint_id": None}
    ]
    for mode in ("rw", "ro"):
        refused = await attach(api, second, volume, mode=mode)
        assert (refused.status_code, refused.json()["code"]) == (409, "volume_in_use")
        assert first["vm_id"] in refused.json()["detail"]
    elsewhere = await attach(api, first, volume, "/other")
    assert (elsewhere.status_code, "/data" in elsewhere.json()["detail"]) == (409, True)
    for method, path, body in (
        ("DELETE", "", None), ("PATCH", "", {"quota_bytes": 200 * MIB}),
    ):  # fmt: skip
        refused = await api.client.request(method, f"/v1/volumes/{volume['id']}{path}", json=body)
        assert (refused.status_code, refused.json()["code"]) == (409, "volume_in_use"), method
        assert first["vm_id"] in refused.json()["detail"]
    kept = await keep(api, volume, name="one")
    for vm in (first, second):
        seen = await attach(api, vm, volume, "/seen", mode="ro", checkpoint_id="latest")
        assert (seen.status_code, seen.json()["checkpoint_id"]) == (200, kept["id"]), seen.text
    refused = await api.client.delete(f"/v1/volumes/{volume['id']}/checkpoints/{kept['id']}")
    assert refused.status_code == 409
    assert first["vm_id"] in refused.json()["detail"] and second["vm_id"] in refused.json()["detail"]
    path = f"/v1/vms/{first['vm_id']}/volumes"
    assert [one["mount_path"] for one in (await api.client.get(path)).json()] == ["/data", "/seen"]
    several = await api.client.delete(f"{path}/{volume['id']}")
    assert several.status_code == 409 and "mount_path" in several.json()["detail"]
    gone = await api.client.delete(f"{path}/{volume['id']}", params={"mount_path": "/data", "wait": "true"})
    assert (gone.status_code, gone.json()["status"]) == (200, "detached")
    none = await api.client.delete(f"{path}/{volume['id']}", params={"mount_path": "/data"})
    assert (none.status_code, none.json()["code"]) == (404, "volume_not_found")
    assert (await attach(api, second, volume)).status_code == 200
    # What a VM had is free when it is no more.
    for vm in (first, second):
        assert (await api.client.delete(f"/v1/vms/{vm['vm_id']}")).status_code == 200
    assert (await get(api, volume))["mounts"] == []
    standing = await api.client.delete(f"/v1/volumes/{volume['id']}")
    assert (standing.status_code, kept["id"] in standing.json()["detail"]) == (409, True)
    assert (await api.client.delete(f"/v1/volumes/{volume['id']}/checkpoints/{kept['id']}")).status_code == 200
    assert (await api.client.delete(f"/v1/volumes/{volume['id']}")).status_code == 200


async def test_of_two_at_once_one_gets_it(api: Any) -> None:
    volume, first, second = await make(api), await make_vm(api), await make_vm(api)
    answers = await asyncio.gather(attach(api, first, volume), attach(api, second, volume))
    assert sorted(answer.status_code for answer in answers) == [200, 409]
    assert len(attached(api)) == 1


async def test_checkpoints(api: Any) -> None:
    volume = await make(api)
    none = await api.client.post(
        "/v1/vms", json={"volumes": [{"volume_id": volume["id"], "mount_path": "/d", "mode": "ro", "checkpoint_id": "latest"}]}
    )  # fmt: skip
    assert (none.status_code, none.json()["code"]) == (404, "checkpoint_not_found")
    first, second = await keep(api, volume, name="one"), await keep(api, volume)
    assert (first["name"], first["volume_id"], first["checkpoint_id"]) == ("one", volume["id"], first["id"])
    assert second["name"] and second["status"] == "ready"
    path = f"/v1/volumes/{volume['id']}/checkpoints"
    assert [one["id"] for one in (await api.client.get(path)).json()] == [second["id"], first["id"]]
    copies = [one for one in api.world.host.asked if isinstance(one, verbs.CreateVolume)]
    assert [(str(one.copy_of), one.immutable) for one in copies[1:]] == [(volume["id"], True)] * 2
    # A checkpoint is no volume.
    for method, where in (("GET", ""), ("DELETE", ""), ("POST", "/checkpoints")):
        body = {} if method == "POST" else None
        answer = await api.client.request(method, f"/v1/volumes/{first['id']}{where}", json=body)
        assert (answer.status_code, answer.json()["code"]) == (404, "volume_not_found")
    for unknown in (str(uuid4()), "nonsense", volume["id"]):
        answer = await api.client.delete(f"{path}/{unknown}")
        assert (answer.status_code, answer.json()["code"]) == (404, "checkpoint_not_found")
    vm = await make_vm(api)
    refused = await attach(api, vm, volume, checkpoint_id=first["id"])
    assert (refused.status_code, refused.json()["detail"][0]["loc"]) == (422, ["body", "checkpoint_id"])


async def test_a_vm_is_made_with_volumes_and_has_them_whenever_it_runs(api: Any) -> None:
    volume, other = await make(api), await make(api)
    wanted = [
        {"volume_id": volume["id"], "mount_path": "/data"},
        {"volume_id": other["id"], "mount_path": "/more", "mode": "ro"},
    ]
    vm = await make_vm(api, volumes=wanted)
    mine = {
        (instance_of(vm), UUID(volume["id"])): ("/data", False),
        (instance_of(vm), UUID(other["id"])): ("/more", True),
    }
    assert attached(api) == mine
    # Its machine goes, and another comes.
    api.world.host.machines.clear()
    await reconciler.adopt(api.world.control, api.world.host.id)
    refused = await attach(api, await make_vm(api), volume)
    assert (refused.status_code, refused.json()["code"]) == (409, "volume_in_use")
    attached(api).clear()
    assert (await api.client.post(f"/v1/vms/{vm['vm_id']}/exec", json={"command": "true"})).status_code == 200
    assert attached(api) == mine
    # The next VM of the session gets them, too.
    await api.client.delete(f"/v1/vms/{vm['vm_id']}")
    attached(api).clear()
    second = await make_vm(api, session_id=vm["session_id"])
    assert {key[0] for key in attached(api)} == {instance_of(second)} and len(attached(api)) == 2


async def test_what_a_vm_with_volumes_cannot_be(api: Any) -> None:
    volume, other = await make(api), await make(api)
    one = {"volume_id": volume["id"], "mount_path": "/data"}
    for wanted, loc in (
        ([{**one, "mount_path": "data"}], ["body", "volumes", "0", "mount_path"]),
        ([{**one, "mount_path": "/proc/x"}], ["body", "volumes", "0", "mount_path"]),
        ([{**one, "mode": "rx"}], ["body", "volumes", 0, "mode"]),
        ([{**one, "checkpoint_id": "latest"}], ["body", "volumes", "0", "checkpoint_id"]),
        ([one, one], ["body", "volumes"]),
        ([one, {"volume_id": other["id"], "mount_path": "/data/below"}], ["body", "volumes"]),
        ([one] * 17, ["body", "volumes"]),
    ):  # fmt: skip
        refused = await api.client.post("/v1/vms", json={"volumes": wanted})
        assert (refused.status_code, refused.json()["detail"][0]["loc"]) == (422, loc)
    unknown = await api.client.post("/v1/vms", json={"volumes": [{**one, "volume_id": str(uuid4())}]})
    assert (unknown.status_code, unknown.json()["code"]) == (404, "volume_not_found")
    api.world.host.volumes.attach_error = GuestWrittenError()
    refused = await api.client.post("/v1/vms", json={"volumes": [one]})
    assert (refused.status_code, refused.json()["code"]) == (409, "guest_written")
    assert (await api.client.get("/v1/vms/")).json() == [] and (await get(api, volume))["mounts"] == []
    api.world.host.volumes.attach_error = None
    vm = await make_vm(api, volumes=[one])
    taken = await api.client.post("/v1/vms", json={"volumes": [one]})
    assert (taken.status_code, taken.json()["code"]) == (409, "volume_in_use")
    assert vm["vm_id"] in taken.json()["detail"]
    assert len((await api.client.get("/v1/vms/")).json()) == 1
    below = await attach(api, vm, other, "/data/below")
    assert (below.status_code, below.json()["code"]) == (409, "conflict")


async def test_what_the_host_does_not_do_leaves_the_vm_as_it_was(api: Any) -> None:
    volume, vm, host = await make(api), await make_vm(api), api.world.host
    host.volumes.attach_error = UnavailableError("no")
    assert (await attach(api, vm, volume)).status_code == 503
    assert (await api.client.get(f"/v1/vms/{vm['vm_id']}/volumes")).json() == []
    host.volumes.attach_error = None
    await attach(api, vm, volume)
    host.volumes.detach_error = VolumeInUseError("bash has it open")
    path = f"/v1/vms/{vm['vm_id']}/volumes"
    refused = await api.client.delete(f"{path}/{volume['id']}")
    assert (refused.status_code, refused.json()) == (409, {"detail": "bash has it open", "code": "volume_in_use"})
    assert [one["status"] for one in (await api.client.get(path)).json()] == ["attached"]
    # Whether it went is not known: it is the reconciler's.
    host.volumes.detach_error = UnavailableError("gone")
    assert (await api.client.delete(f"{path}/{volume['id']}")).status_code == 503
    assert [one["status"] for one in (await api.client.get(path)).json()] == ["detaching"]
    host.volumes.detach_error = None
    await mount_work.settle(api.world.control, host.id)
    assert (await api.client.get(path)).json() == [] and attached(api) == {}


async def test_what_a_crash_leaves_is_settled(api: Any) -> None:
    control, host = api.world.control, api.world.host
    (ready, lost), made = [await make(api, name) for name in ("ready", "lost")], []
    for name in ("made", "not made", "deleted"):
        volume = Volume(
            uuid4(), api.world.me.organization_id, host.id, name, 100, volume_work.VolumeStatus.CREATING, volume_work.clock.now()
        )  # fmt: skip
        lease = uuid4()

        def insert(connection: Any, volume: Volume = volume, lease: UUID = lease) -> None:
            store.insert(connection, volume, lock_token=lease, now=volume.created_at, ttl_seconds=60)

        await control.database.write(insert)
        if name != "not made":
            await volume_work.ask(control, host.id, verbs.CreateVolume(volume.id, 100), seconds=20)
        values = {"status": "deleting"} if name == "deleted" else {}
        # As at the start of the process that comes after a killed one.
        await control.database.write(leases.apply, table, volume.id, lease, values, release=True)
        made.append(volume)
    del host.volumes.kept[UUID(lost["id"])]
    # Somebody's, of whom this database does not know.
    foreign = uuid4()
    await volume_work.ask(control, host.id, verbs.CreateVolume(foreign, 100), seconds=20)
    await volume_work.settle(control, host.id)
    assert set(host.volumes.kept) == {UUID(ready["id"]), foreign}
    told = {one["name"]: (one["status"], one["error"]) for one in (await api.client.get("/v1/volumes")).json()}
    assert told == {"ready": ("ready", None), "lost": ("failed", volume_work.LOST)}
    assert (await attach(api, await make_vm(api), lost)).status_code == 409
    assert (await api.client.delete(f"/v1/volumes/{lost['id']}")).status_code == 200


async def test_what_a_running_vm_should_have_and_has_not_is_attached_again(api: Any) -> None:
    volume, vm = await make(api), await make_vm(api)
    await attach(api, vm, volume)
    attached(api).clear()
    await mount_work.settle(api.world.control, api.world.host.id)
    assert list(attached(api)) == [(instance_of(vm), UUID(volume["id"]))]


async def test_a_snapshot_with_memory_is_taken_without_volumes_and_lists_them(api: Any) -> None:
    volume, vm, host = await make(api), await make_vm(api), api.world.host
    await attach(api, vm, volume)
    had: list[int] = []
    take = host.checkpoints._take
    host.checkpoints._machines = _Noting(host.machines, lambda: had.append(len(attached(api))))
    snapshot = (await api.client.post(f"/v1/vms/{vm['vm_id']}/snapshot", json={})).json()
    assert take and (snapshot["status"], snapshot["volumes"], had) == ("ready", [volume["id"]], [0])
    assert list(attached(api)) == [(instance_of(vm), UUID(volume["id"]))]
    host.volumes.detach_error = VolumeInUseError("bash has it open")
    refused = await api.client.post(f"/v1/vms/{vm['vm_id']}/snapshot", json={})
    assert (refused.status_code, refused.json()["code"]) == (409, "checkpoint_failed")
    assert "/data" in refused.json()["detail"] and "bash" in refused.json()["detail"]
    assert sum(isinstance(one, TakeCheckpoint) for one in host.asked) == 1
    # The disk alone needs nothing of the kind.
    disk = await api.client.post(f"/v1/vms/{vm['vm_id']}/snapshot", json={"memory": False})
    assert (disk.status_code, disk.json()["volumes"]) == (200, [volume["id"]])


async def test_a_vm_that_is_suspended_keeps_its_volumes_from_others(api: Any) -> None:
    volume, vm, host = await make(api), await make_vm(api), api.world.host
    await attach(api, vm, volume)
    host.volumes.detach_error = VolumeInUseError("bash has it open")
    refused = await api.client.post(f"/v1/vms/{vm['vm_id']}/suspend")
    assert (refused.status_code, refused.json()["code"]) == (409, "checkpoint_failed")
    assert (await api.client.get(f"/v1/vms/{vm['vm_id']}")).json()["status"] == "active" and len(attached(api)) == 1
    host.volumes.detach_error = None
    asleep = await api.client.post(f"/v1/vms/{vm['vm_id']}/suspend")
    assert (asleep.status_code, attached(api)) == (200, {})
    await mount_work.settle(api.world.control, host.id)
    assert attached(api) == {}
    taken = await attach(api, await make_vm(api), volume)
    assert (taken.status_code, taken.json()["code"]) == (409, "volume_in_use")
    woken = await api.client.post(f"/v1/vms/{vm['vm_id']}/resume")
    assert woken.status_code == 200
    assert attached(api) == {(instance_of(vm), UUID(volume["id"])): ("/data", False)}


class _Noting(dict[UUID, Any]):
    """The machines of a host, which calls back when somebody looks whether one is there."""

    def __init__(self, machines: dict[UUID, Any], look: Any) -> None:
        super().__init__(machines)
        self._look = look

    def __contains__(self, key: object) -> bool:
        self._look()
        return super().__contains__(key)


async def test_of_another_organization_there_is_nothing(api: Any) -> None:
    volume, world = await make(api), api.world
    kept = await keep(api, volume)
    other = await organizations.create(world.control, world.operator, "other")
    token = await tokens.create(world.control, Principal(other.id, None, tokens.DEFAULT_SCOPES, "x"), "theirs")
    headers = {"Authorization": f"Bearer {token.text}"}
    async with api.anonymous() as client:
        wanted = {"volume_id": volume["id"], "mount_path": "/data"}
        theirs = (await client.post("/v1/vms", json={}, headers=headers)).json()
        for method, path, body in (
            ("GET", f"/v1/volumes/{volume['id']}", None),
            ("PATCH", f"/v1/volumes/{volume['id']}", {"name": "mine"}),
            ("DELETE", f"/v1/volumes/{volume['id']}", None),
            ("GET", f"/v1/volumes/{volume['id']}/checkpoints", None),
            ("POST", f"/v1/volumes/{volume['id']}/checkpoints", {}),
            ("DELETE", f"/v1/volumes/{volume['id']}/checkpoints/{kept['id']}", None),
            ("POST", "/v1/vms", {"volumes": [wanted]}),
            ("POST", f"/v1/vms/{theirs['vm_id']}/volumes", wanted),
        ):
            answer = await client.request(method, path, json=body, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (404, "volume_not_found"), path
        assert (await client.get("/v1/volumes", headers=headers)).json() == []
    assert dataclasses.asdict(await world.control.database.read(store.get, UUID(volume["id"])))["name"] == "data"
