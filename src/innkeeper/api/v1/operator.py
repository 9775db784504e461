"""The operator's endpoints under `/v1`: what no tenant may ask."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from innkeeper.api.json_app import CurrentPrincipal
from innkeeper.api.v1.operator_schemas import DiagnosisAsk, LevelAnswer, LogLevelChange
from innkeeper.control import diagnosis
from innkeeper.control.context import Control
from innkeeper.control.diagnosis import ProcessLevel


def add_routes(router: APIRouter, control: Control) -> None:
    """Add the routes; each is one use case that asks for the scope `admin`."""

    @router.post("/v1/diagnosis")
    async def look_into(principal: CurrentPrincipal, body: DiagnosisAsk) -> dict[str, Any]:
        """Look into a process of the server while it runs. 409 `conflict` while that process is being looked into already. Scope `admin`."""
        return await diagnosis.look_into(control, principal, body.host_id, body.kind, seconds=body.seconds)

    @router.get("/v1/log-level")
    async def log_level(principal: CurrentPrincipal) -> list[LevelAnswer]:
        """From which level on each process logs. Scope `admin`."""
        return [_level(one) for one in await diagnosis.log_levels(control, principal)]

    @router.put("/v1/log-level")
    async def set_log_level(principal: CurrentPrincipal, body: LogLevelChange) -> list[LevelAnswer]:
        """Have every process log from this level on, until it ends. Scope `admin`."""
        return [_level(one) for one in await diagnosis.log_levels(control, principal, level=body.level)]


def _level(found: ProcessLevel) -> LevelAnswer:
    return LevelAnswer(process="api" if found.host_id is None else "host", host_id=found.host_id, level=found.level)
