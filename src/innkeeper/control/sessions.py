"""Sessions: a client's handles that get a VM on first use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import sqlalchemy as sa

from innkeeper.control import audit, clock, lifecycle, session_vm, vms
from innkeeper.control.access import require
from innkeeper.control.vm_entry import VmEntry, VmView
from innkeeper.core.token import Principal, Scope
from innkeeper.core.vm import Session, VmRequest
from innkeeper.errors import SessionNotFoundError
from innkeeper.store import audit_events
from innkeeper.store import sessions as store
from innkeeper.store import vms as vm_store

if TYPE_CHECKING:
    from innkeeper.control.context import Control

SANDBOXES_MAX = 1_000


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session and the VM that it had last, if it had any."""

    session: Session
    vm: VmView | None


async def create(
    control: Control, principal: Principal, request: VmRequest, *, session_id: UUID | None = None
) -> SessionView:
    """A new session, or the one that an earlier attempt made under `session_id`. Its VM is made on first use; with variables at once.

    Raises:
        InvalidRequestError, ForbiddenError: as `session_vm.create`.
        NoHostError, UnavailableError, RateLimitedError: of the VM that is made at once; there is no session then.

    """
    require(principal, Scope.ROOMS)
    if request.env:
        view = await session_vm.create(control, principal, request, new_session=session_id, wait=False)
        return await find(control, principal, view.vm.session_id)
    vms.check(control, principal, request)
    if session_id is not None and await control.database.read(store.get, session_id) is not None:
        return await find(control, principal, session_id)
    session = Session(session_id or uuid4(), principal.organization_id, clock.now(), request)

    def insert(connection: sa.Connection) -> None:
        store.insert(connection, session)
        audit_events.insert(connection, audit.event(principal, "session.create", "session", session.id))

    await control.database.write(insert)
    return SessionView(session, None)


async def ready_entry(control: Control, principal: Principal, session_id: UUID) -> VmEntry:
    """The session's VM, ready; a new one where the last has ended. The hot path of every execution.

    Raises:
        SessionNotFoundError: also for another organization's.
        And what `session_vm.create` raises.

    """
    entry = control.live.find((session_id, ""))
    if (
        isinstance(entry, VmEntry)
        and entry.ready
        and not lifecycle.ends(control, entry)
        and entry.instance.organization_id == principal.organization_id
        and principal.allows(Scope.ROOMS)
    ):
        lifecycle.use(control, entry)
        return entry
    return await session_vm.for_session(control, principal, await load(control, principal, session_id))


async def existing_entry(control: Control, principal: Principal, session_id: UUID) -> VmEntry | None:
    """The entry of the session's living VM in whatever state, or None. Raises SessionNotFoundError."""
    await load(control, principal, session_id)
    entry = control.live.find((session_id, ""))
    return entry if isinstance(entry, VmEntry) and not lifecycle.ends(control, entry) else None


async def load(control: Control, principal: Principal, session_id: UUID) -> Session:
    """The stored session. Raises SessionNotFoundError, also for another organization's."""
    require(principal, Scope.ROOMS)
    session: Session | None = await control.database.read(store.get, session_id)
    if session is None or session.organization_id != principal.organization_id:
        raise SessionNotFoundError
    return session


async def find(control: Control, principal: Principal, session_id: UUID) -> SessionView:
    """The session with its last VM. Raises SessionNotFoundError."""
    session = await load(control, principal, session_id)
    entry = control.live.find((session_id, ""))
    if isinstance(entry, VmEntry):
        return SessionView(session, entry.view)
    found = await control.database.read(vm_store.newest_of_session, session_id)
    return SessionView(session, None if found is None else vms.shown(control, *found))


async def kill(control: Control, principal: Principal, session_id: UUID) -> SessionView:
    """End the session's VM; answers when its guest is gone. Raises SessionNotFoundError, also where no VM lives."""
    await load(control, principal, session_id)
    entry = control.live.find((session_id, ""))
    if entry is None or entry.doomed:
        raise SessionNotFoundError("The session has no VM that lives")
    await lifecycle.destroy(control, principal, entry, verb="kill", reason="killed")
    return await find(control, principal, session_id)


async def sandboxes(control: Control, principal: Principal, metadata: dict[str, Any], *, limit: int) -> list[VmView]:
    """The organization's living VMs whose metadata has all of `metadata`, newest first."""
    found = await vms.list_vms(control, principal, living_only=True, limit=vms.PAGE_MAX)
    return [view for view in found if _matches(view.vm.metadata, metadata)][:limit]


def _matches(has: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(name in has and has[name] == value for name, value in wanted.items())
