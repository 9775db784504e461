"""Retention over HTTP: what is told, what goes and what stays, by whom and why, and what is refused."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from tests.scripted_checkpoints import OWN_BYTES

from innkeeper.control import clock, retention_policies
from innkeeper.core.checkpoint_verbs import MeasureCheckpoints
from innkeeper.core.volume_verbs import ListVolumes
from innkeeper.errors import UnavailableError
from innkeeper.store import audit_events, tables

pytestmark = pytest.mark.anyio
NONE = {"keep_last": None, "max_age_days": None, "max_bytes": None}


async def vm(api: Any) -> str:
    return str((await api.client.post("/v1/vms", json={})).json()["vm_id"])


async def taken(api: Any, vm_id: str, *, days_ago: float = 0) -> str:
    made = await api.client.post(f"/v1/vms/{vm_id}/snapshot", json={})
    assert made.status_code == 200, made.text
    await age(api, tables.snapshots, made.json()["id"], days_ago)
    return str(made.json()["id"])


async def age(api: Any, table: sa.Table, row_id: str, days_ago: float) -> None:
    moment = clock.now() - timedelta(days=days_ago)

    def change(connection: sa.Connection) -> None:
        connection.execute(sa.update(table).where(table.c.id == UUID(row_id)).values(created_at=moment))

    await api.world.control.database.write(change)


async def listed(api: Any) -> set[str]:
    return {one["id"] for one in (await api.client.get("/v1/snapshots")).json()}


async def put(api: Any, **rules: Any) -> None:
    answer = await api.client.put("/v1/retention", json=rules)
    assert answer.status_code == 200, answer.text


async def apply(api: Any, **body: Any) -> dict[str, Any]:
    answer = await api.client.post("/v1/retention/apply", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_there_is_none_and_then_what_was_put(api: Any) -> None:
    assert (await api.client.get("/v1/retention")).json() == {"snapshots": NONE, "volume_checkpoints": NONE}
    await put(api, snapshots={"keep_last": 2}, volume_checkpoints={"max_age_days": 3, "max_bytes": 4})
    await put(api, snapshots={"keep_last": 5})
    assert (await api.client.get("/v1/retention")).json() == {
        "snapshots": {**NONE, "keep_last": 5}, "volume_checkpoints": NONE,
    }  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        {"snapshots": {"keep_last": 0}},
        {"snapshots": {"max_bytes": 1 << 70}},
        {"snapshot": {}},
        {"snapshots": {"days": 1}},
        [],
    ],
)
async def test_what_is_no_policy_changes_nothing(api: Any, body: Any) -> None:
    await put(api, snapshots={"keep_last": 2})
    assert (await api.client.put("/v1/retention", json=body)).status_code == 422
    assert (await api.client.get("/v1/retention")).json()["snapshots"]["keep_last"] == 2


async def test_nothing_goes_before_it_is_asked_for(api: Any) -> None:
    one = await vm(api)
    kept = [await taken(api, one) for _ in range(3)]
    await put(api, snapshots={"keep_last": 1})
    told = await apply(api)
    assert [row["id"] for row in told["items"]] == kept[:2] and not told["removed"]
    assert {row["reason"] for row in told["items"]} == {"keep_last"} and {row["of"] for row in told["items"]} == {one}
    assert told["total_bytes"] == 2 * OWN_BYTES
    thought = await apply(api, policy={"snapshots": {"keep_last": 2}})
    assert [row["id"] for row in thought["items"]] == kept[:1]
    refused = await api.client.post("/v1/retention/apply", json={"policy": {}, "remove": True})
    assert refused.status_code == 422
    assert await listed(api) == set(kept)


async def test_what_goes_is_in_the_audit_log_with_its_reason(api: Any) -> None:
    one, other = await vm(api), await vm(api)
    old, young, others = await taken(api, one, days_ago=9), await taken(api, one), await taken(api, other, days_ago=3)
    await put(api, snapshots={"max_age_days": 7})
    assert await retention_policies.enforce(api.world.control) == 1
    assert await listed(api) == {young, others}
    found = await api.world.control.database.read(
        audit_events.page, api.world.me.organization_id, before=None, limit=99
    )
    (event,) = [one for one in found if one.action == "snapshot.delete"]
    assert (event.object_id, event.actor, event.details["reason"]) == (old, "system:retention", "max_age_days")
    assert api.world.control.metrics.kept_removed == 1


async def test_by_bytes_sizes_are_asked_again_after_each(api: Any) -> None:
    one = await vm(api)
    kept = [await taken(api, one, days_ago=9 - number) for number in range(4)]
    await put(api, snapshots={"max_bytes": 2 * OWN_BYTES})
    before = api.world.host.count(MeasureCheckpoints)
    assert [row["id"] for row in (await apply(api, remove=True))["items"]] == kept[:2]
    assert api.world.host.count(MeasureCheckpoints) - before == 3
    assert await listed(api) == set(kept[2:])


async def test_a_host_that_tells_no_sizes_costs_nobody_a_snapshot(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = await vm(api)
    kept = [await taken(api, one) for _ in range(2)]
    volume, checkpoints = await volume_with_checkpoints(api, 2)
    await put(api, snapshots={"max_bytes": 1 << 40}, volume_checkpoints={"max_bytes": 1})
    request = api.world.control.bus.request

    async def silent(host_id: UUID, verb: str, *more: Any, **options: Any) -> Any:
        if verb in (MeasureCheckpoints.verb, ListVolumes.verb):
            raise UnavailableError("The host does not answer")
        return await request(host_id, verb, *more, **options)

    monkeypatch.setattr(api.world.control.bus, "request", silent)
    assert (await apply(api, remove=True))["items"] == []
    assert await listed(api) == set(kept)
    assert {row["id"] for row in (await api.client.get(f"/v1/volumes/{volume}/checkpoints")).json()} == set(checkpoints)


async def volume_with_checkpoints(api: Any, count: int) -> tuple[str, list[str]]:
    volume = (await api.client.post("/v1/volumes", json={"name": "v", "quota_bytes": 1 << 30})).json()["id"]
    made = [(await api.client.post(f"/v1/volumes/{volume}/checkpoints", json={})).json()["id"] for _ in range(count)]
    return volume, made


async def test_checkpoints_of_volumes(api: Any) -> None:
    volume, made = await volume_with_checkpoints(api, 3)
    one = await vm(api)
    mount = {"volume_id": volume, "mount_path": "/data", "mode": "ro", "checkpoint_id": made[0]}
    assert (await api.client.post(f"/v1/vms/{one}/volumes", json=mount)).status_code == 200
    await put(api, volume_checkpoints={"keep_last": 1})
    told = await apply(api, remove=True)
    assert [(row["id"], row["of"], row["kind"]) for row in told["items"]] == [
        (id_, volume, "volume_checkpoints") for id_ in made[:2]
    ]
    # Somebody reads it; that one stays, and says so, and the next pass finds it again.
    assert one in told["items"][0]["stays"] and told["items"][1]["stays"] is None
    left = [row["id"] for row in (await api.client.get(f"/v1/volumes/{volume}/checkpoints")).json()]
    assert left == [made[2], made[0]]
    assert told["total_bytes"] == told["items"][1]["size_bytes"] > 0


async def test_what_is_on_its_way_up_from_one_keeps_it(api: Any) -> None:
    one = await vm(api)
    kept = [await taken(api, one) for _ in range(2)]
    await put(api, snapshots={"keep_last": 1})
    lease = sa.update(tables.snapshots).where(tables.snapshots.c.id == UUID(kept[0]))
    later = {"lock_token": UUID(int=1), "lock_expires_at": clock.now() + timedelta(hours=1)}
    await api.world.control.database.write(lambda connection: connection.execute(lease.values(**later)))
    (row,) = (await apply(api, remove=True))["items"]
    assert row["stays"] == "The snapshot is being worked on" and await listed(api) == set(kept)
