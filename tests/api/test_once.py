"""`Idempotency-Key`: carried out once, the same answer again, and what becomes of a request that was cut short."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from innkeeper.control import retention
from innkeeper.core.host_verbs import EnsureMachine
from innkeeper.errors import UnavailableError

pytestmark = pytest.mark.anyio


async def post(api: Any, path: str, key: str, /, **body: Any) -> Any:
    return await api.client.post(path, json=body, headers={"Idempotency-Key": key})


async def test_the_same_key_is_the_same_vm(api: Any) -> None:
    first = await post(api, "/v1/vms", "k", metadata={"a": 1})
    again = await post(api, "/v1/vms", "k", metadata={"a": 1})
    assert first.status_code == again.status_code == 200
    assert first.content == again.content
    assert "idempotency-replayed" not in first.headers and again.headers["idempotency-replayed"] == "true"
    assert api.world.host.count(EnsureMachine) == 1
    assert (await post(api, "/v1/vms", "other", metadata={"a": 1})).json()["vm_id"] != first.json()["vm_id"]


async def test_at_the_same_moment(api: Any) -> None:
    answers = await asyncio.gather(*(post(api, "/v1/vms", "k") for _ in range(5)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert api.world.host.count(EnsureMachine) == 1
    # Nothing of this could be found again by whoever does not wait.
    answers = await asyncio.gather(*(post(api, "/v1/tokens", "t", name="t") for _ in range(5)))
    assert {answer.status_code for answer in answers} == {201} and len({answer.content for answer in answers}) == 1


async def test_another_body_is_refused(api: Any) -> None:
    await post(api, "/v1/vms", "k", metadata={"a": 1})
    for path, body in (("/v1/vms", {"metadata": {"a": 2}}), ("/v1/vms?wait=false", {"metadata": {"a": 1}})):
        refused = await post(api, path, "k", **body)
        assert refused.status_code == 422, refused.text
        assert "another request" in refused.text
    assert (await post(api, "/v1/tokens", "k", name="t")).status_code == 400


@pytest.mark.parametrize("key", ["", "x" * 256, "é"])
async def test_what_is_no_key(api: Any, key: str) -> None:
    answer = await api.client.post("/v1/vms", json={}, headers=[(b"Idempotency-Key", key.encode())])
    assert answer.status_code == 422
    twice = [(b"Idempotency-Key", b"a"), (b"Idempotency-Key", b"a")]
    assert (await api.client.post("/v1/vms", json={}, headers=twice)).status_code == 422
    assert api.world.host.count(EnsureMachine) == 0


V1 = ("/v1/", "/execute", "/kill", "/upload", "/download")
# Their bodies are streamed; both may be repeated as they are.
WITHOUT_KEY = {
    "/upload",
    "/download",
    "/v1/volumes/{volume_id}/files/upload",
    "/v1/volumes/{volume_id}/files/download",
}


async def test_every_post_knows_keys(api: Any) -> None:
    """Whatever a route does, it does not begin before its key is looked at: so each, and each to come, is carried out once."""
    posts = [path for path, item in api.document["paths"].items() if path.startswith(V1) and "post" in item]
    assert len(posts) > 30
    for template in posts:
        if template not in WITHOUT_KEY:
            answer = await post(api, re.sub(r"{\w+}", "x", template), "")
            assert answer.status_code in (400, 422) and "Idempotency-Key" in answer.text, (template, answer.text)


CREATES = {
    "/v1/vms": {},
    "/v1/sessions/session": {},
    "/v1/tokens": {"name": "t"},
    "/v1/api-keys/": {"description": "d"},
    "/v1/ssh-keys": {
        "public_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGqdW0pgUV7h8Hl9Df7U6o4e8ZfS1p2nWJtZ9m1yYd3K",
    },
    "/v1/shares": {"port": 80},
    "/v1/vms/{vm_id}/pty/sessions": {},
    "/v1/vms/{vm_id}/exec": {"command": "true"},
    "/v1/vms/{vm_id}/files/mkdir": {"path": "/a"},
    "/execute": {"code": "1", "language": "bash"},
    "/execute_async": {"code": "1", "language": "bash"},
}


@pytest.mark.parametrize("path", CREATES)
async def test_each_create_is_carried_out_once(api: Any, path: str) -> None:
    vm = (await api.client.post("/v1/vms", json={})).json()
    body = {**CREATES[path], **({"vm_id": vm["vm_id"]} if path in ("/v1/shares", "/execute", "/execute_async") else {})}
    first = await post(api, path.format(**vm), "once", **body)
    assert first.status_code < 300, first.text
    again = await post(api, path.format(**vm), "once", **body)
    assert (again.status_code, again.content) == (first.status_code, first.content)
    assert again.headers["idempotency-replayed"] == "true"


async def test_what_was_done_is_not_done_again_for_want_of_its_answer(
    api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("innkeeper.api.once.ANSWER_BYTES_MAX", 10)
    assert (await post(api, "/v1/tokens", "k", name="t")).status_code == 201
    assert (await post(api, "/v1/tokens", "k", name="t")).status_code == 409
    assert sum(token["name"] == "t" for token in (await api.client.get("/v1/tokens")).json()) == 1


async def test_what_came_to_nothing_may_be_tried_again(api: Any) -> None:
    api.world.host.ensure_error = UnavailableError("full")
    assert (await post(api, "/v1/vms", "k")).status_code == 503
    assert (await post(api, "/v1/vms", "k", memory_mb=1)).status_code == 422
    api.world.host.ensure_error = None
    assert (await post(api, "/v1/vms", "k", memory_mb=512)).status_code == 200


async def test_who_waited_in_vain_finds_the_vm_that_was_begun(api: Any) -> None:
    control = api.world.control
    control.settings = control.settings.model_copy(update={"room_wait_seconds": 0.2})
    api.world.host.hold.clear()
    assert (await post(api, "/v1/vms", "k", metadata={"a": 1})).status_code == 504
    api.world.host.hold.set()
    control.settings = control.settings.model_copy(update={"room_wait_seconds": 30})
    again = await post(api, "/v1/vms", "k", metadata={"a": 1})
    assert again.status_code == 200 and api.world.host.count(EnsureMachine) == 1
    assert [vm["vm_id"] for vm in (await api.client.get("/v1/vms")).json()] == [again.json()["vm_id"]]


async def cut_short(api: Any) -> None:
    """As if the process had been killed before it could note the answer."""
    text = "update idempotency_keys set status = null, answer_sealed = null"
    await api.world.control.database.write(lambda connection: connection.exec_driver_sql(text))


async def test_a_vm_and_a_session_of_an_attempt_that_was_cut_short_are_found(api: Any) -> None:
    vm = await post(api, "/v1/vms", "k", env={"A": "b"})
    session = await post(api, "/v1/sessions/session", "s", memory_mb=512)
    await cut_short(api)
    assert (await post(api, "/v1/vms", "k", env={"A": "b"})).json()["vm_id"] == vm.json()["vm_id"]
    assert (await post(api, "/v1/sessions/session", "s", memory_mb=512)).json() == session.json()


async def test_a_share_of_an_attempt_that_was_cut_short_is_found(api: Any) -> None:
    made = await post(api, "/v1/vms", "k", share={"port": 80, "is_public": True})
    await cut_short(api)
    again = await post(api, "/v1/vms", "k", share={"port": 80, "is_public": True})
    assert again.json()["share"] == made.json()["share"]
    assert [one["share_id"] for one in (await api.client.get("/v1/shares")).json()] == [
        made.json()["share"]["share_id"]
    ]
    # Another key is another wish.
    other = await post(api, "/v1/vms", "l", session_id=made.json()["session_id"], share={"port": 80})
    assert other.json()["share"]["share_id"] != made.json()["share"]["share_id"]


async def test_a_key_is_free_again_after_a_day(api: Any) -> None:
    control = api.world.control
    assert (await post(api, "/v1/tokens", "old", name="a")).status_code == 201
    begun = (datetime.now(UTC) - timedelta(days=1, minutes=1)).strftime("%Y-%m-%d %H:%M:%S.%f")
    await control.database.write(
        lambda connection: connection.exec_driver_sql("update idempotency_keys set created_at = ?", (begun,))
    )
    assert (await post(api, "/v1/tokens", "new", name="b")).status_code == 201
    await retention.forget(control)
    assert (await post(api, "/v1/tokens", "old", name="c")).status_code == 201
    assert (await post(api, "/v1/tokens", "new", name="c")).status_code == 400


async def test_what_cannot_be_found_again_is_not_done_twice(api: Any) -> None:
    made = await post(api, "/v1/tokens", "k", name="t")
    assert (await post(api, "/v1/tokens", "k", name="t")).json() == made.json()
    # The answer holds a token, so it is kept sealed.
    rows = await api.world.control.database.read(
        lambda connection: connection.exec_driver_sql("select * from idempotency_keys").all()
    )
    assert made.json()["token"] not in repr(rows)
    await cut_short(api)
    refused = await post(api, "/v1/tokens", "k", name="t")
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")


async def test_keys_are_an_organizations_own(api: Any) -> None:
    mine = await post(api, "/v1/vms", "k")
    from innkeeper.control import tokens

    stranger = await api.world.stranger()
    theirs = (await tokens.create(api.world.control, stranger, "t")).text
    headers = {"Authorization": f"Bearer {theirs}", "Idempotency-Key": "k"}
    async with api.anonymous() as client:
        answer = await client.post("/v1/vms", json={}, headers=headers)
        again = await client.post("/v1/vms", json={}, headers=headers)
    assert answer.status_code == 200 and answer.json()["vm_id"] != mine.json()["vm_id"]
    assert again.content == answer.content and again.headers["idempotency-replayed"] == "true"


async def test_another_token_of_the_organization_does_not_get_the_answer(api: Any) -> None:
    made = await post(api, "/v1/tokens", "k", name="t")
    lesser = (await api.client.post("/v1/tokens", json={"name": "lesser", "scopes": ["rooms"]})).json()["token"]
    headers = {"Authorization": f"Bearer {lesser}", "Idempotency-Key": "k"}
    async with api.anonymous() as client:
        refused = await client.post("/v1/tokens", json={"name": "t"}, headers=headers)
    # Told of the key, it may know that there is one: never what was answered, which here is a token.
    assert refused.status_code == 400 and "another request" in refused.text
    assert made.json()["token"] not in refused.text
    assert (await post(api, "/v1/tokens", "k", name="t")).json() == made.json()
