"""Garbage on a host: what takes disk space and nothing needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from pydantic import TypeAdapter

from innkeeper.control import audit
from innkeeper.control.access import require
from innkeeper.control.hosts import stored
from innkeeper.core.host_verbs import CollectGarbage, to_wire
from innkeeper.core.token import Principal, Scope
from innkeeper.store import audit_events, images, snapshots, volumes

if TYPE_CHECKING:
    from innkeeper.control.context import Control

HOST_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Garbage:
    """A thing that could go, or went. `name` is a digest, the name of a disk, the id of an instance or a volume, or a path below the daemon's directory."""

    kind: str
    name: str
    size_bytes: int


_ITEMS = TypeAdapter(list[Garbage])


async def collect(
    control: Control, principal: Principal, host_id: UUID, *, remove: bool, remove_volumes: bool = False
) -> list[Garbage]:
    """What takes disk space on a host and nothing needs; with `remove` it is gone, volumes only with `remove_volumes` too. Only the operator may.

    Raises:
        NotFoundError: no such host. UnavailableError: it cannot be asked.

    """
    require(principal, Scope.ADMIN)
    await stored(control, host_id)
    if remove:
        # Disks and machines of rooms that are no more are the reconciler's.
        control.reconcile_hint.set()
        await control.database.write(audit_events.insert, audit.event(principal, "host.gc", "host", host_id))
    verb = CollectGarbage(
        remove,
        tuple(sorted(await control.database.read(images.digests))),
        tuple(sorted(await control.database.read(snapshots.kept, host_id))),
        tuple(sorted(one.id for one in await control.database.read(volumes.on_host, host_id))),
        remove_volumes,
    )
    answer = await control.bus.request(host_id, verb.verb, to_wire(verb), timeout_seconds=HOST_SECONDS)
    return _ITEMS.validate_python(answer["items"])
