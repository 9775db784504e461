"""What the operator asks of the server's own processes: where they spend time and memory, what they wait for, how much they log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

import structlog

from innkeeper.control.access import require
from innkeeper.core.host_verbs import Diagnose, DiagnoseGuest, SetLogLevel, to_wire
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import InstanceNotFoundError, InvalidRequestError, UnavailableError
from innkeeper.log_setup import LEVELS

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

HOST_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class ProcessLevel:
    """From which level on a process logs; `host_id` None is the API process."""

    host_id: UUID | None
    level: str


async def look_into(
    control: Control, principal: Principal, host_id: UUID | None, kind: str, *, seconds: float
) -> dict[str, Any]:
    """What `Diagnosis.ask` says of a host's daemon, or of the API process without a host. Only the operator may.

    Raises:
        InvalidRequestError, ConflictError: see there. UnavailableError: the host cannot be asked.

    """
    require(principal, Scope.ADMIN)
    log.warning("the operator looks into a process", kind=kind, seconds=seconds, host_id=host_id and str(host_id))
    if host_id is None:
        return await control.diagnosis.ask(kind, seconds=seconds)
    verb = Diagnose(kind, seconds)
    return await control.bus.request(host_id, verb.verb, to_wire(verb), timeout_seconds=seconds + HOST_SECONDS)


async def look_into_guest(control: Control, principal: Principal, instance_id: UUID) -> dict[str, Any]:
    """`{"text"}`: where the goroutines of the agent in an instance's guest are, as the guest says. Only the operator may.

    Raises:
        InstanceNotFoundError: no such instance, or it has no machine now. UnavailableError, GuestError.

    """
    require(principal, Scope.ADMIN)
    entry = control.live.by_public_id(instance_id) or control.live.by_instance(instance_id)
    if entry is None or entry.instance.host_id is None:
        raise InstanceNotFoundError
    log.warning("the operator looks into a guest's agent", instance=str(entry.instance.id))
    verb = DiagnoseGuest(entry.instance.id)
    return await control.bus.request(entry.instance.host_id, verb.verb, to_wire(verb), timeout_seconds=HOST_SECONDS)


async def log_levels(control: Control, principal: Principal, *, level: str | None = None) -> list[ProcessLevel]:
    """The level of every process that can be reached, after it was set to `level`, if one is given. Only the operator may."""
    require(principal, Scope.ADMIN)
    if level is not None:
        if level not in LEVELS:
            raise InvalidRequestError(f"level: one of {', '.join(LEVELS)}")
        log.warning("the log level changes", to=level)
        control.log_level.set(level)
    found = [ProcessLevel(None, control.log_level.name)]
    for host_id in control.bus.hosts():
        verb = SetLogLevel(level)
        try:
            answer = await control.bus.request(host_id, verb.verb, to_wire(verb), timeout_seconds=HOST_SECONDS)
        except UnavailableError as error:
            log.warning("a host's log level is not known", host_id=str(host_id), reason=error.message)
        else:
            found.append(ProcessLevel(host_id, str(answer["level"])))
    return found
