"""Ports of scripted guests: each leads to a server of the test's own, on this machine's loopback."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any
from uuid import UUID

from innkeeper.bus.contract import Data, End, ServerCall
from innkeeper.core.port_verbs import DialPort, ListPorts
from innkeeper.errors import GuestError, PortUnreachableError


class ScriptedPorts:
    """Carries bytes like the daemon and the agent do; `servers` are the real ports by the guest's."""

    def __init__(self, there: Callable[[UUID], None]) -> None:
        self._there = there
        self.servers: dict[int, int] = {}
        self.open = 0
        # Of guests whose agents never say whether they have connected.
        self.silent = False

    def answers(self) -> list[tuple[type[Any], Any]]:
        return [(DialPort, self._dial), (ListPorts, self._list)]

    async def _list(self, request: ListPorts, call: ServerCall) -> dict[str, Any]:
        self._there(request.instance_id)
        return {
            "ports": [{"port": port, "address": "127.0.0.1", "pid": 7, "command": "x"} for port in sorted(self.servers)]
        }

    async def _dial(self, request: DialPort, call: ServerCall) -> dict[str, Any]:
        self._there(request.instance_id)
        port = self.servers.get(request.port)
        if port is None:
            raise PortUnreachableError
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        self.open += 1
        if self.silent:
            try:
                await asyncio.Event().wait()
            finally:
                self.open -= 1
                writer.transport.abort()
        inward = asyncio.create_task(self._inward(call, writer))
        try:
            await call.send_message({"connected": True})
            while data := await reader.read(65_536):
                await call.send_data(data)
            await call.send_end()
            await inward
            return {}
        except ConnectionError as error:
            raise GuestError("The guest answered io_error") from error
        finally:
            self.open -= 1
            inward.cancel()
            writer.transport.abort()

    async def _inward(self, call: ServerCall, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            async for event in call.events():
                if isinstance(event, Data):
                    writer.write(event.data)
                    await writer.drain()
                elif isinstance(event, End):
                    writer.write_eof()
