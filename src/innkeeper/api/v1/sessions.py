"""Sessions under `/v1/sessions`, and `/kill`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query

from innkeeper.api.json_app import CurrentPrincipal
from innkeeper.api.once import OnceId
from innkeeper.api.v1.vm_schemas import (
    Killed,
    SessionAnswer,
    SessionCreate,
    SessionKill,
    SessionStatus,
    SessionUsage,
    VmRecord,
)
from innkeeper.api.v1.vms import request_of, session_id, vm_record
from innkeeper.control import sessions
from innkeeper.control.context import Control
from innkeeper.control.sessions import SessionView
from innkeeper.control.vm_entry import VmView
from innkeeper.core.vm import show_status
from innkeeper.errors import InvalidRequestError

CREATE_PATH = "/v1/sessions/session"


def add_session_routes(router: APIRouter, control: Control) -> None:
    """Add the routes; each is one use case."""

    @router.post(CREATE_PATH)
    async def create_session(principal: CurrentPrincipal, body: SessionCreate, once: OnceId) -> SessionAnswer:
        """Make a session. It gets its VM on first use; with `env` at once."""
        return _answer(await sessions.create(control, principal, request_of(body), session_id=once))

    @router.get("/v1/sessions/session/{session}")
    async def get_session(principal: CurrentPrincipal, session: str) -> SessionAnswer:
        """One session."""
        return _answer(await sessions.find(control, principal, session_id(session)))

    @router.get("/v1/sessions/status/{session}")
    async def session_status(principal: CurrentPrincipal, session: str) -> SessionStatus:
        """A session and the VM that it had last."""
        view = await sessions.find(control, principal, session_id(session))
        vm = view.vm
        status = None if vm is None else show_status(vm.instance)
        return SessionStatus(
            session_id=str(view.session.id),
            exists=True,
            vm_assigned=vm is not None,
            vm_alive=status == "active",
            vm_status=status,
            vm_id=None if vm is None else vm.vm.vm_id,
            uptime_seconds=_uptime(vm),
            expires_in_seconds=None if vm is None else _left(vm),
            created_at=view.session.created_at,
        )

    @router.get("/v1/sessions/usage/{session}")
    async def session_usage(principal: CurrentPrincipal, session: str) -> SessionUsage:
        """What the session's living VM is made of."""
        view = await sessions.find(control, principal, session_id(session))
        vm = None if view.vm is None or show_status(view.vm.instance) == "killed" else view.vm
        return SessionUsage(
            session_id=str(view.session.id),
            vm_id=None if vm is None else vm.vm.vm_id,
            vcpu_count=0 if vm is None else vm.instance.vcpu_count,
            memory_mb=0 if vm is None else vm.instance.memory_mb,
            disk_mb=0 if vm is None else vm.instance.disk_mb,
            uptime_seconds=_uptime(vm) or 0.0,
        )

    @router.get("/v1/sessions/sandboxes")
    async def list_sandboxes(
        principal: CurrentPrincipal,
        metadata: Annotated[str | None, Query(max_length=16_384)] = None,
        limit: Annotated[int, Query(ge=1, le=sessions.SANDBOXES_MAX)] = 100,
    ) -> list[VmRecord]:
        """The VMs that live and whose metadata has all that the JSON object `metadata` has, newest first."""
        found = await sessions.sandboxes(control, principal, _filter(metadata), limit=limit)
        return [vm_record(control, view) for view in found]

    @router.post("/kill")
    async def kill(principal: CurrentPrincipal, body: SessionKill) -> Killed:
        """End a session's VM; answers when its guest is gone. 404 `session_not_found` where none lives."""
        view = await sessions.kill(control, principal, session_id(body.session_id))
        return Killed(status="killed", session_id=body.session_id, vm_id=None if view.vm is None else view.vm.vm.vm_id)


def _filter(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidRequestError("metadata: must be a JSON object")
    return value


def _answer(view: SessionView) -> SessionAnswer:
    return SessionAnswer(
        session_id=str(view.session.id),
        created_at=view.session.created_at,
        vm_id=None if view.vm is None else view.vm.vm.vm_id,
        status=None if view.vm is None else show_status(view.vm.instance),
    )


def _uptime(view: VmView | None) -> float | None:
    if view is None:
        return None
    end = view.vm.ended_at or datetime.now(UTC)
    return max(0.0, (end - view.instance.created_at).total_seconds())


def _left(view: VmView) -> float:
    if show_status(view.instance) == "killed":
        return 0.0
    return max(0.0, (view.vm.expires_at - datetime.now(UTC)).total_seconds())
