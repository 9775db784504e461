"""`/api/tokens` field by field, as Gentity documents it: minted and shown once, listed, revoked; errors in its words."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

import pytest

from innkeeper.core.token import Scope

pytestmark = pytest.mark.anyio

RECORD = {"id", "name", "prefix", "createdAt", "lastUsedAt"}


async def mint(api: Any, name: str = "laptop") -> dict[str, Any]:
    answer = await api.client.post("/api/tokens", json={"name": name})
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


def bearer(made: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {made['token']}"}


async def test_one_is_shown_once_and_works(api: Any) -> None:
    made = await mint(api)
    assert made.keys() == {"token", "record"} and made["record"].keys() == RECORD
    assert re.fullmatch(r"gn_live_[A-Za-z0-9_-]{43}", made["token"])
    record = made["record"]
    assert (record["name"], record["prefix"], record["lastUsedAt"]) == ("laptop", made["token"][:16], None)
    assert datetime.fromisoformat(record["createdAt"]).tzinfo is not None
    async with api.anonymous() as client:
        listed = await client.get("/api/tokens", headers=bearer(made))
        # A token is a token: those of other products see the same.
        assert (await client.get("/api/profiles", headers=bearer(made))).status_code == 200
    assert listed.status_code == 200 and made["token"] not in listed.text
    (mine,) = [row for row in listed.json()["tokens"] if row["id"] == record["id"]]
    assert mine.keys() == RECORD and {**mine, "lastUsedAt": None} == record


async def test_one_that_is_revoked_is_listed_no_more_and_opens_nothing(api: Any) -> None:
    made, stays = await mint(api), await mint(api, "stays")
    for _ in range(2):
        answer = await api.client.delete(f"/api/tokens/{made['record']['id']}")
        assert (answer.status_code, answer.json()) == (200, {"ok": True})
    names = [row["name"] for row in (await api.client.get("/api/tokens")).json()["tokens"]]
    assert "stays" in names and "laptop" not in names
    async with api.anonymous() as client:
        refused = await client.get("/api/tokens", headers=bearer(made))
        assert (refused.status_code, refused.json()) == (401, {"error": "Unauthorized"})
        assert (await client.get("/api/tokens", headers=bearer(stays))).status_code == 200


@pytest.mark.parametrize("body", [{}, {"name": ""}, {"name": 7}, {"name": "x" * 101}, {"name": "a\nb"}, {"names": "a"}])
async def test_what_is_no_name_is_refused(api: Any, body: dict[str, Any]) -> None:
    before = (await api.client.get("/api/tokens")).json()
    answer = await api.client.post("/api/tokens", json=body)
    assert answer.status_code == 400 and answer.json().keys() == {"error"}, answer.text
    assert [row["id"] for row in (await api.client.get("/api/tokens")).json()["tokens"]] == [
        row["id"] for row in before["tokens"]
    ]


@pytest.mark.parametrize("token_id", ["0190a1b2-0000-7000-8000-000000000000", "nothing"])
async def test_what_there_is_not(api: Any, token_id: str) -> None:
    answer = await api.client.delete(f"/api/tokens/{token_id}")
    assert (answer.status_code, answer.json()) == (404, {"error": "Not Found"})
    assert (await api.client.get("/api/tokens/")).json() == {"error": "Not Found"}


async def test_it_gives_no_scope_that_the_asker_has_not(api: Any) -> None:
    narrow = await api.client.post("/v1/tokens", json={"name": "narrow", "scopes": ["tokens"]})
    asker = {"Authorization": f"Bearer {narrow.json()['token']}"}
    async with api.anonymous() as client:
        made = (await client.post("/api/tokens", json={"name": "made"}, headers=asker)).json()
        assert (await client.get("/api/profiles", headers=bearer(made))).status_code == 403
    listed = (await api.client.get("/v1/tokens")).json()
    (row,) = [row for row in listed if row["id"] == made["record"]["id"]]
    assert row["scopes"] == [Scope.TOKENS.value] and row["dialect"] == "gentity"
