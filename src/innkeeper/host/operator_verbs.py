"""The daemon's handlers for its operator: what no room and no guest asks for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from innkeeper.bus.contract import Handler, ServerCall
from innkeeper.core import host_verbs as verbs
from innkeeper.core.metric import families
from innkeeper.diagnosis import Diagnosis
from innkeeper.errors import GuestError, InvalidRequestError
from innkeeper.host.backup import Backups
from innkeeper.host.disk_use import DiskUse
from innkeeper.host.fleet import Fleet
from innkeeper.host.garbage import GarbageCollector, Keep
from innkeeper.host.metrics import HostMetrics
from innkeeper.host.readings import HostReadings
from innkeeper.host.usage import UsageLedger, usage_of
from innkeeper.host.verbs import bind_handler
from innkeeper.log_setup import LEVELS, LogLevel

GUEST_SECONDS = 10.0


class OperatorVerbs:
    """Translates the operator's calls."""

    def __init__(
        self,
        *,
        level: LogLevel,
        metrics: HostMetrics,
        readings: HostReadings,
        garbage: GarbageCollector,
        measure_disk: Callable[[], list[DiskUse]],
        fleet: Fleet,
        usage: UsageLedger,
        backups: Backups,
    ) -> None:
        self._fleet = fleet
        self._usage = usage
        self._garbage = garbage
        self._measure_disk = measure_disk
        self._level = level
        self._metrics = metrics
        self._readings = readings
        self._backups = backups
        self._diagnosis = Diagnosis()

    def handlers(self) -> Mapping[str, Handler]:
        """Handlers by verb."""
        return {
            verbs.BackupHost.verb: bind_handler(verbs.BackupHost, self._backups.back_up),
            verbs.Diagnose.verb: bind_handler(verbs.Diagnose, self._diagnose),
            verbs.DiagnoseGuest.verb: bind_handler(verbs.DiagnoseGuest, self._diagnose_guest),
            verbs.SetLogLevel.verb: bind_handler(verbs.SetLogLevel, self._set_log_level),
            verbs.ReadMetrics.verb: bind_handler(verbs.ReadMetrics, self._read_metrics),
            verbs.CollectGarbage.verb: bind_handler(verbs.CollectGarbage, self._collect_garbage),
            verbs.MeasureDisk.verb: bind_handler(verbs.MeasureDisk, self._disk_use),
            verbs.ReadUsage.verb: bind_handler(verbs.ReadUsage, self._read_usage),
            verbs.DescribeCapacity.verb: bind_handler(verbs.DescribeCapacity, self._describe_capacity),
        }

    async def _diagnose(self, request: verbs.Diagnose, call: ServerCall) -> dict[str, Any]:
        return await self._diagnosis.ask(request.kind, seconds=request.seconds)

    async def _diagnose_guest(self, request: verbs.DiagnoseGuest, call: ServerCall) -> dict[str, Any]:
        machine = self._fleet.machine(request.instance_id)
        async with machine.in_use():
            answer = await machine.endpoint.request("stacks", {}, timeout_seconds=GUEST_SECONDS)
        text = answer.get("text")
        if not isinstance(text, str):
            raise GuestError("The guest agent sent no valid stacks")
        return {"text": text}

    async def _read_metrics(self, request: verbs.ReadMetrics, call: ServerCall) -> dict[str, Any]:
        return {"families": [*self._metrics.families(), *families(await self._readings())]}

    async def _collect_garbage(self, request: verbs.CollectGarbage, call: ServerCall) -> dict[str, Any]:
        keep = Keep(
            frozenset(request.keep_images), frozenset(request.keep_checkpoints), frozenset(request.keep_volumes)
        )
        if request.remove:
            found = await self._garbage.remove(keep, volumes=request.remove_volumes)
        else:
            found = await self._garbage.find(keep)
        return {"items": [asdict(one) for one in found]}

    async def _disk_use(self, request: verbs.MeasureDisk, call: ServerCall) -> dict[str, Any]:
        return {"items": [asdict(one) for one in await asyncio.to_thread(self._measure_disk)]}

    async def _read_usage(self, request: verbs.ReadUsage, call: ServerCall) -> dict[str, Any]:
        self._usage.forget(request.counted)
        # The ended ones last: one that ends meanwhile is in both, with the larger sums where it counts.
        running = [
            used
            for machine in self._fleet.held()
            if not machine.record.ended
            and (used := usage_of(machine.record, machine.driver.usage(machine.id))) is not None
        ]
        return {
            "running": [asdict(one) for one in running],
            "ended": [asdict(one) for one in await asyncio.to_thread(self._usage.ended)],
        }

    async def _describe_capacity(self, request: verbs.DescribeCapacity, call: ServerCall) -> dict[str, Any]:
        return self._readings.capacity()

    async def _set_log_level(self, request: verbs.SetLogLevel, call: ServerCall) -> dict[str, Any]:
        if request.level is not None:
            if request.level not in LEVELS:
                raise InvalidRequestError(f"level: one of {', '.join(LEVELS)}")
            self._level.set(request.level)
        return {"level": self._level.name}
