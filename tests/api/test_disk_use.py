"""Who takes the space: what a host says of its files is some organization's or the server's."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest

from innkeeper.control import disk_use, organizations
from innkeeper.core.vm import parse_vm_id

pytestmark = pytest.mark.anyio


async def test_every_thing_is_its_owners_and_the_rest_the_servers(api: Any) -> None:
    world = api.world
    made = await api.client.post("/v1/vms", json={})
    vm = parse_vm_id(made.json()["vm_id"])
    assert vm is not None
    snapshot = (await api.client.post(f"/v1/vms/{made.json()['vm_id']}/snapshot", json={})).json()["id"]
    volume = (await api.client.post("/v1/volumes", json={"name": "v", "quota_bytes": 1 << 27})).json()["id"]
    world.host.disk_use = [
        {"kind": kind, "id": of, "size_bytes": size, "own_bytes": own}
        for kind, of, size, own in (
            ("disk", str(vm[0]), 100, 60),
            ("disk", str(uuid4()), 7, 7),
            ("disk", None, 5, 5),
            ("checkpoint", snapshot, 90, 10),
            ("volume", volume, 30, 30),
            ("volume", str(UUID(int=1)), 3, 3),
            ("image", "d" * 64, 11, 11),
            ("shared", None, 40, 40),
        )
    ]
    found = {
        (one.organization, one.kind): one for one in await disk_use.report(world.control, world.operator, world.host.id)
    }
    mine = organizations.DEFAULT_NAME
    disk, others = found[mine, "disk"], found[None, "disk"]
    assert (disk.count, disk.size_bytes, disk.own_bytes) == (1, 100, 60) and (others.count, others.own_bytes) == (2, 12)
    assert found[mine, "checkpoint"].own_bytes == 10 and found[mine, "volume"].own_bytes == 30
    assert found[None, "volume"].own_bytes == 3 and found[None, "image"].size_bytes == 11
    assert found[None, "database"].own_bytes > 0
    assert sum(one.own_bytes for one in found.values()) == 166 + sum(
        one.own_bytes for (_, kind), one in found.items() if kind in ("database", "builds", "log")
    )


async def test_only_the_operator_may(api: Any) -> None:
    refused = await api.client.get(f"/v1/hosts/{api.world.host.id}/disk")
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
