"""Files of volumes over HTTP: which guest is asked, when one is started for it, and when that goes again."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests.scripted_host import GVISOR, TCG

from innkeeper.control import reconciler, volume_guests
from innkeeper.core import volume_verbs
from innkeeper.core.host_verbs import DestroyMachine, EnsureMachine, Execute
from innkeeper.core.isolation import Offer
from innkeeper.core.vm import parse_vm_id
from innkeeper.errors import UnavailableError
from innkeeper.store import instances

pytestmark = pytest.mark.anyio

MIB = 1 << 20


async def make(api: Any) -> str:
    answer = await api.client.post("/v1/volumes", json={"name": "data", "quota_bytes": 100 * MIB})
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["id"]
    return found


async def put(api: Any, volume: str, path: str, content: bytes = b"x", **params: str) -> Any:
    return await api.client.put(f"/v1/volumes/{volume}/files/content", params={"path": path, **params}, content=content)


async def get(api: Any, volume: str, path: str) -> Any:
    return await api.client.get(f"/v1/volumes/{volume}/files/content", params={"path": path})


async def make_vm(api: Any, volume: str, **mount: str) -> tuple[str, UUID]:
    mounts = [{"volume_id": volume, "mount_path": "/data", **mount}]
    answer = await api.client.post("/v1/vms", json={"volumes": mounts})
    assert answer.status_code == 200, answer.text
    vm_id: str = answer.json()["vm_id"]
    parsed = parse_vm_id(vm_id)
    assert parsed is not None
    return vm_id, parsed[0]


def asked(api: Any, *kinds: type[Any]) -> list[Any]:
    return [request for request in api.world.host.asked if isinstance(request, kinds)]


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.01)


async def test_a_guest_is_started_once_and_has_everything_on_the_volume(api: Any) -> None:
    volume = await make(api)
    first = await put(api, volume, "/a//./b", b"content")
    assert (first.status_code, first.json()) == (
        200, {"status": "success", "path": "a/b", "size": 7, "created": True},
    )  # fmt: skip
    assert (await get(api, volume, "a/b")).content == b"content"
    (made,), (attach,) = asked(api, EnsureMachine), asked(api, volume_verbs.AttachVolume)
    assert (made.bare, made.user, made.shape.egress_mode, made.shape.driver) == (True, "root", "none", "gvisor")
    assert (attach.instance_id, attach.path, attach.read_only) == (made.instance_id, "/volume", False)
    # Once for what was written, not for what was read.
    (sync,) = asked(api, Execute)
    assert (sync.argv, sync.instance_id) == (volume_guests.SYNC_ARGV, made.instance_id)
    row = await api.world.control.database.read(instances.get, made.instance_id)
    assert row is not None and row.labels == {volume_guests.LABEL: volume}
    assert (await api.client.get("/v1/vms/")).json() == []
    answer = await api.client.post(f"/v1/volumes/{volume}/files/download", json={"path": "a/b"})
    assert answer.json() == {
        "status": "success", "path": "a/b", "filename": "b", "size": 7, "content": base64.b64encode(b"content").decode(),
    }  # fmt: skip
    listed = await api.client.get(f"/v1/volumes/{volume}/files")
    assert {one["path"] for one in listed.json()} == {"a/b"}
    gone = await api.client.delete(f"/v1/volumes/{volume}/files", params={"path": "a/b"})
    assert gone.json() == {"status": "deleted", "path": "a/b"}
    assert (await get(api, volume, "a/b")).json()["code"] == "file_not_found"


async def test_uploads(api: Any) -> None:
    volume = await make(api)

    async def upload(path: str, **fields: str) -> Any:
        data = {"path": path, **fields}
        return await api.client.post(
            f"/v1/volumes/{volume}/files/upload", data=data, files={"file": ("dir/report.txt", b"text")}
        )

    assert (await upload("in/")).json()["path"] == "in/report.txt"
    taken = await upload("in/")
    assert (taken.status_code, taken.json()["code"]) == (409, "conflict")
    assert (await upload("in/report.txt", overwrite="true")).json()["created"] is False
    assert (await upload("in/x", overwrite="perhaps")).status_code == 422
    assert (await upload("../x")).json()["detail"][0]["loc"] == ["body", "path"]
    refused = await put(api, volume, "in/report.txt", overwrite="false")
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")


async def test_what_could_not_be_put_on_the_volume_is_said(api: Any) -> None:
    volume = await make(api)
    api.world.host.result = {"exit_code": 1}
    failed = await put(api, volume, "a")
    assert (failed.status_code, failed.json()["code"]) == (409, "volume_failed")


async def test_the_guest_goes_when_nobody_asks_any_more(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_guests, "KEEP_SECONDS", 0.05)
    volume = await make(api)
    await put(api, volume, "a")
    (made,) = asked(api, EnsureMachine)
    await until(lambda: made.instance_id not in api.world.host.machines)
    ends = asked(api, volume_verbs.DetachVolume, DestroyMachine)
    assert [type(one) for one in ends] == [volume_verbs.DetachVolume, DestroyMachine]
    assert await gone(api, made.instance_id)


async def gone(api: Any, instance_id: UUID) -> bool:
    """Whether the row goes."""
    async with asyncio.timeout(30):
        while await api.world.control.database.read(instances.get, instance_id) is not None:
            await asyncio.sleep(0.01)
    return True


@pytest.mark.parametrize("what", ["attach", "grow", "delete"])
async def test_the_guest_goes_at_once_for_whoever_needs_the_volume(api: Any, what: str) -> None:
    volume = await make(api)
    await put(api, volume, "a")
    (made,) = asked(api, EnsureMachine)
    if what == "attach":
        await make_vm(api, volume)
        wanted: type[Any] = volume_verbs.AttachVolume
    elif what == "grow":
        answer = await api.client.patch(f"/v1/volumes/{volume}", json={"quota_bytes": 200 * MIB})
        assert answer.status_code == 200, answer.text
        wanted = volume_verbs.GrowVolume
    else:
        answer = await api.client.delete(f"/v1/volumes/{volume}")
        assert answer.status_code == 200, answer.text
        wanted = volume_verbs.RemoveVolume
    order = [type(one) for one in asked(api, volume_verbs.DetachVolume, wanted)]
    assert order[-2:] == [volume_verbs.DetachVolume, wanted]
    assert made.instance_id not in api.world.host.machines
    assert await gone(api, made.instance_id)


async def test_a_transfer_is_waited_for(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_guests, "LET_GO_SECONDS", 0.2)
    volume = await make(api)
    go_on = asyncio.Event()

    async def slowly() -> Any:
        yield b"one"
        await go_on.wait()
        yield b"two"

    writing = asyncio.create_task(put(api, volume, "a", slowly()))
    await until(lambda: asked(api, volume_verbs.AttachVolume))
    for refused in (
        await api.client.patch(f"/v1/volumes/{volume}", json={"quota_bytes": 200 * MIB}),
        await api.client.delete(f"/v1/volumes/{volume}"),
        await api.client.post("/v1/vms", json={"volumes": [{"volume_id": volume, "mount_path": "/data"}]}),
    ):
        assert (refused.status_code, refused.json()["code"]) == (409, "volume_in_use"), refused.text
    go_on.set()
    assert (await writing).json()["size"] == 6
    assert (await get(api, volume, "a")).content == b"onetwo"
    assert len([one for one in asked(api, EnsureMachine) if one.bare]) == 1


async def test_through_the_vm_that_has_it(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_guests, "LET_GO_SECONDS", 0.2)
    volume = await make(api)
    vm_id, instance_id = await make_vm(api, volume)
    assert (await put(api, volume, "a", b"inside")).status_code == 200
    assert api.world.host.files[instance_id, "/data/a"] == b"inside"
    assert not [one for one in asked(api, EnsureMachine) if one.bare] and not asked(api, Execute)
    go_on = asyncio.Event()

    async def slowly() -> Any:
        yield b"one"
        await go_on.wait()

    writing = asyncio.create_task(put(api, volume, "b", slowly()))
    await until(lambda: volume_of(api, volume) in api.world.control.volume_guests._through_vms)
    refused = await api.client.delete(f"/v1/vms/{vm_id}/volumes/{volume}")
    assert (refused.status_code, refused.json()["code"]) == (409, "volume_in_use")
    go_on.set()
    assert (await writing).status_code == 200
    assert (await api.client.delete(f"/v1/vms/{vm_id}/volumes/{volume}")).status_code == 200


def volume_of(api: Any, volume: str) -> UUID:
    return UUID(volume)


async def test_where_vms_may_only_read_nobody_writes(api: Any) -> None:
    volume = await make(api)
    vm_id, instance_id = await make_vm(api, volume, mode="ro")
    api.world.host.files[instance_id, "/data/a"] = b"there"
    assert (await get(api, volume, "a")).content == b"there"
    for refused in (
        await put(api, volume, "b"),
        await api.client.delete(f"/v1/volumes/{volume}/files", params={"path": "a"}),
    ):
        assert (refused.status_code, refused.json()["code"]) == (409, "volume_in_use")
        assert vm_id in refused.json()["detail"]
    assert (instance_id, "/data/a") in api.world.host.files


async def test_a_guest_that_has_ended_is_replaced(api: Any) -> None:
    volume = await make(api)
    await put(api, volume, "a")
    (made,) = asked(api, EnsureMachine)
    api.world.host.machines.pop(made.instance_id)
    assert (await get(api, volume, "a")).json()["code"] == "service_unavailable"
    assert (await put(api, volume, "b")).status_code == 200
    assert len(asked(api, EnsureMachine)) == 2
    assert await gone(api, made.instance_id)


async def test_a_guest_that_cannot_be_started_leaves_nothing(api: Any) -> None:
    volume = await make(api)
    api.world.host.volumes.attach_error = UnavailableError("The host is busy")
    refused = await put(api, volume, "a")
    assert (refused.status_code, refused.json()["detail"]) == (503, "The host is busy")
    (made,) = asked(api, EnsureMachine)
    assert await gone(api, made.instance_id)
    assert api.world.host.machines == {}
    api.world.host.volumes.attach_error = None
    assert (await put(api, volume, "a")).status_code == 200


async def test_what_a_virtual_machine_has_written_is_read_in_one(api: Any) -> None:
    volume = await make(api)
    host = api.world.host
    host.volumes.kept[UUID(volume)]["guest_written"] = True
    refused = await get(api, volume, "a")
    assert (refused.status_code, refused.json()["code"]) == (503, "service_unavailable")
    assert refused.json()["detail"].startswith("A virtual machine has written the volume")
    control = api.world.control
    entry = control.hosts.get(host.id)
    machines = Offer("qemu", TCG, TCG.reason, frozenset({"freeze"}))
    # As a host says it at its start.
    host.offers = [Offer("gvisor", GVISOR, "", entry.offers[0].capabilities), machines]
    control.hosts.put(dataclasses.replace(entry, offers=tuple(host.offers)))
    control.settings = control.settings.model_copy(update={"tcg_counts_as_microvm": True})
    assert (await put(api, volume, "a")).status_code == 200
    assert asked(api, EnsureMachine)[-1].shape.driver == "qemu"


async def test_what_a_killed_process_leaves_goes(api: Any) -> None:
    volume = await make(api)
    await put(api, volume, "a")
    (made,) = asked(api, EnsureMachine)
    control = api.world.control
    # As the next process begins.
    await control.database.write(instances.delete_labelled, volume_guests.LABEL)
    assert await control.database.read(instances.get, made.instance_id) is None
    await reconciler.adopt(control, api.world.host.id)
    assert made.instance_id not in api.world.host.machines


async def test_paths_and_limits(api: Any) -> None:
    volume = await make(api)
    for path in ("..", "a/../b", "/", "."):
        assert (await put(api, volume, path)).status_code == 422, path
    for params in ({"limit": "0"}, {"limit": "10001"}, {"prefix": "../a/"}, {"recursive": "2"}):
        answer = await api.client.get(f"/v1/volumes/{volume}/files", params=params)
        assert answer.status_code == 422, params
    assert (await get(api, str(uuid4()), "a")).json()["code"] == "volume_not_found"
    assert asked(api, EnsureMachine) == []
