"""The daemon's handlers for its operator: what no room and no guest asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from innkeeper.bus.contract import Handler, ServerCall
from innkeeper.core import host_verbs as verbs
from innkeeper.diagnosis import Diagnosis
from innkeeper.errors import InvalidRequestError
from innkeeper.host.verbs import bind_handler
from innkeeper.log_setup import LEVELS, LogLevel


class OperatorVerbs:
    """Translates the operator's calls."""

    def __init__(self, *, level: LogLevel) -> None:
        self._level = level
        self._diagnosis = Diagnosis()

    def handlers(self) -> Mapping[str, Handler]:
        """Handlers by verb."""
        return {
            verbs.Diagnose.verb: bind_handler(verbs.Diagnose, self._diagnose),
            verbs.SetLogLevel.verb: bind_handler(verbs.SetLogLevel, self._set_log_level),
        }

    async def _diagnose(self, request: verbs.Diagnose, call: ServerCall) -> dict[str, Any]:
        return await self._diagnosis.ask(request.kind, seconds=request.seconds)

    async def _set_log_level(self, request: verbs.SetLogLevel, call: ServerCall) -> dict[str, Any]:
        if request.level is not None:
            if request.level not in LEVELS:
                raise InvalidRequestError(f"level: one of {', '.join(LEVELS)}")
            self._level.set(request.level)
        return {"level": self._level.name}
