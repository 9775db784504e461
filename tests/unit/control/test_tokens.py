"""Tokens and organizations: authentication, its cache, revocation, scopes."""

from __future__ import annotations

import re
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa

from innkeeper.control import organizations, tokens
from innkeeper.control.token_cache import TokenCache
from innkeeper.core.token import DEFAULT_SCOPES, Dialect, Scope
from innkeeper.errors import ConflictError, ForbiddenError, NotFoundError, UnauthorizedError
from innkeeper.store import tables
from innkeeper.store import tokens as store

pytestmark = pytest.mark.anyio
World = Any


async def test_the_first_token(world: World) -> None:
    assert re.fullmatch(r"rk_live_[0-9a-f]{32}", world.first_token)
    principal = await tokens.authenticate(world.control, world.first_token)
    assert principal.scopes == DEFAULT_SCOPES
    assert principal.organization_id == world.control.default_organization_id
    assert await organizations.bootstrap(world.control) is None
    assert [p.name for p in await organizations.list_organizations(world.control, world.operator)] == ["default"]


async def test_no_token_text_is_stored(world: World) -> None:
    new = await tokens.create(world.control, world.me, "ci")

    def everything(connection: sa.Connection) -> str:
        return str(
            [tuple(row) for table in tables.metadata.sorted_tables for row in connection.execute(sa.select(table))]
        )

    stored = await world.control.database.read(everything)
    assert new.token.prefix in stored
    assert new.text not in stored
    assert world.first_token not in stored
    assert new.text not in repr(new)


@pytest.mark.parametrize("dialect", list(Dialect))
async def test_create_authenticate_revoke(world: World, dialect: Dialect) -> None:
    new = await tokens.create(world.control, world.me, "ci", dialect=dialect, scopes=frozenset({Scope.ROOMS}))
    principal = await tokens.authenticate(world.control, new.text)
    assert (principal.token_id, principal.scopes) == (new.token.id, {Scope.ROOMS})
    revoked = await tokens.revoke(world.control, world.me, new.token.id)
    assert revoked.revoked_at is not None
    with pytest.raises(UnauthorizedError):
        await tokens.authenticate(world.control, new.text)
    again = await tokens.revoke(world.control, world.me, new.token.id)
    assert again.revoked_at == revoked.revoked_at


@pytest.mark.parametrize("text", ["", "rk_live_" + "0" * 32, "x" * 10_000, "\ud800", "é"])
async def test_unknown_tokens(world: World, text: str) -> None:
    with pytest.raises(UnauthorizedError):
        await tokens.authenticate(world.control, text)


async def test_the_cache_spares_the_database_and_ends(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    read = world.control.database.read

    async def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal reads
        reads += args[0] is store.by_digest
        return await read(*args, **kwargs)

    now = 100.0
    monkeypatch.setattr(world.control.database, "read", counted)
    monkeypatch.setattr(world.control, "tokens", TokenCache(lambda: now))
    for _ in range(5):
        await tokens.authenticate(world.control, world.first_token)
    assert reads == 1
    now += 31
    await tokens.authenticate(world.control, world.first_token)
    assert reads == 2


async def test_a_look_up_during_a_revocation_is_not_kept(world: World) -> None:
    new = await tokens.create(world.control, world.me, "ci")
    generation = world.control.tokens.generation
    principal = await tokens.authenticate(world.control, new.text)
    await tokens.revoke(world.control, world.me, new.token.id)
    world.control.tokens.put(tokens.token_digest(new.text), principal, generation=generation)
    with pytest.raises(UnauthorizedError):
        await tokens.authenticate(world.control, new.text)


async def test_last_use_is_written_behind(world: World) -> None:
    await tokens.authenticate(world.control, world.first_token)
    await world.control.later.flush(world.control)
    (first,) = await tokens.list_tokens(world.control, world.me)
    assert first.last_used_at is not None


async def test_nobody_gives_what_they_lack(world: World) -> None:
    with pytest.raises(ForbiddenError, match="'admin'"):
        await tokens.create(world.control, world.me, "up", scopes=frozenset({Scope.ADMIN}))
    new = await tokens.create(world.control, world.operator, "up", scopes=frozenset({Scope.ADMIN}))
    assert (await tokens.authenticate(world.control, new.text)).allows(Scope.ROOMS)
    weak = await tokens.create(world.control, world.me, "weak", scopes=frozenset({Scope.ROOMS}))
    principal = await tokens.authenticate(world.control, weak.text)
    for call in (
        tokens.create(world.control, principal, "x"),
        tokens.list_tokens(world.control, principal),
        tokens.revoke(world.control, principal, new.token.id),
        organizations.create(world.control, principal, "x"),
        organizations.list_organizations(world.control, world.me),
    ):
        with pytest.raises(ForbiddenError):
            await call


async def test_another_organization_sees_nothing(world: World) -> None:
    new = await tokens.create(world.control, world.me, "ci")
    stranger = await world.stranger()
    assert await tokens.list_tokens(world.control, stranger) == []
    for token_id in (new.token.id, uuid4()):
        with pytest.raises(NotFoundError):
            await tokens.revoke(world.control, stranger, token_id)
    await tokens.authenticate(world.control, new.text)


async def test_an_organization_has_its_own_profiles(world: World) -> None:
    stranger = await world.stranger()
    ids = {world.profile_id(name, of=who) for name in organizations.FIRST_PROFILES for who in (world.me, stranger)}
    assert len(ids) == 6
    with pytest.raises(ConflictError):
        await organizations.create(world.control, world.operator, "default")
