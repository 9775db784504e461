"""The operator's endpoints under `/v1`: what no tenant may ask."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from innkeeper.api.json_app import CurrentPrincipal, PathUuid
from innkeeper.api.v1.operator_schemas import (
    CapacityAnswer,
    DiagnosisAsk,
    DiskAnswer,
    DiskItem,
    DrainChange,
    GarbageAnswer,
    GarbageAsk,
    GarbageItem,
    LevelAnswer,
    LogLevelChange,
    ProfileRoomAnswer,
)
from innkeeper.api.v1.schemas import DriverAnswer, HostAnswer, Nothing
from innkeeper.control import backup, capacity, diagnosis, disk_use, garbage, hosts
from innkeeper.control.capacity import CapacityReport
from innkeeper.control.context import Control
from innkeeper.control.diagnosis import ProcessLevel
from innkeeper.control.hosts import HostView
from innkeeper.errors import InvalidRequestError

BACKUP_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The backup, a tar file",
        "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def add_routes(router: APIRouter, control: Control) -> None:
    """Add the routes; each is one use case that asks for the scope `admin`."""

    @router.post("/v1/hosts/{host_id}/drain")
    async def drain(principal: CurrentPrincipal, host_id: PathUuid, body: DrainChange) -> HostAnswer:
        """Take a host out of service, or back in. Scope `admin`. 404 `not_found` for a host that was never seen."""
        return host_answer(
            await hosts.set_draining(
                control, principal, host_id, draining=body.draining, deadline_seconds=body.deadline_seconds
            )
        )

    @router.get("/v1/hosts/{host_id}/capacity")
    async def report_capacity(principal: CurrentPrincipal, host_id: PathUuid) -> CapacityAnswer:
        """What the host has room for, and what bounds it. Scope `admin`."""
        return _capacity(await capacity.report(control, principal, host_id))

    @router.get("/v1/hosts/{host_id}/disk")
    async def report_disk(principal: CurrentPrincipal, host_id: PathUuid) -> DiskAnswer:
        """What takes the space of the state directory, and whose it is. Scope `admin`."""
        found = await disk_use.report(control, principal, host_id)
        items = [DiskItem(**dataclasses.asdict(one)) for one in found]
        return DiskAnswer(items=items, total_bytes=sum(one.own_bytes for one in items))

    @router.post("/v1/hosts/{host_id}/gc")
    async def collect_garbage(principal: CurrentPrincipal, host_id: PathUuid, body: GarbageAsk) -> GarbageAnswer:
        """What takes disk space on the host and nothing needs; removed when `remove` says so. Scope `admin`."""
        found = await garbage.collect(
            control, principal, host_id, remove=body.remove, remove_volumes=body.remove_volumes
        )
        items = [GarbageItem(kind=one.kind, name=one.name, size_bytes=one.size_bytes) for one in found]
        return GarbageAnswer(removed=body.remove, items=items, total_bytes=sum(one.size_bytes for one in found))

    @router.post("/v1/diagnosis")
    async def look_into(principal: CurrentPrincipal, body: DiagnosisAsk) -> dict[str, Any]:
        """Look into a process of the server, or the agent of a guest, while it runs. 409 `conflict` while another look goes on. Scope `admin`."""
        if body.kind == "guest":
            if body.instance_id is None:
                raise InvalidRequestError("instance_id: must be given for the kind guest")
            return await diagnosis.look_into_guest(control, principal, body.instance_id)
        return await diagnosis.look_into(control, principal, body.host_id, body.kind, seconds=body.seconds)

    @router.post("/v1/backup", response_class=StreamingResponse, responses=BACKUP_ANSWER)
    async def back_up(principal: CurrentPrincipal, body: Nothing) -> StreamingResponse:
        """The server's whole state as a tar file, while it runs. Over the unix socket alone. 409 `conflict` while a backup is being made."""
        stack = AsyncExitStack()
        made = await stack.enter_async_context(backup.begin(control, principal))

        async def pieces() -> AsyncIterator[bytes]:
            async with stack:
                async for piece in made.pieces():
                    yield piece

        headers = {"Innkeeper-Rooms": str(made.instances), "Innkeeper-Estimated-Bytes": str(made.estimate_bytes)}
        return StreamingResponse(pieces(), media_type="application/x-tar", headers=headers)

    @router.get("/v1/log-level")
    async def log_level(principal: CurrentPrincipal) -> list[LevelAnswer]:
        """From which level on each process logs. Scope `admin`."""
        return [_level(one) for one in await diagnosis.log_levels(control, principal)]

    @router.put("/v1/log-level")
    async def set_log_level(principal: CurrentPrincipal, body: LogLevelChange) -> list[LevelAnswer]:
        """Have every process log from this level on, until it ends. Scope `admin`."""
        return [_level(one) for one in await diagnosis.log_levels(control, principal, level=body.level)]


_OWN_FIELDS = frozenset(
    {"id", "name", "draining", "drain_deadline", "rooms", "open_calls", "reachable"}
    | {"driver", "platform", "isolation_level", "reason", "drivers"}
)


def host_answer(view: HostView) -> HostAnswer:
    """A host on the wire."""
    usual = None if view.default is None else view.default.isolation
    return HostAnswer(
        id=view.host.id,
        name=view.host.name,
        draining=view.host.draining,
        drain_deadline=view.host.drain_deadline,
        rooms=view.rooms,
        open_calls=view.open_calls,
        reachable=view.reachable,
        driver=None if usual is None else usual.driver,
        platform=None if usual is None else usual.platform,
        isolation_level=None if usual is None else usual.level,
        reason=None if usual is None else usual.reason,
        drivers=[DriverAnswer.model_validate(one.to_wire()) for one in view.offers] if view.reachable else None,
        **{name: view.status.get(name) for name in HostAnswer.model_fields.keys() - _OWN_FIELDS},
    )


def _capacity(report: CapacityReport) -> CapacityAnswer:
    return CapacityAnswer(
        host_id=report.host.id,
        name=report.host.name,
        draining=report.host.draining,
        **dataclasses.asdict(report.capacity),
        instances=report.instances,
        profiles=[
            ProfileRoomAnswer(
                profile_id=one.profile.id,
                profile_name=one.profile.name,
                organization=one.organization,
                memory_mb=one.profile.memory_mb,
                more=one.room.count,
                bound_by=one.room.bound_by,
            )
            for one in report.profiles
        ],
    )


def _level(found: ProcessLevel) -> LevelAnswer:
    return LevelAnswer(process="api" if found.host_id is None else "host", host_id=found.host_id, level=found.level)
