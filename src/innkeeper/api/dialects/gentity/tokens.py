"""Tokens, as Gentity's clients mint, list and revoke them."""

from __future__ import annotations

from fastapi import APIRouter

from innkeeper.api.dialects.gentity.schemas import Done, TokenList, TokenMinted, TokenRecord, TokenRequest
from innkeeper.api.json_app import CurrentPrincipal
from innkeeper.control import tokens
from innkeeper.control.context import Control
from innkeeper.core.token import DEFAULT_SCOPES, Dialect, Token
from innkeeper.errors import NotFoundError
from innkeeper.ids import parse_uuid

PREFIX = b"/api/tokens"


def build_router(control: Control) -> APIRouter:
    """The routes; each is one use case."""
    router = APIRouter(tags=["gentity tokens"])

    @router.get("/api/tokens", response_model_by_alias=True)
    async def list_gentity_tokens(principal: CurrentPrincipal) -> TokenList:
        """The organization's tokens that are valid, in whichever product's form they are."""
        found = await tokens.list_tokens(control, principal)
        return TokenList(tokens=[_record(token) for token in found if token.revoked_at is None])

    @router.post("/api/tokens", response_model_by_alias=True)
    async def mint_gentity_token(principal: CurrentPrincipal, body: TokenRequest) -> TokenMinted:
        """Make a token with the usual scopes, as far as the asker has them. Its text is in this answer and nowhere else."""
        scopes = frozenset(scope for scope in DEFAULT_SCOPES if principal.allows(scope))
        new = await tokens.create(control, principal, body.name, dialect=Dialect.GENTITY, scopes=scopes)
        return TokenMinted(token=new.text, record=_record(new.token))

    @router.delete("/api/tokens/{token_id}")
    async def revoke_gentity_token(principal: CurrentPrincipal, token_id: str) -> Done:
        """End a token. What it has under way ends with it. Revoking again changes nothing."""
        found = parse_uuid(token_id)
        if found is None:
            tokens.check_may_create(principal)
            raise NotFoundError("Token not found")
        await tokens.revoke(control, principal, found)
        return Done()

    return router


def _record(token: Token) -> TokenRecord:
    return TokenRecord(
        id=str(token.id),
        name=token.name,
        prefix=token.prefix,
        created_at=token.created_at,
        last_used_at=token.last_used_at,
    )
