"""Shares, app URLs and lists of ports over HTTP; what passes through them has tests of its own."""

from __future__ import annotations

import asyncio
import threading
from typing import Any
from uuid import uuid4

import pytest

from innkeeper.control import shares
from innkeeper.core.share import NAME
from innkeeper.errors import GuestError, UnavailableError

pytestmark = pytest.mark.anyio


async def make_vm(api: Any, **fields: Any) -> dict[str, Any]:
    answer = await api.client.post("/v1/vms", json=fields)
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def make(api: Any, **fields: Any) -> dict[str, Any]:
    answer = await api.client.post("/v1/shares", json=fields)
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def test_a_share_and_its_life(api: Any) -> None:
    vm = await make_vm(api)
    # As the SDK sends it: both, and `vm_id` counts.
    made = await make(api, port=8000, is_public=True, vm_id=vm["vm_id"], session_id=str(uuid4()))
    name = made["url"].removeprefix("http://").partition(".")[0]
    assert NAME.fullmatch(name) and made["url"] == f"http://{name}.localhost:7070/"
    assert (made["port"], made["is_public"], made["vm_id"], made["status"]) == (8000, True, vm["vm_id"], "active")
    path = f"/v1/shares/{made['share_id']}"
    assert (await api.client.get(path)).json() == made
    private = (await api.client.patch(path, json={"is_public": False})).json()
    assert private == {**made, "is_public": False}
    assert (await api.client.get("/v1/shares", params={"vm_id": vm["vm_id"]})).json() == [private]
    revoked = await api.client.patch(path, json={"revoke": True})
    assert revoked.json() == {**private, "status": "revoked"}
    for method in ("GET", "DELETE"):
        answer = await api.client.request(method, path)
        assert (answer.status_code, answer.json()["code"]) == (404, "share_not_found")
    assert (await api.client.get("/v1/shares")).json() == []


async def test_by_session_and_with_the_vm(api: Any) -> None:
    vm = await make_vm(api, share={"port": 3000, "is_public": True})
    assert (vm["share"]["port"], vm["share"]["is_public"], vm["share"]["vm_id"]) == (3000, True, vm["vm_id"])
    by_session = await make(api, port=1, session_id=vm["session_id"])
    assert by_session["is_public"] is False
    listed = (await api.client.get("/v1/shares")).json()
    assert [one["share_id"] for one in listed] == [vm["share"]["share_id"], by_session["share_id"]]
    assert len({one["url"] for one in listed}) == 2
    empty = (await api.client.post("/v1/sessions/session", json={})).json()
    answer = await api.client.post("/v1/shares", json={"port": 1, "session_id": empty["session_id"]})
    assert (answer.status_code, answer.json()["code"]) == (404, "session_not_found")


async def test_shares_end_with_their_vm(api: Any) -> None:
    vm = await make_vm(api)
    made = await make(api, port=80, vm_id=vm["vm_id"])
    await api.client.delete(f"/v1/vms/{vm['vm_id']}")
    assert (await api.client.get(f"/v1/shares/{made['share_id']}")).status_code == 404
    assert (await api.client.get("/v1/shares")).json() == []
    answer = await api.client.post("/v1/shares", json={"port": 80, "vm_id": vm["vm_id"]})
    assert (answer.status_code, answer.json()["code"]) == (404, "vm_not_found")
    assert list(api.world.control.shares) == []


async def test_a_share_that_is_revoked_stays_so_whatever_is_changed_meanwhile(
    api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await make(api, port=80, vm_id=(await make_vm(api))["vm_id"])
    path, gate = f"/v1/shares/{made['share_id']}", threading.Event()
    control = api.world.control
    write, asked = control.database.write, []

    async def noted(work: Any, *arguments: Any, **more: Any) -> Any:
        asked.append(work.__qualname__.partition(".")[0])
        return await write(work, *arguments, **more)

    held = asyncio.create_task(write(lambda _: gate.wait(60)))
    await api.world.until(lambda: control.database.load.waiting >= 1)
    # By name: what is written behind may come between.
    monkeypatch.setattr(control.database, "write", noted)
    changing = asyncio.create_task(api.client.patch(path, json={"is_public": True}))
    await api.world.until(lambda: "set_public" in asked)
    revoking = asyncio.create_task(api.client.delete(path))
    await api.world.until(lambda: "revoke" in asked)
    gate.set()
    await held
    assert (await revoking).status_code == 200
    assert (await changing).status_code == 404
    assert list(control.shares) == []


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"port": 0}, "port"), ({"port": 65_536}, "port"), ({"port": "x"}, "port"), ({}, "port"),
        ({"port": 80}, "vm_id"), ({"port": 80, "vm_id": "v", "more": 1}, "more"), ({"port": 80, "is_public": "maybe"}, "is_public"),
    ],
)  # fmt: skip
async def test_what_is_refused_names_its_field(api: Any, body: dict[str, Any], field: str) -> None:
    answer = await api.client.post("/v1/shares", json=body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["detail"][0]["loc"] == ["body", field]


@pytest.mark.parametrize("body", [{}, {"is_public": True, "revoke": True}, {"revoke": False}, {"port": 1}])
async def test_a_change_says_one_thing(api: Any, body: dict[str, Any]) -> None:
    made = await make(api, port=80, vm_id=(await make_vm(api))["vm_id"])
    assert (await api.client.patch(f"/v1/shares/{made['share_id']}", json=body)).status_code == 422
    assert (await api.client.get(f"/v1/shares/{made['share_id']}")).json() == made


async def test_links(api: Any) -> None:
    made = await make(api, port=80, vm_id=(await make_vm(api))["vm_id"])
    path = f"/v1/shares/{made['share_id']}/link"
    link = (await api.client.post(path, json={"expires_in_seconds": 60})).json()
    assert link["url"].startswith(f"{made['url']}?inn_link=")
    assert (await api.client.post(path, json={})).status_code == 200
    for seconds in (0, 604_801, "x"):
        assert (await api.client.post(path, json={"expires_in_seconds": seconds})).status_code == 422


async def test_no_more_than_the_limit(api: Any) -> None:
    vm = await make_vm(api)
    for _ in range(100):
        await make(api, port=80, vm_id=vm["vm_id"])
    answer = await api.client.post("/v1/shares", json={"port": 80, "vm_id": vm["vm_id"]})
    assert answer.status_code == 429 and "100 shares" in answer.json()["detail"]


async def test_what_is_published_survives_a_restart(api: Any) -> None:
    vm = await make_vm(api)
    kept = await make(api, port=80, vm_id=vm["vm_id"], is_public=True)
    gone = await make(api, port=81, vm_id=vm["vm_id"])
    await api.client.delete(f"/v1/shares/{gone['share_id']}")
    async with api.world.running() as control:
        assert [(str(share.id), share.port, share.is_public) for share in control.shares] == [
            (kept["share_id"], 80, True)
        ]


async def test_app_urls(api: Any) -> None:
    vm = await make_vm(api, vm_lifetime_seconds=600)
    answer = (await api.client.get(f"/v1/sessions/app-url/{vm['session_id']}", params={"port": 8000})).json()
    assert answer["url"] == answer["app_url"] == f"http://inn/v1/app/{vm['session_id']}/8000/"
    assert answer["direct_url"] == f"http://{vm['vm_id'].removeprefix('vm_')}-8000.localhost:7070/"
    assert answer["link_url"].startswith(answer["direct_url"] + "?inn_link=")
    assert (answer["vm_id"], answer["status"], answer["port"]) == (vm["vm_id"], "active", 8000)
    assert 0 < answer["expires_in_seconds"] <= 600
    assert (await api.client.get(f"/v1/sessions/app-url/{vm['session_id']}")).json()["port"] == 80
    for port in (0, 65_536, "x"):
        refused = await api.client.get(f"/v1/sessions/app-url/{vm['session_id']}", params={"port": port})
        assert refused.status_code == 422
    await api.client.post("/kill", json={"session_id": vm["session_id"]})
    assert (await api.client.get(f"/v1/sessions/app-url/{vm['session_id']}")).status_code == 404


async def test_listening_ports(api: Any) -> None:
    vm = await make_vm(api)
    api.world.host.ports.servers = {8000: 1, 22: 2}
    answer = await api.client.get(f"/v1/vms/{vm['vm_id']}/ports")
    assert answer.json() == [{"port": port, "address": "127.0.0.1", "pid": 7, "command": "x"} for port in (22, 8000)]
    assert (await api.client.get("/v1/vms/vm_x/ports")).status_code == 404


async def test_a_share_domain_of_ones_own(api: Any) -> None:
    vm = await make_vm(api)
    for settings, form in (
        ({"share_domain": "share.example.com"}, "https://{}.share.example.com/"),
        ({"share_domain": "share.example.com:8443"}, "https://{}.share.example.com:8443/"),
        ({"share_domain": "share.example.com", "insecure": True}, "http://{}.share.example.com:7070/"),
    ):
        api.world.control.settings = api.world.settings.model_copy(update=settings)
        made = await make(api, port=80, vm_id=vm["vm_id"])
        name = made["url"].partition("://")[2].partition(".")[0]
        assert made["url"] == form.format(name)


async def test_a_guest_that_lies_about_its_ports(api: Any) -> None:
    vm = await make_vm(api)

    def lie(_: Any) -> None:
        raise GuestError("The guest agent sent no valid list of ports")

    api.world.host.ports._there = lie
    assert (await api.client.get(f"/v1/vms/{vm['vm_id']}/ports")).status_code == 503


async def test_no_moment_has_more_shares_than_the_limit(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "SHARES_PER_INSTANCE", 3)
    vm = (await api.client.post("/v1/vms", json={})).json()["vm_id"]
    asked = (api.client.post("/v1/shares", json={"vm_id": vm, "port": 80 + number}) for number in range(8))
    answers = await asyncio.gather(*asked)
    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 5
    assert len((await api.client.get("/v1/shares")).json()) == 3


async def test_a_share_is_there_with_its_vm(api: Any) -> None:
    """Who is told to come again finds both."""
    control = api.world.control
    control.settings = control.settings.model_copy(update={"room_wait_seconds": 0.05})
    api.world.host.hold.clear()
    assert (await api.client.post("/v1/vms", json={"share": {"port": 80}})).status_code == 504
    # It goes on, and may not even have been stored by then.
    await api.world.until(lambda: bool(list(control.shares)))
    [one] = (await api.client.get("/v1/shares")).json()
    assert [vm["vm_id"] for vm in (await api.client.get("/v1/vms")).json()] == [one["vm_id"]]
    api.world.host.hold.set()


async def test_a_vm_that_could_not_be_made_leaves_nothing(api: Any) -> None:
    api.world.host.ensure_error = UnavailableError("full")
    assert (await api.client.post("/v1/vms", json={"share": {"port": 80}})).status_code == 503
    for table in ("sessions", "shares"):
        kept = await api.world.control.database.read(
            lambda connection, table=table: connection.exec_driver_sql(f"select count(*) from {table}").scalar_one()
        )
        assert kept == 0, table
    assert (await api.client.get("/v1/shares")).json() == []
