"""Calls to an instance's host that are about its guest: counted as use, repeated once where the guest has to be woken first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID

from innkeeper.bus.contract import Call, Data, Message
from innkeeper.control import lifecycle, provisioning
from innkeeper.control.live_table import Entry
from innkeeper.core.host_verbs import path_to_wire, to_wire
from innkeeper.core.token import Principal
from innkeeper.errors import (
    InstanceFailedError,
    InstanceNotFoundError,
    InvalidRequestError,
    PayloadTooLargeError,
    UnavailableError,
)

if TYPE_CHECKING:
    from innkeeper.control.context import Control

PATH_BYTES_MAX = 4_095
HOST_SECONDS = 30.0
# Longest silence between two pieces of a file.
STALL_SECONDS = 60.0


def wire_path(path: bytes) -> str:
    """A guest's path as the bus spells it. Raises InvalidRequestError."""
    if not path.startswith(b"/") or b"\0" in path or len(path) > PATH_BYTES_MAX:
        raise InvalidRequestError(f"path: must be absolute, without NUL, at most {PATH_BYTES_MAX} bytes")
    return path_to_wire(path)


def host_of(entry: Entry) -> UUID:
    """The host that has the instance. Raises UnavailableError where none has."""
    if entry.instance.host_id is None:
        raise UnavailableError(f"The {entry.kind} has no host")
    return entry.instance.host_id


@contextmanager
def in_use(control: Control, entry: Entry) -> Iterator[None]:
    """Counts the block as use of the instance, so that it does not expire under it."""
    entry.open_streams += 1
    try:
        yield
    finally:
        entry.open_streams -= 1
        control.live.touch(entry)


async def ask(
    control: Control, principal: Principal, entry: Entry, verb: Any, *, timeout_seconds: float = HOST_SECONDS
) -> dict[str, Any]:
    """The answer to a verb without streams. Raises as `lifecycle.usable`, and what the host says."""
    await lifecycle.usable(control, principal, entry)
    with in_use(control, entry):
        try:
            return await control.bus.request(host_of(entry), verb.verb, to_wire(verb), timeout_seconds=timeout_seconds)
        except InstanceNotFoundError:
            await lifecycle.revive(control, principal, entry)
            return await control.bus.request(host_of(entry), verb.verb, to_wire(verb), timeout_seconds=timeout_seconds)


async def until_done(control: Control, principal: Principal, entry: Entry, verb: Any) -> dict[str, Any]:
    """The answer to a verb that may take as long as it likes, while the host says that it goes on. Raises as `ask`."""
    await lifecycle.usable(control, principal, entry)
    with in_use(control, entry):
        for attempt in range(2):
            async with control.bus.open(host_of(entry), verb.verb, to_wire(verb)) as call:
                events = aiter(call.events())
                try:
                    while await next_event(events) is not None:
                        pass
                    return await call.result()
                except InstanceNotFoundError:
                    if attempt:
                        raise InstanceFailedError("The guest is gone") from None
            await lifecycle.revive(control, principal, entry)
    raise AssertionError


async def kept(
    control: Control, entry: Entry, verb: Any, take: Callable[[Data], object]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The message and the answer of a host about what it keeps of an instance, whose guest is left alone; `take` gets the bytes. Raises what the host says."""
    head: dict[str, Any] = {}
    try:
        async with (
            asyncio.timeout(HOST_SECONDS),
            control.bus.open(host_of(entry), verb.verb, to_wire(verb)) as call,
        ):
            async for event in call.events():
                if isinstance(event, Message):
                    head = event.body
                elif isinstance(event, Data):
                    take(event)
            return head, await call.result()
    except TimeoutError:
        raise UnavailableError("The host did not answer in time") from None


@asynccontextmanager
async def reading(
    control: Control, principal: Principal, entry: Entry, verb: Any
) -> AsyncIterator[tuple[dict[str, Any], AsyncIterator[Any]]]:
    """The first MESSAGE of a verb that streams to us, and the events after it: take them by `next_event`. Raises as `ask`."""
    await lifecycle.usable(control, principal, entry)
    params = to_wire(verb)
    with in_use(control, entry):
        for attempt in range(2):
            async with control.bus.open(host_of(entry), verb.verb, params) as call:
                events = aiter(call.events())
                try:
                    head = await next_event(events)
                except InstanceNotFoundError:
                    if attempt:
                        raise InstanceFailedError("The guest is gone") from None
                else:
                    if not isinstance(head, Message):
                        raise UnavailableError("The host answered out of turn")
                    yield head.body, events
                    return
            await lifecycle.revive(control, principal, entry)


async def send(
    control: Control,
    principal: Principal,
    entry: Entry,
    verb: Any,
    chunks: AsyncIterable[bytes],
    *,
    max_bytes: int | None = None,
) -> dict[str, Any]:
    """The answer to a verb that takes content.

    Raises:
        PayloadTooLargeError: `chunks` gave more than `max_bytes`; the guest is left as it was.
        And as `ask`.

    """
    await lifecycle.usable(control, principal, entry)
    with in_use(control, entry):
        async with control.bus.open(host_of(entry), verb.verb, to_wire(verb)) as call:
            try:
                await _send(call, chunks, max_bytes)
                async with asyncio.timeout(STALL_SECONDS):
                    return await call.result()
            except TimeoutError:
                raise UnavailableError("The host did not answer in time") from None
            except InstanceNotFoundError:
                # What the caller sent is spent, so it is the caller who has to send it again.
                provisioning.mark_lost(control, entry)
                raise UnavailableError("The guest is gone; the next use starts it again on its disk") from None


async def _send(call: Call, chunks: AsyncIterable[bytes], max_bytes: int | None) -> None:
    sent = 0
    async for chunk in chunks:
        sent += len(chunk)
        if max_bytes is not None and sent > max_bytes:
            raise PayloadTooLargeError(f"The file is larger than {max_bytes} bytes")
        if chunk:
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    await call.send_data(chunk)
            except TimeoutError:
                # The guest decides when it takes more.
                raise UnavailableError("The guest takes no more of the file") from None
    await call.send_end()


async def next_event(events: AsyncIterator[Any]) -> Any:
    """The next event of a call, None at its end. Raises UnavailableError where none comes for too long."""
    try:
        async with asyncio.timeout(STALL_SECONDS):
            return await anext(events, None)
    except TimeoutError:
        raise UnavailableError("The host did not answer in time") from None
