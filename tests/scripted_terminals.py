"""Terminals of the scripted host: rows without programs; whatever is typed comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

from innkeeper.bus.contract import Data, ServerCall
from innkeeper.core import terminal_verbs as verbs
from innkeeper.errors import TerminalNotFoundError

Answer = Callable[[Any, ServerCall], Awaitable[dict[str, Any]]]


class ScriptedTerminals:
    """Answers the verbs of `core.terminal_verbs`."""

    def __init__(self) -> None:
        self.rows: dict[tuple[UUID, str], dict[str, Any]] = {}
        # What keeps the next ones from starting.
        self.start_error: Exception | None = None
        # Whether programs read what is typed, and so say it again.
        self.take = True

    def answers(self) -> tuple[tuple[type[Any], Answer], ...]:
        return (
            (verbs.StartTerminal, self._start),
            (verbs.ListTerminals, self._list),
            (verbs.ResizeTerminal, self._resize),
            (verbs.EndTerminal, self._end),
            (verbs.AttachTerminal, self._attach),
        )

    def row(self, instance_id: UUID, name: str) -> dict[str, Any]:
        if (instance_id, name) not in self.rows:
            raise TerminalNotFoundError
        return self.rows[instance_id, name]

    def add(self, instance_id: UUID, name: str, **fields: Any) -> dict[str, Any]:
        plain = {"id": name, "alive": True, "exit_code": None, "cols": 80, "rows": 24, "label": "", "started_at": 1.0}
        self.rows[instance_id, name] = {**plain, "viewers": 0, "offset": 0, **fields}
        return self.rows[instance_id, name]

    async def _start(self, request: verbs.StartTerminal, call: ServerCall) -> dict[str, Any]:
        if self.start_error is not None:
            raise self.start_error
        name = request.name or f"t{len(self.rows)}"
        row = self.add(request.instance_id, name, cols=request.cols, rows=request.rows, label=request.label)
        return {"terminal": row}

    async def _list(self, request: verbs.ListTerminals, call: ServerCall) -> dict[str, Any]:
        return {"terminals": [row for (owner, _), row in self.rows.items() if owner == request.instance_id]}

    async def _resize(self, request: verbs.ResizeTerminal, call: ServerCall) -> dict[str, Any]:
        row = self.row(request.instance_id, request.name)
        row |= {"cols": request.cols, "rows": request.rows}
        return {"terminal": row}

    async def _end(self, request: verbs.EndTerminal, call: ServerCall) -> dict[str, Any]:
        row = self.row(request.instance_id, request.name)
        del self.rows[request.instance_id, request.name]
        return {"terminal": {**row, "alive": False, "exit_code": 129}}

    async def _attach(self, request: verbs.AttachTerminal, call: ServerCall) -> dict[str, Any]:
        self.row(request.instance_id, request.name)
        await call.send_message({"offset": request.offset})
        if not self.take:
            await asyncio.Event().wait()
        async for event in call.events():
            if isinstance(event, Data):
                await call.send_data(event.data)
        return {"exit_code": 0}
