"""The daemon's handler for the logs of instances."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from innkeeper.bus.contract import Handler, ServerCall
from innkeeper.core.log_verbs import ReadLog
from innkeeper.host.instance_logs import InstanceLogs
from innkeeper.host.verbs import bind_handler


class LogVerbs:
    """Translates calls to the logs."""

    def __init__(self, logs: InstanceLogs) -> None:
        self._logs = logs

    def handlers(self) -> Mapping[str, Handler]:
        """Handlers by verb."""
        return {ReadLog.verb: bind_handler(ReadLog, self._read)}

    async def _read(self, request: ReadLog, call: ServerCall) -> dict[str, Any]:
        after = request.after
        if request.newest is not None:
            last = self._logs.read(request.instance_id, after=after, limit=0).last
            after = max(after, last - request.newest)
        page = self._logs.read(request.instance_id, after=after, limit=request.limit)
        if page.last <= after and request.wait_seconds:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(request.wait_seconds):
                    await self._logs.wait(request.instance_id, after)
            page = self._logs.read(request.instance_id, after=after, limit=request.limit)
        return {"lines": [line.to_wire() for line in page.lines], "first": page.first, "last": page.last}
