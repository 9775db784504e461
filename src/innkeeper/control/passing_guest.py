"""A guest that the server has for a while: an instance of an organization without a room or a VM, which goes with the work that it is for."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID

import anyio
import sqlalchemy as sa
import structlog

from innkeeper.control import provisioning, usage
from innkeeper.core.checkpoint_verbs import RestoreCheckpoint
from innkeeper.core.host_verbs import DestroyMachine, EnsureMachine, to_wire
from innkeeper.core.instance import Instance
from innkeeper.errors import InnkeeperError, UnavailableError
from innkeeper.store import instances

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

ENSURE_SECONDS = 300.0
DESTROY_SECONDS = 60.0


@asynccontextmanager
async def passing_guest(
    control: Control, instance: Instance, request: EnsureMachine | RestoreCheckpoint
) -> AsyncIterator[dict[str, Any]]:
    """The host's answer to `request`, which makes the instance ready, for the block; nothing of it is left afterwards.

    A server that is killed leaves its row, which the next one removes by its label; the machine is then an orphan.

    Raises:
        RateLimitedError: a limit of the organization.
        UnavailableError, NoHostError: the host has no room for it.
        InnkeeperError: what the request says.

    """
    if instance.host_id is None:
        raise UnavailableError("The guest has no host")
    organization = await provisioning.organization_of(control, instance.organization_id)

    def insert(connection: sa.Connection) -> None:
        provisioning.check_limits(connection, organization, instance.memory_mb)
        instances.insert(connection, instance, lock_token=None, now=instance.created_at, ttl_seconds=0)

    await control.database.write(insert)
    try:
        yield await control.bus.request(
            instance.host_id, request.verb, to_wire(request), timeout_seconds=ENSURE_SECONDS
        )
    finally:
        # Cancelled or not: whoever cancels waits for this.
        with anyio.CancelScope(shield=True):
            await _take_away(control, instance.host_id, instance.id)


async def _take_away(control: Control, host_id: UUID, instance_id: UUID) -> None:
    try:
        await control.bus.request(
            host_id, DestroyMachine.verb, to_wire(DestroyMachine(instance_id)), timeout_seconds=DESTROY_SECONDS
        )
    except InnkeeperError as error:
        # Without a row it is an orphan, which the reconciler has the host destroy.
        log.warning("a passing guest is left to the reconciler", instance_id=str(instance_id), reason=error.message)
        control.reconcile_hint.set()
    with contextlib.suppress(InnkeeperError):
        # What it used is the organization's as long as its row says so.
        await usage.count_host(control, host_id)
    await control.database.write(instances.delete, instance_id)
