"""Writes that no request waits for: states that a restart would find out anyhow, times of last use, audit events of commands.

They go to the database together, within moments. A killed process loses at most those moments: the reconciler finds the
states out again by asking the hosts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa
import structlog

from innkeeper.core.event import AuditEvent
from innkeeper.core.execution import ExecutionRow
from innkeeper.core.instance import Instance
from innkeeper.core.vm import VmEvent
from innkeeper.errors import UnavailableError
from innkeeper.store import audit_events, executions, instances, leases, tokens, vms
from innkeeper.store.tables import instances as instances_table

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

FLUSH_SECONDS = 2.0
HINT_AT_EVENTS = 500
KEPT_EVENTS = 10_000


class WriteBehind:
    """What is still to be written."""

    def __init__(self) -> None:
        self._states: list[tuple[Instance, UUID | None]] = []
        self._events: list[AuditEvent] = []
        self._vm_events: list[VmEvent] = []
        self._executions: list[ExecutionRow] = []
        self._token_use: dict[UUID, datetime] = {}
        self._lock = asyncio.Lock()
        self._writing: set[asyncio.Task[None]] = set()
        self.hint = asyncio.Event()

    def state(self, instance: Instance, lease: UUID | None) -> None:
        """Store an instance's state soon: under its lease, which is given back with it, or without one if the row is older."""
        self._states.append((instance, lease))
        self.hint.set()

    def audit(self, event: AuditEvent) -> None:
        """Append an audit event soon."""
        self._events.append(event)
        if len(self._events) >= HINT_AT_EVENTS:
            self.hint.set()

    def vm_event(self, event: VmEvent) -> None:
        """Append to what happened to a VM soon."""
        self._vm_events.append(event)
        self.hint.set()

    def execution(self, row: ExecutionRow) -> None:
        """Store soon that an execution was begun."""
        self._executions.append(row)
        self.hint.set()

    def token_used(self, token_id: UUID, at: datetime) -> None:
        """Note a token's use soon."""
        self._token_use[token_id] = at

    def pending(self) -> dict[str, float]:
        """How much waits to be written, by kind."""
        events = len(self._events) + len(self._vm_events)
        return {
            "states": len(self._states),
            "events": events,
            "executions": len(self._executions),
            "token_use": len(self._token_use),
        }

    async def flush(self, control: Control) -> None:
        """Write all of it now. Who is cancelled while it waits, as at the server's end, takes nothing with it: the next flush waits for this one."""
        writing = asyncio.create_task(self._write(control))
        self._writing.add(writing)
        writing.add_done_callback(self._writing.discard)
        await asyncio.shield(writing)

    async def _write(self, control: Control) -> None:
        async with self._lock:
            states, self._states = self._states, []
            events, self._events = self._events, []
            vm_events, self._vm_events = self._vm_events, []
            rows, self._executions = self._executions, []
            token_use, self._token_use = self._token_use, {}
            active = control.live.take_touched()
            if not (states or events or vm_events or rows or token_use or active):
                return
            for write, batch in _parts(states, events, vm_events, rows, token_use, active):
                # One bad part must not take the others with it.
                try:
                    control.metrics.stale_writes += await control.database.write(write)
                except UnavailableError as error:
                    # A full disk. States and times are found out again; who did what, what happened and what was begun are not.
                    control.metrics.failed_writes += 1
                    self._events = [*events, *self._events][-KEPT_EVENTS:]
                    self._vm_events = [*vm_events, *self._vm_events][-KEPT_EVENTS:]
                    self._executions = [*rows, *self._executions][-KEPT_EVENTS:]
                    log.error("a write behind failed", error=error.message)
                    return
                except sa.exc.SQLAlchemyError:
                    control.metrics.failed_writes += 1
                    log.exception("a write behind failed")
                batch.clear()


def _parts(
    states: list[tuple[Instance, UUID | None]],
    events: list[AuditEvent],
    vm_events: list[VmEvent],
    rows: list[ExecutionRow],
    token_use: dict[UUID, datetime],
    active: dict[UUID, datetime],
) -> list[tuple[Callable[[sa.Connection], int], list[Any] | dict[UUID, Any]]]:
    """What is written together, each with what need not be kept for a next attempt once it is."""

    def write_states(connection: sa.Connection) -> int:
        stale = 0
        for instance, lease in states:
            if lease is None:
                done = instances.advance(connection, instance)
            else:
                done = leases.apply(
                    connection, instances_table, instance.id, lease, instances.state_values(instance), release=True
                )
            stale += not done
        return stale

    def write_events(connection: sa.Connection) -> int:
        audit_events.insert(connection, *events)
        return 0

    def write_times(connection: sa.Connection) -> int:
        tokens.set_last_used(connection, token_use)
        instances.set_last_active(connection, active)
        return 0

    def write_executions(connection: sa.Connection) -> int:
        executions.insert(connection, *rows)
        return 0

    def write_vm_events(connection: sa.Connection) -> int:
        vms.insert_events(connection, *vm_events)
        return 0

    parts: list[tuple[Callable[[sa.Connection], int], list[Any] | dict[UUID, Any]]] = []
    if states:
        parts.append((write_states, states))
    if token_use or active:
        parts.append((write_times, token_use))
    if vm_events:
        parts.append((write_vm_events, vm_events))
    if rows:
        parts.append((write_executions, rows))
    if events:
        parts.append((write_events, events))
    return parts
