"""The daemon's handlers for its operator: what no room and no guest asks for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from innkeeper.bus.contract import Handler, ServerCall
from innkeeper.core import host_verbs as verbs
from innkeeper.core.metric import Reading, families
from innkeeper.diagnosis import Diagnosis
from innkeeper.errors import InvalidRequestError
from innkeeper.host.metrics import HostMetrics
from innkeeper.host.verbs import bind_handler
from innkeeper.log_setup import LEVELS, LogLevel

Readings = Callable[[], Awaitable[Iterable[Reading]]]


class OperatorVerbs:
    """Translates the operator's calls."""

    def __init__(self, *, level: LogLevel, metrics: HostMetrics, readings: Readings) -> None:
        self._level = level
        self._metrics = metrics
        self._readings = readings
        self._diagnosis = Diagnosis()

    def handlers(self) -> Mapping[str, Handler]:
        """Handlers by verb."""
        return {
            verbs.Diagnose.verb: bind_handler(verbs.Diagnose, self._diagnose),
            verbs.SetLogLevel.verb: bind_handler(verbs.SetLogLevel, self._set_log_level),
            verbs.ReadMetrics.verb: bind_handler(verbs.ReadMetrics, self._read_metrics),
        }

    async def _diagnose(self, request: verbs.Diagnose, call: ServerCall) -> dict[str, Any]:
        return await self._diagnosis.ask(request.kind, seconds=request.seconds)

    async def _read_metrics(self, request: verbs.ReadMetrics, call: ServerCall) -> dict[str, Any]:
        return {"families": [*self._metrics.families(), *families(await self._readings())]}

    async def _set_log_level(self, request: verbs.SetLogLevel, call: ServerCall) -> dict[str, Any]:
        if request.level is not None:
            if request.level not in LEVELS:
                raise InvalidRequestError(f"level: one of {', '.join(LEVELS)}")
            self._level.set(request.level)
        return {"level": self._level.name}
