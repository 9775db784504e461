"""Accounts under `/v1`: users/me, usage, API keys and SSH keys, in the form of InstaVM's clients."""

from __future__ import annotations

from datetime import date
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BeforeValidator

from innkeeper.api.json_app import CurrentPrincipal
from innkeeper.api.ssh.host_key import ssh_gateway_of
from innkeeper.api.v1.account_schemas import (
    ApiKeyAnswer,
    ApiKeyCreate,
    ApiKeyCreated,
    ApiKeyUpdate,
    SshGatewayAnswer,
    SshKeyAnswer,
    SshKeyCreate,
    SshKeyList,
    StatusAnswer,
    UsageBreakdown,
    UsageDay,
    UsageSums,
    UserAnswer,
)
from innkeeper.control import account, ssh_keys, tokens, usage
from innkeeper.control.context import Control
from innkeeper.core.ssh_key import SshKey
from innkeeper.core.token import DEFAULT_SCOPES, Dialect, Token
from innkeeper.core.usage import Used

UNNAMED = "API key"


def _number(text: object) -> object:
    """A number of the organization's; 0, which is nobody's, for what is none."""
    return int(text) if isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < 11 else 0


Number = Annotated[int, BeforeValidator(_number)]


def add_account_routes(router: APIRouter, control: Control) -> None:
    """The routes; each is one use case."""

    @router.get("/v1/users/me")
    async def get_user(principal: CurrentPrincipal) -> UserAnswer:
        """Who the key stands for: its own user, else the organization's first."""
        found = await account.of_principal(control, principal)
        return UserAnswer(id=found.id, email=found.email, name=found.organization, is_verified=True)

    @router.get("/v1/users/me/usage-breakdown")
    async def get_usage(
        principal: CurrentPrincipal,
        days: Annotated[int, Query(ge=1, le=usage.DAYS_MAX)] = 30,
        start_date: date | None = None,
        end_date: date | None = None,
    ) -> UsageBreakdown:
        """What the organization's guests used, by day in UTC, up to this moment. `days` counts back from `end_date` where `start_date` is absent."""
        found = await usage.by_day(control, principal, first=start_date, last=end_date, days=days)
        whole = Used(sum(one.used.cpu_us for one in found), sum(one.used.memory_mib_seconds for one in found))
        return UsageBreakdown(
            period_start=found[0].day,
            period_end=found[-1].day,
            total_days=len(found),
            totals=_sums(control, whole),
            daily_breakdown=[UsageDay(date=one.day, **_sums(control, one.used).model_dump()) for one in found],
        )

    add_api_key_routes(router, control)
    add_ssh_key_routes(router, control)


def add_api_key_routes(router: APIRouter, control: Control) -> None:
    """API keys are the organization's tokens under their numbers."""

    @router.get("/v1/api-keys/")
    async def list_api_keys(principal: CurrentPrincipal) -> list[ApiKeyAnswer]:
        """The organization's keys that are in force, whatever form they have."""
        found = await tokens.list_tokens(control, principal)
        return [_api_key(token) for token in found if token.revoked_at is None]

    @router.post("/v1/api-keys/")
    async def create_api_key(principal: CurrentPrincipal, body: ApiKeyCreate) -> ApiKeyCreated:
        """Make a key with the usual scopes, as far as the asker has them. Its text is in this answer and nowhere else."""
        scopes = frozenset(scope for scope in DEFAULT_SCOPES if principal.allows(scope))
        name = body.description or UNNAMED
        new = await tokens.create(control, principal, name, dialect=Dialect.INSTAVM, scopes=scopes)
        return ApiKeyCreated(**_api_key(new.token).model_dump(), api_key=new.text)

    @router.get("/v1/api-keys/{key_id}")
    async def get_api_key(principal: CurrentPrincipal, key_id: Number) -> ApiKeyAnswer:
        """One key."""
        return _api_key(await tokens.by_number(control, principal, key_id))

    @router.patch("/v1/api-keys/{key_id}")
    async def update_api_key(principal: CurrentPrincipal, key_id: Number, body: ApiKeyUpdate) -> ApiKeyAnswer:
        """Describe a key anew."""
        return _api_key(await tokens.rename(control, principal, key_id, body.description))

    @router.delete("/v1/api-keys/{key_id}")
    async def delete_api_key(principal: CurrentPrincipal, key_id: Number) -> StatusAnswer:
        """Revoke a key; it stops working at once."""
        token = await tokens.by_number(control, principal, key_id)
        await tokens.revoke(control, principal, token.id)
        return StatusAnswer(status="deleted")


def add_ssh_key_routes(router: APIRouter, control: Control) -> None:
    """SSH keys let their holders in to the organization's VMs."""

    @router.get("/v1/ssh")
    async def get_ssh_gateway(principal: CurrentPrincipal) -> SshGatewayAnswer:
        """Where VMs can be reached by SSH, and the key by which the gateway is known."""
        gateway = ssh_gateway_of(control.settings)
        if gateway is None:
            return SshGatewayAnswer(enabled=False, address=None, port=None, host=None, host_key=None, fingerprint=None)
        return SshGatewayAnswer(
            enabled=True,
            address=gateway.address,
            port=gateway.port,
            host=gateway.host,
            host_key=gateway.host_key,
            fingerprint=gateway.fingerprint,
        )

    @router.get("/v1/ssh-keys")
    async def list_ssh_keys(principal: CurrentPrincipal) -> SshKeyList:
        """The organization's keys, oldest first."""
        return SshKeyList(keys=[_ssh_key(key) for key in await ssh_keys.list_keys(control, principal)])

    @router.post("/v1/ssh-keys")
    async def add_ssh_key(principal: CurrentPrincipal, body: SshKeyCreate) -> SshKeyAnswer:
        """Keep a public key. One that is there already is answered as it is."""
        return _ssh_key(await ssh_keys.add(control, principal, body.public_key))

    @router.delete("/v1/ssh-keys/{ssh_key_id}")
    async def delete_ssh_key(principal: CurrentPrincipal, ssh_key_id: Number) -> StatusAnswer:
        """Forget a key; the SSH connections that stand on it end."""
        await ssh_keys.remove(control, principal, ssh_key_id)
        return StatusAnswer(status="deleted")


def _sums(control: Control, used: Used) -> UsageSums:
    cpu_hours = used.cpu_us / 3.6e9
    ram_gib_hours = used.memory_mib_seconds / 1024 / 3600
    settings = control.settings
    cost = cpu_hours * settings.price_cpu_hour + ram_gib_hours * settings.price_memory_gib_hour
    return UsageSums(cost_dollars=round(cost, 6), cpu_hours=round(cpu_hours, 9), ram_gib_hours=round(ram_gib_hours, 9))


def _api_key(token: Token) -> ApiKeyAnswer:
    return ApiKeyAnswer(
        id=token.number,
        description=token.name,
        prefix=token.prefix,
        is_active=token.revoked_at is None,
        created_at=token.created_at,
        last_used_at=token.last_used_at,
    )


def _ssh_key(key: SshKey) -> SshKeyAnswer:
    return SshKeyAnswer(
        id=key.number,
        fingerprint=key.fingerprint,
        comment=key.comment,
        public_key=key.public_key,
        created_at=key.created_at,
    )
