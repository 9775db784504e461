"""Programs of the scripted host: what they are sent comes back, or they write as long as somebody takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

from innkeeper.bus.contract import Data, Message, ServerCall
from innkeeper.core.program_verbs import RunProgram

ENDLESS = "yes"


class ScriptedPrograms:
    """Answers the verb of `core.program_verbs`."""

    def __init__(self, there: Callable[[UUID], None]) -> None:
        self._there = there
        self.running = 0
        # What endless ones have written, and were not kept from writing.
        self.written = 0
        # Whether programs read what they are sent.
        self.take = True

    def answers(self) -> list[tuple[type[Any], Any]]:
        return [(RunProgram, self._run)]

    async def _run(self, request: RunProgram, call: ServerCall) -> dict[str, Any]:
        self._there(request.instance_id)
        self.running += 1
        try:
            await call.send_message({"started": True})
            while request.command == ENDLESS:
                await call.send_data(bytes(65_536))
                self.written += 65_536
            if self.take:
                async for event in call.events():
                    if isinstance(event, Data):
                        await call.send_data(event.data)
                    elif isinstance(event, Message) and event.body.get("end"):
                        break
                return {"exit_code": 0, "signal": None}
            async for event in call.events():
                if isinstance(event, Message) and "signal" in event.body:
                    return {"exit_code": 128 + event.body["signal"], "signal": event.body["signal"]}
            raise AssertionError
        finally:
            self.running -= 1
