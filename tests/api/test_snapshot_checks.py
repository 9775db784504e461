"""Verifications of snapshots over HTTP: what they find, what that changes, and what is left of their guests."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from uuid import UUID

import pytest

from innkeeper.control import clock, snapshot_checks
from innkeeper.core import checkpoint_verbs as verbs
from innkeeper.core.host_verbs import DestroyMachine, Execute
from innkeeper.errors import (
    CheckpointDamagedError,
    InstanceFailedError,
    InvalidRequestError,
    MemoryUnusableError,
    UnavailableError,
)
from innkeeper.store import instances
from innkeeper.store import snapshots as store

pytestmark = pytest.mark.anyio


def asked(api: Any, verb: type[Any]) -> list[Any]:
    return [request for request in api.world.host.asked if isinstance(request, verb)]


def says(api: Any, *, nonce: str = "", who: str = "a", entropy: str = "e1") -> None:
    said = f"time={int(time.time())}\nhostname=host-{who}\nmachine_id=id-{who}\nentropy={entropy}\nnonce={nonce}\n"
    api.world.host.output = [said.encode()]


async def taken(api: Any, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> dict[str, Any]:
    """A snapshot of a guest that told of itself, with a known nonce, and the checksum of its disk noted."""
    monkeypatch.setattr("innkeeper.control.snapshot_taking.secrets.token_hex", lambda _: "nonce1")
    says(api, nonce="nonce1")
    vm = (await api.client.post("/v1/vms", json={})).json()
    snapshot: dict[str, Any] = (await api.client.post(f"/v1/vms/{vm['vm_id']}/snapshot", json=fields)).json()
    async with asyncio.timeout(20):
        while (await shown(api, snapshot))["disk_digest"] is None:
            await asyncio.sleep(0.01)
    says(api, nonce="nonce1", who="b", entropy="e2")
    return snapshot


async def shown(api: Any, snapshot: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = (await api.client.get(f"/v1/snapshots/{snapshot['id']}")).json()
    return found


async def verify(api: Any, snapshot: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool | None]]:
    answer = await api.client.post(f"/v1/snapshots/{snapshot['id']}/verify", json={})
    assert answer.status_code == 200, answer.text
    return answer.json(), {check["name"]: check["ok"] for check in answer.json()["checks"]}


async def nothing_left(api: Any, *, vms: int = 1) -> None:
    alive = await api.world.control.database.read(instances.alive_on_host, api.world.host.id)
    assert len(alive) == vms == len(api.world.host.machines)


async def test_a_whole_one(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = await taken(api, monkeypatch)
    answer, checks = await verify(api, snapshot)
    assert checks == dict.fromkeys(("disk", "memory", "agent", "clock", "entropy", "identity", "sentinel"), True)
    assert (answer["status"], answer["damaged"], answer["error"]) == ("ready", False, None)
    assert answer["verified_at"] is not None
    (request,) = asked(api, verbs.RestoreCheckpoint)
    # What goes on in it reaches nobody, and it is nobody's.
    assert request.machine.shape.egress_mode == "none"
    assert [one.instance_id for one in asked(api, DestroyMachine)] == [request.machine.instance_id]
    await nothing_left(api)
    assert len((await api.client.get("/v1/vms/")).json()) == 1
    assert all(one.user == "root" and one.exact_env for one in asked(api, Execute))


async def test_a_damaged_disk_is_refused_until_it_is_whole_again(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = await taken(api, monkeypatch)
    api.world.host.checkpoints.digest = "other"
    answer, checks = await verify(api, snapshot)
    assert (checks["disk"], answer["status"], answer["damaged"]) == (False, "failed", True)
    assert "checksum of the saved disk" in answer["last_error"]
    begun = await api.client.post("/v1/vms", json={"snapshot_id": snapshot["id"]})
    assert (begun.status_code, begun.json()["code"]) == (409, "snapshot_damaged")
    # It is not thrown away: it may be all that there is.
    assert UUID(snapshot["id"]) in api.world.host.checkpoints.kept
    assert UUID(snapshot["id"]) in await api.world.control.database.read(store.kept, api.world.host.id)
    api.world.host.checkpoints.digest = "d1"
    answer, checks = await verify(api, snapshot)
    assert (checks["disk"], answer["status"], answer["damaged"]) == (True, "ready", False)
    assert (await api.client.post("/v1/vms", json={"snapshot_id": snapshot["id"]})).status_code == 200


@pytest.mark.parametrize(
    ("error", "name"), [(CheckpointDamagedError("gone bad"), "memory"), (InstanceFailedError("no"), "agent")]
)
async def test_one_that_does_not_start(api: Any, monkeypatch: pytest.MonkeyPatch, error: Any, name: str) -> None:
    snapshot = await taken(api, monkeypatch)
    api.world.host.checkpoints.restore_error = error
    answer, checks = await verify(api, snapshot)
    assert (checks[name], checks["disk"], answer["damaged"]) == (False, True, True)
    await nothing_left(api)


async def test_what_says_nothing_of_it(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = await taken(api, monkeypatch)
    host = api.world.host
    # The host has changed: the disk can be tried.
    host.checkpoints.restore_error = MemoryUnusableError("another cpu")
    answer, checks = await verify(api, snapshot)
    assert (checks["memory"], checks["agent"], checks["sentinel"], answer["damaged"]) == (None, True, None, False)
    host.checkpoints.restore_error = None
    # An image without a shell.
    host.execute_error = InvalidRequestError("argv: no such program")
    answer, checks = await verify(api, snapshot)
    assert (checks["memory"], checks["agent"], answer["damaged"]) == (True, None, False)
    host.execute_error = None
    # No room for a guest.
    before = (await shown(api, snapshot))["verified_at"]
    host.checkpoints.restore_error = UnavailableError("full")
    answer = await api.client.post(f"/v1/snapshots/{snapshot['id']}/verify", json={})
    assert answer.status_code == 503
    after = await shown(api, snapshot)
    assert (after["status"], after["verified_at"]) == ("ready", before)
    host.checkpoints.restore_error = None
    assert (await verify(api, snapshot))[0]["status"] == "ready"
    await nothing_left(api)


async def test_one_without_memory(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = await taken(api, monkeypatch, memory=False)
    assert asked(api, Execute) == []
    _, checks = await verify(api, snapshot)
    assert checks == {
        "disk": True, "memory": None, "agent": True, "clock": True, "entropy": None, "identity": None, "sentinel": None,
    }  # fmt: skip


async def test_the_schedule_takes_the_oldest(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await taken(api, monkeypatch)
    second = await taken(api, monkeypatch)
    control = api.world.control
    assert await snapshot_checks.verify_next(control) is None
    monkeypatch.setattr(control, "settings", control.settings.model_copy(update={"snapshot_verify_hours": 1}))
    assert await snapshot_checks.verify_next(control) is None
    now = clock.now()
    later = now.replace(year=now.year + 1)
    monkeypatch.setattr(snapshot_checks.clock, "now", lambda: later)
    done = [await snapshot_checks.verify_next(control) for _ in range(3)]
    assert [one and str(one.id) for one in done] == [first["id"], second["id"], None]


async def test_one_verification_at_a_time(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = await taken(api, monkeypatch)
    api.world.host.hold_execute.clear()
    first = asyncio.create_task(api.client.post(f"/v1/snapshots/{snapshot['id']}/verify", json={}))
    async with asyncio.timeout(20):
        while not asked(api, verbs.RestoreCheckpoint):
            await asyncio.sleep(0.01)
    second = await api.client.post(f"/v1/snapshots/{snapshot['id']}/verify", json={})
    gone = await api.client.delete(f"/v1/snapshots/{snapshot['id']}")
    assert {second.status_code, gone.status_code} == {409}
    api.world.host.hold_execute.set()
    assert (await first).status_code == 200


async def test_guests_of_an_earlier_server_are_nobodys(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = await taken(api, monkeypatch)
    found = await api.world.control.database.read(store.get, UUID(snapshot["id"]))
    guest, _ = snapshot_checks.guest_of(found)
    await api.world.control.database.write(
        lambda connection: instances.insert(connection, guest, lock_token=None, now=clock.now(), ttl_seconds=0)
    )
    await snapshot_checks.recover(api.world.control)
    alive = await api.world.control.database.read(instances.alive_on_host, api.world.host.id)
    assert guest.id not in alive and len(alive) == 1
