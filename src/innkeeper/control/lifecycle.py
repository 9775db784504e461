"""An instance's way up and down, for those who wait for it, whatever its handle is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from structlog.contextvars import bind_contextvars

from innkeeper.control import clock, provisioning, snapshot_taking
from innkeeper.control.flights import Flight
from innkeeper.control.live_table import Entry, Key
from innkeeper.core.instance import InstanceState
from innkeeper.core.token import Principal
from innkeeper.errors import (
    HostDrainingError,
    InstanceFailedError,
    InstanceNotFoundError,
    InstanceNotReadyError,
    InstanceSuspendedError,
)

if TYPE_CHECKING:
    from innkeeper.control.context import Control

# What a request leaves for the log: the edge takes it away again.
INSTANCE_ID = "instance_id"


def use(control: Control, entry: Entry) -> None:
    """The instance is being used: its idle time starts anew, and the request's log lines name it (not by the public id, which is a key).

    Raises HostDrainingError when its host takes nothing more.
    """
    check_drain(entry)
    control.live.touch(entry)
    bind_contextvars(**{INSTANCE_ID: str(entry.instance.id)})


def ends(control: Control, entry: Entry) -> bool:
    """Whether it is being destroyed, or was: from when that was begun on, though it is decided only with a write."""
    flight = control.flights.get(entry.key)
    return entry.doomed or (flight is not None and flight.kind == "down")


def check_drain(entry: Entry) -> None:
    """Refuse what would begin on a host that takes nothing more. Raises HostDrainingError."""
    host = entry.host
    if host is not None and host.draining and host.refuses_use(clock.now()):
        raise HostDrainingError(f"The {entry.kind}'s host has been drained")


async def usable(control: Control, principal: Principal, entry: Entry) -> Entry:
    """The same instance, ready: one that sleeps is woken.

    Raises:
        InstanceFailedError: it failed; asking for its handle restarts it.
        InstanceNotReadyError: it takes longer than the wait limit.
        InstanceNotFoundError: it was destroyed meanwhile.

    """
    if entry.ready:
        use(control, entry)
        return entry
    if entry.instance.state is InstanceState.FAILED:
        raise InstanceFailedError(entry.instance.failure)
    return await ready(control, principal, entry)


async def revive(control: Control, principal: Principal, entry: Entry) -> Entry:
    """The instance with a new machine on its disk, when its host says that the one we thought ready is gone. Raises as `usable`."""
    provisioning.mark_lost(control, entry)
    return await ready(control, principal, entry)


async def ready(control: Control, principal: Principal, entry: Entry, *, asked: bool = False) -> Entry:
    """The instance, ready; a failed one is restarted on its disk. Raises as `bring_up`, InstanceFailedError."""

    def work() -> Coroutine[Any, Any, Entry]:
        return provisioning.bring_up(control, principal, entry)

    return await bring_up(control, entry.key, work, only=entry, asked=asked)


async def over(flight: Flight) -> None:
    """Wait for the end of a flight, however it ends."""
    await asyncio.wait({flight.future})


async def bring_up(
    control: Control,
    key: Key,
    work: Callable[[], Coroutine[Any, Any, Entry]],
    *,
    only: Entry | None = None,
    asked: bool = False,
) -> Entry:
    """The entry of a handle, ready: of the flight that is going on, else of one that does the `work`. `asked`: whoever uses it asks for it to be woken.

    Raises:
        InstanceSuspendedError: it is suspended, and its use does not wake it.
        InstanceNotFoundError: the one that is meant, `only`, was destroyed.
        InstanceNotReadyError: it takes longer than the wait limit; it goes on coming up.
        HostDrainingError: its host takes nothing more.
        And what the work raises.

    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + control.settings.room_wait_seconds
    while True:
        entry = control.live.find(key)
        flight = control.flights.get(key)
        # A session's next VM has the same key: whoever means the one before must not get it.
        if only is not None and (only.doomed if entry is None else entry is not only):
            raise InstanceNotFoundError
        if entry is not None:
            check_drain(entry)
        if flight is None:
            if entry is not None and entry.ready:
                use(control, entry)
                return entry
            if only is not None and only.doomed:
                raise InstanceNotFoundError
            if entry is not None and entry.sleeps_on and not asked:
                raise InstanceSuspendedError
            flight = control.flights.start(key, "up", work)
        await _wait(control, flight, key, deadline - loop.time())
        if flight.kind == "up":
            flight.future.result()


async def _wait(control: Control, flight: Flight, key: Key, seconds: float) -> None:
    done, _ = await asyncio.wait({flight.future}, timeout=max(0.0, seconds))
    if not done:
        entry = control.live.find(key)
        status = InstanceState.ACTIVE if entry is None else entry.instance.state
        raise InstanceNotReadyError(f"Instance is still provisioning, current status: {status}")


async def destroy(
    control: Control, principal: Principal, entry: Entry, *, verb: str = "destroy", reason: str = "deleted"
) -> None:
    """Destroy an instance that is in memory; joins a destruction that is going on. A VM that is to leave a snapshot stays where none can be taken.

    `verb` is what the audit log calls it, `reason` what its handle keeps of its end.
    """
    while (flight := control.flights.get(entry.key)) is not None and flight.kind == "suspend":
        await over(flight)
    if flight is None:

        async def work() -> Entry:
            await snapshot_taking.keep_last(control, principal, entry)
            return await provisioning.take_down(control, principal, entry, verb=verb, reason=reason)

        flight = control.flights.start(entry.key, "down", work)
    await asyncio.wait({flight.future})
    if flight.kind == "down":
        flight.future.result()
