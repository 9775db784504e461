"""InstaVM's endpoints under `/v1` and beside it: which they are, and the form of their errors."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from innkeeper.api.errors import FieldsError, error_response
from innkeeper.api.v1.executions import add_execution_routes
from innkeeper.api.v1.files import add_file_routes
from innkeeper.api.v1.logs import VM_LOGS, add_log_routes
from innkeeper.api.v1.retention import add_retention_routes
from innkeeper.api.v1.schemas import error_shape
from innkeeper.api.v1.sessions import add_session_routes
from innkeeper.api.v1.shares import add_share_routes
from innkeeper.api.v1.snapshots import add_snapshot_routes
from innkeeper.api.v1.terminals import VM_BASES, add_terminal_routes
from innkeeper.api.v1.transfers import add_transfer_routes
from innkeeper.api.v1.vms import add_vm_routes
from innkeeper.api.v1.volume_files import add_volume_file_routes
from innkeeper.api.v1.volumes import add_volume_routes
from innkeeper.control.context import Control
from innkeeper.errors import InvalidRequestError

PREFIXES = (
    "/v1/vms",
    "/v1/sessions/",
    "/v1/shares",
    "/v1/snapshots",
    "/v1/volumes",
    "/v1/retention",
    "/v1/executions/",
    "/execute",
    "/kill",
    "/upload",
    "/download",
)


def build_router(control: Control) -> APIRouter:
    """The routes; each is one use case."""
    router = APIRouter(tags=["vms"])
    add_vm_routes(router, control)
    add_session_routes(router, control)
    add_share_routes(router, control)
    add_snapshot_routes(router, control)
    add_volume_routes(router, control)
    add_retention_routes(router, control)
    add_volume_file_routes(router, control)
    add_terminal_routes(router, control, VM_BASES)
    add_log_routes(router, control, VM_LOGS)
    add_file_routes(router, control)
    add_transfer_routes(router, control)
    add_execution_routes(router, control)
    return router


def answer_error(error: Exception, request_id: str) -> Response:
    """The answer for an error: FastAPI's list for a field that is not valid, else as everywhere under `/v1`."""
    if isinstance(error, FieldsError):
        return JSONResponse({"detail": [_problem(one) for one in error.fields]}, 422)
    if isinstance(error, HTTPException) and error.status_code == 400:
        # What FastAPI's parser gives up on, such as arrays a thousand deep.
        error = InvalidRequestError("The body is not valid JSON.")
    if isinstance(error, InvalidRequestError):
        # By convention a message begins with the name of the field.
        name, colon, text = error.message.partition(": ")
        where = [*name.split(".")] if colon and " " not in name else []
        return JSONResponse(
            {"detail": [{"loc": ["body", *where], "msg": text if where else error.message, "type": "value_error"}]}, 422
        )
    return error_response(error, error_shape, request_id)


def _problem(one: dict[str, Any]) -> dict[str, Any]:
    # Never the input, which may be a secret; names of unknown fields are the client's own text: bounded.
    where = [part if isinstance(part, int) else part[:100] for part in one["loc"]]
    return {"loc": where, "msg": one["msg"].removeprefix("Value error, "), "type": one["type"]}
