"""Shares under `/v1/shares`, and what else leads to a VM's ports."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request

from innkeeper.api.json_app import CurrentPrincipal
from innkeeper.api.port_proxy.credentials import LINK_PARAMETER
from innkeeper.api.v1.share_form import share_answer
from innkeeper.api.v1.share_schemas import (
    AppUrl,
    LinkAnswer,
    LinkCreate,
    PortAnswer,
    ShareAnswer,
    ShareChange,
    ShareCreate,
)
from innkeeper.api.v1.vms import session_id
from innkeeper.control import ports, sessions, shares, vms
from innkeeper.control.context import Control
from innkeeper.control.vm_entry import VmEntry
from innkeeper.core.share import LINK_SECONDS_MAX, Share
from innkeeper.core.token import Principal
from innkeeper.core.vm import show_status
from innkeeper.errors import InvalidRequestError, SessionNotFoundError, ShareNotFoundError
from innkeeper.ids import parse_uuid

APP_PREFIX = "/v1/app/"


def add_share_routes(router: APIRouter, control: Control) -> None:
    """Add the routes; each is one use case."""

    @router.post("/v1/shares")
    async def create_share(principal: CurrentPrincipal, body: ShareCreate) -> ShareAnswer:
        """Publish a port of a VM under a host name of its own. It ends with the VM."""
        entry = await _entry(control, principal, body)
        return share_answer(
            control, entry, await shares.create(control, principal, entry, body.port, is_public=body.is_public)
        )

    @router.get("/v1/shares")
    async def list_shares(principal: CurrentPrincipal, vm_id: str | None = None) -> list[ShareAnswer]:
        """The organization's shares, or those of one VM, oldest first."""
        entry = None if vm_id is None else await vms.existing_entry(control, principal, vm_id)
        found = await shares.list_shares(control, principal, entry)
        return [share_answer(control, owner, one) for one in found if (owner := _owner(control, one)) is not None]

    @router.get("/v1/shares/{share_id}")
    async def get_share(principal: CurrentPrincipal, share_id: str) -> ShareAnswer:
        """One share."""
        return _answer(control, await shares.get(control, principal, _share_id(share_id)))

    @router.patch("/v1/shares/{share_id}")
    async def change_share(principal: CurrentPrincipal, share_id: str, body: ShareChange) -> ShareAnswer:
        """Make a share public or private, or take it away."""
        if (body.is_public is None) == (body.revoke is None):
            raise InvalidRequestError("is_public: either this or `revoke` is required")
        if body.is_public is None:
            return await _revoke(principal, share_id)
        share = await shares.set_public(control, principal, _share_id(share_id), is_public=body.is_public)
        return _answer(control, share)

    @router.delete("/v1/shares/{share_id}")
    async def revoke_share(principal: CurrentPrincipal, share_id: str) -> ShareAnswer:
        """Take a share away: its name leads nowhere from now on, and its links are void."""
        return await _revoke(principal, share_id)

    async def _revoke(principal: Principal, share_id: str) -> ShareAnswer:
        answer = _answer(control, await shares.get(control, principal, _share_id(share_id)))
        await shares.revoke(control, principal, _share_id(share_id))
        return answer.model_copy(update={"status": "revoked"})

    @router.post("/v1/shares/{share_id}/link")
    async def make_link(principal: CurrentPrincipal, share_id: str, body: LinkCreate) -> LinkAnswer:
        """A link that opens a private share to whoever has it, for so long."""
        link = await shares.make_link(control, principal, _share_id(share_id), seconds=body.expires_in_seconds)
        return LinkAnswer(
            url=_signed(shares.share_url(control, link.share.name), link.signature),
            expires_at=datetime.fromtimestamp(link.expires_at, UTC),
        )

    @router.get("/v1/sessions/app-url/{session}")
    async def app_url(
        principal: CurrentPrincipal,
        session: str,
        request: Request,
        port: Annotated[int, Query(ge=1, le=65_535)] = 80,
    ) -> AppUrl:
        """Where a port of the session's VM is found without a share. 404 `session_not_found` where no VM lives."""
        entry = await sessions.existing_entry(control, principal, session_id(session))
        if entry is None:
            raise SessionNotFoundError("The session has no VM that lives")
        left = max(1, int((entry.vm.expires_at - datetime.now(UTC)).total_seconds()))
        target = shares.own_target(entry, port)
        seconds = min(left, LINK_SECONDS_MAX)
        direct = shares.share_url(control, shares.own_name(entry, port))
        below = f"{str(request.base_url).rstrip('/')}{APP_PREFIX}{entry.vm.session_id}/{port}/"
        return AppUrl(
            url=below,
            app_url=below,
            direct_url=direct,
            link_url=_signed(direct, shares.sign_target(control, target, seconds=seconds)),
            port=port,
            vm_id=entry.vm.vm_id,
            session_id=str(entry.vm.session_id),
            status=show_status(entry.instance),
            expires_in_seconds=seconds,
        )

    @router.get("/v1/vms/{vm_id}/ports")
    async def list_ports(principal: CurrentPrincipal, vm_id: str) -> list[PortAnswer]:
        """The TCP ports that something in the VM listens on, which is woken where it sleeps."""
        entry = await vms.ready_entry(control, principal, vm_id)
        return [PortAnswer(**asdict(one)) for one in await ports.list_listening(control, principal, entry)]


def _answer(control: Control, share: Share) -> ShareAnswer:
    owner = _owner(control, share)
    if owner is None:
        raise ShareNotFoundError
    return share_answer(control, owner, share)


def _owner(control: Control, share: Share) -> VmEntry | None:
    entry = control.live.by_instance(share.instance_id)
    return entry if isinstance(entry, VmEntry) else None


def _signed(url: str, signature: str) -> str:
    return f"{url}?{LINK_PARAMETER}={signature}"


async def _entry(control: Control, principal: Principal, body: ShareCreate) -> VmEntry:
    if body.vm_id is not None:
        return await vms.existing_entry(control, principal, body.vm_id)
    if body.session_id is None:
        raise InvalidRequestError("vm_id: either this or `session_id` is required")
    entry = await sessions.existing_entry(control, principal, session_id(body.session_id))
    if entry is None:
        raise SessionNotFoundError("The session has no VM that lives")
    return entry


def _share_id(text: str) -> UUID:
    value = parse_uuid(text)
    if value is None:
        raise ShareNotFoundError
    return value
