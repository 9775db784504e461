"""Snapshots of OCI images over HTTP: what is fetched and built, what begins with them, what is refused, and what a crash leaves."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from innkeeper.control import garbage, image_builds, images, snapshot_builds, tokens
from innkeeper.core.checkpoint_verbs import DropCheckpoint, RestoreCheckpoint
from innkeeper.core.host_verbs import CollectGarbage, CollectImages, EnsureMachine, Execute, ImportImage
from innkeeper.core.token import Scope
from innkeeper.errors import InvalidRequestError, NotFoundError
from innkeeper.store import images as image_store
from innkeeper.store import snapshots as store

pytestmark = pytest.mark.anyio

IMAGE = "registry.example.com/team/app:1"
SECRET = "hunter2-of-the-build"
FETCHED = "e" * 64


async def begin(api: Any, **fields: Any) -> dict[str, Any]:
    answer = await api.client.post("/v1/snapshots", json={"oci_image": IMAGE, **fields})
    assert answer.status_code == 200, answer.text
    begun: dict[str, Any] = answer.json()
    return begun


async def get(api: Any, snapshot: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = (await api.client.get(f"/v1/snapshots/{snapshot['id']}")).json()
    return found


async def ended(api: Any, snapshot: dict[str, Any]) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while (found := await get(api, snapshot))["status"] == "building" or api.world.control.snapshot_builds:
            await asyncio.sleep(0.01)
    return found


async def said(api: Any, snapshot: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    answer = await api.client.get(f"/v1/snapshots/{snapshot['id']}/log")
    assert answer.status_code == 200, answer.text
    frames = [frame.split("\n", 1) for frame in answer.text.split("\n\n") if frame.startswith("event: ")]
    return [(event.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for event, data in frames]


def asked(api: Any, verb: type[Any]) -> list[Any]:
    return [request for request in api.world.host.asked if isinstance(request, verb)]


async def test_the_image_alone_and_a_vm_of_it(api: Any) -> None:
    begun = await begin(api, vcpu_count=1, memory_mb=256)
    assert (begun["status"], begun["oci_image"], begun["name"], begun["vm_id"]) == ("building", IMAGE, IMAGE, None)
    done = await ended(api, begun)
    assert (done["status"], done["last_error"], done["image_digest"]) == ("ready", None, FETCHED)
    assert (done["vcpu_count"], done["memory_mb"], done["memory"], done["driver"]) == (1, 256, False, None)
    assert (done["size_bytes"], done["disk_bytes"], done["own_bytes"], done["memory_bytes"]) == (9, 9, 9, None)
    (imported,) = asked(api, ImportImage)
    assert (imported.kind, imported.reference) == ("registry", IMAGE)
    assert not asked(api, Execute) and api.world.host.acknowledged == 1
    assert [event for event, _ in await said(api, begun)] == ["step", "output", "end"]
    before = len(asked(api, EnsureMachine))
    vm = (await api.client.post("/v1/vms", json={"snapshot_id": begun["id"]})).json()
    (ensured,) = asked(api, EnsureMachine)[before:]
    shape = ensured.shape
    assert (shape.image_digest, shape.vcpu_count, shape.memory_mb) == (FETCHED, 1, 256)
    assert ensured.env["A"] == "1" and not asked(api, RestoreCheckpoint)
    record = (await api.client.get(f"/v1/vms/{vm['vm_id']}")).json()
    assert (record["snapshot_id"], record["restored"], record["image"]) == (begun["id"], "disk", IMAGE)
    # What stands on the file keeps it: nothing would be free.
    assert (await get(api, begun))["own_bytes"] == 0


async def test_what_is_installed_and_the_variables_of_its_vms(api: Any) -> None:
    args = {
        "extra_apt_packages": "git curl", "extra_pip_packages": "flask", "git_clone_url": "https://git.example.com/a/b",
        "post_build_cmd": f"echo {SECRET}", "envs": {"TOKEN": SECRET, "A": "over the image's"}, "disk_size_gb": 2,
    }  # fmt: skip
    begun = await begin(api, name="tools", build_args=args)
    done = await ended(api, begun)
    assert (done["status"], done["name"], done["disk_mb"]) == ("ready", "tools", 2_048)
    assert done["image_digest"] == api.world.host.builds.kept[-1] != FETCHED
    ran = asked(api, Execute)
    assert [one.argv[-2:] for one in ran] == [
        ("git", "curl"), ("sh", "flask"), ("https://git.example.com/a/b", "/app/repo"), ("-c", f"echo {SECRET}"),
    ]  # fmt: skip
    assert {one.env["TOKEN"] for one in ran} == {SECRET} and {one.env["A"] for one in ran} == {"over the image's"}
    (guest,) = asked(api, EnsureMachine)
    assert (guest.shape.image_digest, guest.shape.egress_mode, guest.env) == (FETCHED, "internet", {})
    # Neither record nor log nor audit log says what may be a secret.
    log = json.dumps(await said(api, begun))
    written = (await api.client.get("/v1/audit/events")).text
    assert "snapshot.create" in written and IMAGE in written
    assert SECRET not in json.dumps(done) + log + written and "extra_pip_packages flask" in log
    body = {"snapshot_id": begun["id"], "env": {"B": "of the VM"}, "vcpu_count": 4, "driver": "gvisor"}
    first = (await api.client.post("/v1/vms", json=body)).json()
    second = (await api.client.post("/v1/vms", json={"session_id": first["session_id"], **body})).json()
    assert second["vm_id"] == first["vm_id"]
    made = asked(api, EnsureMachine)[-1]
    assert made.shape.disk_mb == 2_048 and made.shape.vcpu_count == 4
    assert {"TOKEN": SECRET, "A": "over the image's", "B": "of the VM"}.items() <= made.env.items()
    # A session's next VM begins as the first one did.
    await api.client.delete(f"/v1/vms/{first['vm_id']}")
    ran_in = await api.client.post("/execute", json={"session_id": first["session_id"], "command": "true", "language": "bash"})  # fmt: skip
    assert ran_in.status_code == 200, ran_in.text
    again = asked(api, EnsureMachine)[-1]
    assert again.instance_id != made.instance_id and again.shape.image_digest == done["image_digest"]
    assert {"TOKEN": SECRET, "B": "of the VM"}.items() <= again.env.items()


async def test_an_image_without_a_registry_is_in_the_default_one(api: Any) -> None:
    control = api.world.control
    refused = await api.client.post("/v1/snapshots", json={"oci_image": "python:3.12-slim"})
    assert refused.status_code == 422 and "INNKEEPER_DEFAULT_REGISTRY" in refused.text
    control.settings = control.settings.model_copy(update={"default_registry": "registry.example.com"})
    credential = {"username": "robot", "password": SECRET}
    stored = await api.client.put("/v1/registries/registry.example.com", json=credential)
    assert stored.status_code < 300, stored.text
    done = await ended(api, await begin(api, oci_image="python:3.12-slim"))
    full = "registry.example.com/library/python:3.12-slim"
    assert (done["status"], done["oci_image"], done["name"], done["image"]) == ("ready", "python:3.12-slim", "python:3.12-slim", full)  # fmt: skip
    (imported,) = asked(api, ImportImage)
    assert (imported.reference, imported.username, imported.password) == (full, "robot", SECRET)


@pytest.mark.parametrize("at", ["fetching", "installing"])
async def test_a_build_that_fails(api: Any, at: str) -> None:
    if at == "fetching":
        api.world.host.import_error = NotFoundError("The registry has no such image")
    else:
        api.world.host.execute_error = InvalidRequestError("there is no /bin/sh")
    begun = await begin(api, build_args={"extra_apt_packages": "git"})
    done = await ended(api, begun)
    error = "The registry has no such image" if at == "fetching" else "extra_apt_packages git: there is no /bin/sh"
    assert (done["status"], done["last_error"], done["error"]) == ("failed", error, error)
    # Nothing of it is kept but why.
    assert (done["image_digest"], done["size_bytes"], done["own_bytes"]) == ("", None, None)
    assert FETCHED not in await api.world.control.database.read(image_store.digests)
    assert (await said(api, begun))[-1] == ("end", {"number": 2 if at == "fetching" else 4, "status": "failed", "error": error, "digest": None})  # fmt: skip
    refused = await api.client.post("/v1/vms", json={"snapshot_id": begun["id"]})
    assert refused.status_code == 409 and error in refused.text
    deleted = await api.client.delete(f"/v1/snapshots/{begun['id']}")
    assert deleted.json()["status"] == "deleted" and not asked(api, DropCheckpoint)
    assert (await api.client.get(f"/v1/snapshots/{begun['id']}/log")).status_code == 404


async def test_its_file_is_wanted_until_it_is_deleted(api: Any) -> None:
    begun = await begin(api)
    await ended(api, begun)
    control = api.world.control
    await images.collect_everywhere(control)
    assert FETCHED in asked(api, CollectImages)[-1].keep
    await garbage.collect(control, tokens.operator_principal(control), api.world.host.id, remove=False)
    assert FETCHED in asked(api, CollectGarbage)[-1].keep_images
    verified = await api.client.post(f"/v1/snapshots/{begun['id']}/verify", json={})
    assert verified.status_code == 409 and "is an image" in verified.text
    assert (await api.client.delete(f"/v1/snapshots/{begun['id']}")).json()["status"] == "deleted"
    assert FETCHED not in asked(api, CollectImages)[-1].keep
    folder = control.settings.api_dir / "snapshot-logs"
    assert list(folder.iterdir()) == []


async def test_it_is_not_deleted_under_a_vm_that_comes_up(api: Any) -> None:
    begun = await begin(api)
    await ended(api, begun)
    api.world.host.hold.clear()
    vm = (await api.client.post("/v1/vms?wait=false", json={"snapshot_id": begun["id"]})).json()
    refused = await api.client.delete(f"/v1/snapshots/{begun['id']}")
    assert refused.status_code == 409 and vm["vm_id"] in refused.text
    api.world.host.hold.set()
    async with asyncio.timeout(60):
        while (await api.client.get(f"/v1/vms/{vm['vm_id']}")).json()["restored"] is None:
            await asyncio.sleep(0.01)
    assert (await api.client.delete(f"/v1/snapshots/{begun['id']}")).status_code == 200


async def test_deleting_one_that_is_being_built_stops_it(api: Any) -> None:
    api.world.host.hold_execute.clear()
    begun = await begin(api, build_args={"post_build_cmd": "sleep inf"})
    async with asyncio.timeout(60):
        while not asked(api, Execute):
            await asyncio.sleep(0.01)
    assert (await api.client.delete(f"/v1/snapshots/{begun['id']}")).json()["status"] == "deleted"
    control = api.world.control
    assert control.snapshot_builds == {} and api.world.host.machines == {}
    assert await control.database.read(store.image_ids) == set()
    assert (await api.client.get("/v1/snapshots")).json() == []


async def test_a_server_that_ended_in_the_middle(api: Any) -> None:
    control = api.world.control
    api.world.host.hold.clear()
    begun = await begin(api)
    (live,) = control.snapshot_builds.values()
    stray = control.settings.api_dir / "snapshot-logs" / "0197f0c0-0000-7000-8000-000000000000.log"
    stray.touch()
    # What the next server does first; the build of this one finds its row taken.
    await snapshot_builds.recover(control)
    found = await get(api, begun)
    assert (found["status"], found["last_error"]) == ("failed", image_builds.INTERRUPTED)
    assert not stray.exists()
    live.scope.cancel()
    await live.ended.wait()
    assert image_builds.INTERRUPTED in json.dumps(await said(api, begun))


async def test_limits(api: Any) -> None:
    control = api.world.control
    api.world.host.hold.clear()
    for _ in range(control.settings.max_builds):
        await begin(api)
    for path, body in (
        ("/v1/snapshots", {"oci_image": IMAGE}),
        ("/v1/image-builds", {"name": "x", "dockerfile": "FROM base", "context": False}),
    ):
        refused = await api.client.post(path, json=body)
        assert refused.status_code == 429 and "as many as it may" in refused.text
    assert await control.database.read(store.count, api.world.me.organization_id) == control.settings.max_builds
    api.world.host.hold.set()
    for one in (await api.client.get("/v1/snapshots")).json():
        await ended(api, one)
    control.settings = control.settings.model_copy(update={"max_snapshots": control.settings.max_builds})
    refused = await api.client.post("/v1/snapshots", json={"oci_image": IMAGE})
    assert refused.status_code == 429 and "which is the limit" in refused.text and control.snapshot_builds == {}
    control.settings = control.settings.model_copy(update={"image_quota_mb": 0})
    refused = await api.client.post("/v1/snapshots", json={"oci_image": IMAGE})
    assert refused.status_code == 429 and "The organization's images have" in refused.text
    assert await control.database.read(store.image_bytes, api.world.me.organization_id) == 9 * control.settings.max_builds  # fmt: skip


@pytest.mark.parametrize(
    ("body", "status", "said_of"),
    [
        ({}, 422, "oci_image"), ({"oci_image": "file:/etc/passwd"}, 422, "oci_image"), ({"oci_image": IMAGE, "type": "system"}, 422, "type"),
        ({"oci_image": IMAGE, "vcpu_count": 9}, 422, "vcpu_count"), ({"oci_image": IMAGE, "memory_mb": 64}, 422, "memory_mb"),
        ({"oci_image": IMAGE, "build_args": {"disk_size_gb": 17}}, 422, "disk_size_gb"), ({"oci_image": IMAGE, "build_args": {"x": 1}}, 422, "x"),
        ({"oci_image": IMAGE, "build_args": {"extra_apt_packages": "-o=x"}}, 422, "extra_apt_packages"),
        ({"oci_image": IMAGE, "build_args": {"git_clone_url": "file:///etc"}}, 422, "git_clone_url"),
        ({"oci_image": IMAGE, "build_args": {"envs": {"A-B": SECRET}}}, 422, "envs"),
        ({"oci_image": IMAGE, "build_args": {"envs": {"A": [SECRET]}}}, 422, "envs"),
    ],
)  # fmt: skip
async def test_what_is_refused_begins_nothing(api: Any, body: dict[str, Any], status: int, said_of: str) -> None:
    refused = await api.client.post("/v1/snapshots", json=body)
    assert refused.status_code == status, refused.text
    assert said_of in refused.text and SECRET not in refused.text
    assert not asked(api, ImportImage) and (await api.client.get("/v1/snapshots")).json() == []


async def test_scopes_and_keys(api: Any) -> None:
    control, me = api.world.control, api.world.me
    narrow = await tokens.create(control, me, "rooms alone", scopes=frozenset({Scope.ROOMS}))
    headers = {"Authorization": f"Bearer {narrow.text}"}
    refused = await api.client.post("/v1/snapshots", json={"oci_image": IMAGE}, headers=headers)
    assert refused.status_code == 403 and not asked(api, ImportImage)
    key = {"Idempotency-Key": "k"}
    first, again = [await api.client.post("/v1/snapshots", json={"oci_image": IMAGE}, headers=key) for _ in range(2)]
    assert first.content == again.content and again.headers["idempotency-replayed"] == "true"
    await ended(api, first.json())
    assert len(asked(api, ImportImage)) == 1
    vm = (await api.client.post("/v1/vms", json={})).json()["vm_id"]
    taken = [await api.client.post(f"/v1/vms/{vm}/snapshot", json={}, headers={"Idempotency-Key": "s"}) for _ in "12"]
    assert taken[0].content == taken[1].content and taken[1].headers["idempotency-replayed"] == "true"
    assert len((await api.client.get("/v1/snapshots")).json()) == 2
    # One of a VM was not built: its log is empty.
    assert await said(api, taken[0].json()) == []
