"""Hosts: taking them in, following what they report, and what the operator sees of them."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa
import structlog

from innkeeper.bus.contract import Message
from innkeeper.control import (
    audit,
    clock,
    images,
    mount_work,
    placement,
    provisioning,
    reconciler,
    snapshot_taking,
    volume_work,
)
from innkeeper.control.access import require
from innkeeper.control.host_table import HostEntry
from innkeeper.core.host import Host
from innkeeper.core.host_verbs import HostStatus, WatchHost, to_wire
from innkeeper.core.isolation import Offer, Rules, Wish, choose, offer_from_wire
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import InnkeeperError, NotFoundError
from innkeeper.ids import parse_uuid
from innkeeper.store import audit_events
from innkeeper.store import hosts as store

if TYPE_CHECKING:
    from innkeeper.control.context import Control

log = structlog.get_logger(__name__)

STATUS_SECONDS = 5.0
CONNECT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class HostView:
    """A host with what it says of itself (`HostStatus`'s answer), which is empty while it cannot be reached.

    `rooms` lie on it; `open_calls` are requests that are going on in their guests. `offers` are its drivers, and `default` the one that guests get there
    that ask for none.
    """

    host: Host
    reachable: bool
    rooms: int = 0
    open_calls: int = 0
    status: dict[str, Any] = field(default_factory=dict)
    offers: tuple[Offer, ...] = ()
    default: Offer | None = None


async def list_hosts(control: Control, principal: Principal) -> list[HostView]:
    """All hosts that were ever seen, each asked now. Only the operator may."""
    require(principal, Scope.ADMIN)
    known = await control.database.read(store.every)
    return list(await asyncio.gather(*(_look(control, host) for host in known)))


async def stored(control: Control, host_id: UUID) -> Host:
    """A host that was ever seen. Raises NotFoundError."""
    for host in await control.database.read(store.every):
        if host.id == host_id:
            return host
    raise NotFoundError("Host not found")


async def _look(control: Control, host: Host) -> HostView:
    try:
        status = await control.bus.request(
            host.id, HostStatus.verb, to_wire(HostStatus()), timeout_seconds=STATUS_SECONDS
        )
    except InnkeeperError:
        status = {}
    streams = [entry.open_streams for entry in control.live if entry.instance.host_id == host.id]
    rules = placement.rules_of(control.settings)
    offers = tuple(_judged(offer_from_wire(one), rules) for one in status.get("drivers", ()))
    return HostView(
        host,
        reachable=bool(status),
        rooms=len(streams),
        open_calls=sum(streams),
        status=status,
        offers=offers,
        default=choose(Wish(), rules, offers),
    )


def _judged(offer: Offer, rules: Rules) -> Offer:
    return offer if offer.isolation is None else dataclasses.replace(offer, isolation=rules.judged(offer.isolation))


async def set_draining(
    control: Control, principal: Principal, host_id: UUID, *, draining: bool, deadline_seconds: float | None = None
) -> HostView:
    """Take a host out of the choice for new instances, or back in. Only the operator may.

    Its rooms stay and may be used on, with a deadline until then; what runs goes on to its end. Its warm pools are emptied. Kept over restarts.
    """
    require(principal, Scope.ADMIN)
    deadline = None
    if draining and deadline_seconds is not None:
        deadline = clock.now() + timedelta(seconds=deadline_seconds)

    def change(connection: sa.Connection) -> None:
        if not store.set_draining(connection, host_id, draining=draining, deadline=deadline):
            raise NotFoundError("Host not found")
        audit_events.insert(
            connection, audit.event(principal, "host.draining", "host", host_id, {"draining": str(draining).lower()})
        )

    await control.database.write(change)
    entry = control.hosts.get(host_id)
    if entry is None:
        return await _look(control, await stored(control, host_id))
    host = dataclasses.replace(entry.host, draining=draining, drain_deadline=deadline)
    control.hosts.put(dataclasses.replace(entry, host=host))
    control.live.set_host(host)
    control.pools_hint.set()
    return await _look(control, host)


def all_draining(control: Control) -> bool:
    """Whether there are hosts, and none of them takes anything new."""
    draining = [entry.host.draining for entry in control.hosts]
    return bool(draining) and all(draining)


async def watch(control: Control, host_id: UUID, connected: asyncio.Future[None]) -> None:
    """Take a host in and follow its events until the connection is lost."""
    try:
        async with control.bus.open(host_id, WatchHost.verb, to_wire(WatchHost())) as call:
            # Events queue up from here on, so nothing that happens during the adoption is missed.
            async with asyncio.timeout(CONNECT_SECONDS):
                await _connect(control, host_id)
            _settle(connected)
            async for event in call.events():
                if isinstance(event, Message):
                    await _handle(control, host_id, event.body)
    except (InnkeeperError, TimeoutError) as error:
        log.warning("host lost", host_id=str(host_id), reason=str(error) or type(error).__name__)
    finally:
        _settle(connected)


def _settle(connected: asyncio.Future[None]) -> None:
    if not connected.done():
        connected.set_result(None)


async def _connect(control: Control, host_id: UUID) -> None:
    status = await control.bus.request(host_id, HostStatus.verb, to_wire(HostStatus()), timeout_seconds=CONNECT_SECONDS)
    host = await control.database.write(store.seen, Host(host_id, str(status["name"])), clock.now())
    agent_version = await images.refresh(control, host_id)
    control.hosts.put(
        HostEntry(
            host,
            offers=tuple(offer_from_wire(one) for one in status["drivers"]),
            agent_version=agent_version,
        )
    )
    control.live.set_host(host)
    await reconciler.adopt(control, host_id)
    await snapshot_taking.settle(control, host_id)
    await volume_work.settle(control, host_id)
    await mount_work.settle(control, host_id)
    control.pools_hint.set()


async def _handle(control: Control, host_id: UUID, body: dict[str, Any]) -> None:
    kind = body.get("type")
    if kind == "machine.failed":
        instance_id = parse_uuid(str(body.get("instance_id")))
        entry = None if instance_id is None else control.live.by_instance(instance_id)
        # A room that is coming up or going down hears of its failure from the call that is under way.
        if entry is not None and control.flights.get(entry.key) is None:
            provisioning.mark_failed(control, entry, str(body.get("failure") or "The guest failed"))
    elif kind == "image.changed":
        await images.refresh(control, host_id)
