"""Port verbs: a guest's TCP ports, reached and listed through its agent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any

from innkeeper.bus.contract import Data, End, Handler, Message, ServerCall
from innkeeper.core.port_verbs import SEND_AHEAD_BYTES, DialPort, ListPorts
from innkeeper.errors import GuestError, InnkeeperError
from innkeeper.host.fleet import Fleet
from innkeeper.host.verbs import bind_handler
from innkeeper.wire.stream import Stream

LIST_SECONDS = 10.0
MAX_PORTS = 500
MAX_COMMAND_CHARACTERS = 64


class Ports:
    """Translates calls to the agents' verbs."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def handlers(self) -> Mapping[str, Handler]:
        """Handlers by verb."""
        return {
            DialPort.verb: bind_handler(DialPort, self._dial),
            ListPorts.verb: bind_handler(ListPorts, self._list),
        }

    async def _dial(self, request: DialPort, call: ServerCall) -> dict[str, Any]:
        machine = self._fleet.machine(request.instance_id)
        async with machine.in_use():
            stream = await machine.endpoint.open("dial", {"port": request.port})
            call.allow(SEND_AHEAD_BYTES)
            stream.shortcut(call.send_now)
            call.shortcut(stream.send_now)
            inward = machine.start_task(_carry_inward(call, stream))
            try:
                await _carry_outward(stream, call)
                return {}
            finally:
                stream.cancel()
                inward.cancel()

    async def _list(self, request: ListPorts, call: ServerCall) -> dict[str, Any]:
        machine = self._fleet.machine(request.instance_id)
        async with machine.in_use():
            answer = await machine.endpoint.request("ports", {}, timeout_seconds=LIST_SECONDS)
        return {"ports": checked_ports(answer.get("ports"))}


async def _carry_inward(call: ServerCall, stream: Stream) -> None:
    # What goes wrong here ends the stream, and whoever reads its other direction says so.
    with contextlib.suppress(InnkeeperError, asyncio.CancelledError):
        async for event in call.events():
            if isinstance(event, Data):
                await stream.send_data(event.data)
            elif isinstance(event, End):
                await stream.send_end()


async def _carry_outward(stream: Stream, call: ServerCall) -> None:
    connected = False
    while (event := await stream.next_event()) is not None:
        if isinstance(event, Data):
            await call.send_data(event.data)
        elif isinstance(event, End):
            await call.send_end()
        elif isinstance(event, Message) and not connected:
            # Once, whatever an agent says more.
            connected = True
            await call.send_message({"connected": True})


def checked_ports(rows: object) -> list[dict[str, Any]]:
    """The rows of an agent's answer, as far as they make sense. Raises GuestError when it is no list, or too long a one."""
    if not isinstance(rows, list) or len(rows) > MAX_PORTS:
        raise GuestError("The guest agent sent no valid list of ports")
    return [checked for row in rows if isinstance(row, dict) and (checked := _checked(row)) is not None]


def _checked(row: dict[str, Any]) -> dict[str, Any] | None:
    port, address, pid, command = row.get("port"), row.get("address"), row.get("pid"), row.get("command")
    # Not isinstance: JSON's true is an int to Python.
    if type(port) is not int or not 1 <= port <= 65_535 or not isinstance(address, str):
        return None
    try:
        address = str(ip_address(address))
    except ValueError:
        return None
    return {
        "port": port,
        "address": address,
        "pid": pid if type(pid) is int and 0 < pid < 2**31 else None,
        "command": "".join(c if c.isprintable() else "?" for c in command)[:MAX_COMMAND_CHARACTERS]
        if isinstance(command, str) and command
        else None,
    }
