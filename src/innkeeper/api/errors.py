"""The one place that knows which HTTP status an error has. How an error is spelled is the dialect's: see `ErrorShape`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from innkeeper.errors import (
    BadAnswerError,
    ConflictError,
    ForbiddenError,
    GuestError,
    HostMismatchError,
    InnkeeperError,
    InvalidRequestError,
    LinkLostError,
    NoAnswerError,
    NotFoundError,
    NotHereError,
    PayloadTooLargeError,
    PortUnreachableError,
    ProvisioningTimeoutError,
    RateLimitedError,
    UnauthorizedError,
    UnavailableError,
)

M = TypeVar("M", bound=BaseModel)

ErrorShape = Callable[[str, str], dict[str, Any]]
"""(code, message) -> the JSON body of a dialect's errors."""

ErrorAnswer = Callable[[Exception, str], Response]
"""(error, request id) -> the answer."""

# More precise classes first.
_STATUS: tuple[tuple[type[InnkeeperError], int], ...] = (
    (InvalidRequestError, 400),
    (UnauthorizedError, 401),
    (ForbiddenError, 403),
    (NotFoundError, 404),
    (HostMismatchError, 409),
    (ConflictError, 409),
    (PayloadTooLargeError, 413),
    (NotHereError, 501),
    (RateLimitedError, 429),
    (ProvisioningTimeoutError, 504),
    (UnavailableError, 503),
    (LinkLostError, 503),
    (PortUnreachableError, 502),
    (BadAnswerError, 502),
    (NoAnswerError, 504),
)

# What the guest's own refusals mean to a client; anything else is a guest that does not work: 503.
_GUEST: dict[str, tuple[int, str]] = {
    "bad_request": (400, "invalid_request"),
    "is_a_directory": (400, "invalid_request"),
    "not_a_directory": (400, "invalid_request"),
    "not_a_regular_file": (400, "invalid_request"),
    "permission_denied": (403, "forbidden"),
    "not_found": (404, "file_not_found"),
    "no_such_process": (404, "execution_not_found"),
    "exists": (409, "conflict"),
    "no_space": (409, "conflict"),
    "too_large": (413, "payload_too_large"),
}

_HTTP_CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 413: "payload_too_large"}
_HTTP_MESSAGES = {404: "There is no such endpoint.", 405: "The endpoint does not know this method."}


class MethodNotAllowedError(InnkeeperError):
    """The endpoint does not know this method."""

    code = "method_not_allowed"

    def __init__(self, allowed: Iterable[str]) -> None:
        super().__init__()
        self.allowed = ", ".join(sorted(allowed))


class FieldsError(InvalidRequestError):
    """Fields of a request are not valid; `fields` are pydantic's errors, one each."""

    def __init__(self, fields: Sequence[dict[str, Any]]) -> None:
        super().__init__(validation_message(fields))
        self.fields = fields


class NoUpgradeError(InnkeeperError):
    """This endpoint is a WebSocket."""

    code = "upgrade_required"


class RangeNotSatisfiableError(InnkeeperError):
    """The requested range lies outside the file."""

    code = "range_not_satisfiable"

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size


class ClientDisconnectedError(Exception):
    """The client went away: there is nobody to answer."""


def describe(error: Exception) -> tuple[int, str, str, dict[str, str]]:
    """(status, code, message, headers) of an error; what is not ours becomes `internal_error` and tells nothing."""
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        code = _HTTP_CODES.get(error.status_code, "internal_error" if error.status_code >= 500 else "invalid_request")
        return error.status_code, code, _HTTP_MESSAGES.get(error.status_code, error.detail), dict(error.headers or {})
    if isinstance(error, MethodNotAllowedError):
        return 405, error.code, error.message, {"Allow": error.allowed}
    if isinstance(error, NoUpgradeError):
        return 426, error.code, error.message, {"Upgrade": "websocket", "Connection": "Upgrade"}
    if isinstance(error, RangeNotSatisfiableError):
        return 416, error.code, error.message, {"Content-Range": f"bytes */{error.size}"}
    if isinstance(error, (RateLimitedError, UnavailableError)):
        headers["Retry-After"] = str(max(1, int(error.retry_after_seconds)))
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = 'Bearer realm="innkeeper"'
    if isinstance(error, PayloadTooLargeError):
        # The rest of the body will not be read, so the connection cannot carry another request.
        headers["Connection"] = "close"
    for cls, status in _STATUS:
        if isinstance(error, cls):
            code = "instance_not_ready" if cls is LinkLostError else error.code
            if cls is LinkLostError:
                headers["Retry-After"] = "1"
            return status, code, _message(error), headers
    if isinstance(error, GuestError):
        status, code = _GUEST.get(error.guest_code, (503, "service_unavailable"))
        if status == 503:
            headers["Retry-After"] = "2"
        return status, code, _message(error), headers
    return 500, "internal_error", "Something went wrong on the server.", headers


def in_shape(shape: ErrorShape) -> ErrorAnswer:
    """What answers every error in one shape."""
    return lambda error, request_id: error_response(error, shape, request_id)


def error_response(error: Exception, shape: ErrorShape, request_id: str) -> Response:
    """The answer for an error in a dialect's shape."""
    status, code, message, headers = describe(error)
    if status >= 500 and code == "internal_error":
        message = f"{message} Request id: {request_id}"
    return JSONResponse(shape(code, message), status, headers)


def _message(error: Exception) -> str:
    return error.message if isinstance(error, InnkeeperError) else str(error)


def validation_message(errors: Sequence[Mapping[str, Any]]) -> str:
    """One sentence for pydantic's errors: the first field and what is wrong with it. It never repeats the input, which may be a secret."""
    first = errors[0]
    where = [str(part) for part in first.get("loc", ()) if part not in ("body", "query", "path", "header")]
    kind = first.get("type", "")
    if kind == "json_invalid":
        return "The body is not valid JSON."
    if kind == "extra_forbidden":
        return f"{_field(where)}: unknown field"
    if kind == "missing" and not where:
        return "A JSON body is required."
    if kind in ("model_type", "model_attributes_type", "dict_type") and not where:
        return "The body must be a JSON object."
    text = str(first.get("msg", "not valid")).removeprefix("Value error, ")
    return f"{_field(where)}: {text}" if where else text


def _field(where: list[str]) -> str:
    # Names of unknown fields are the client's own text: bounded, and made printable.
    name = ".".join(where)[:100]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)


def validate_json(model: type[M], body: bytes) -> M:
    """The model of a JSON body.

    Raises:
        InvalidRequestError: not JSON, not UTF-8, a wrong type, an unknown field.

    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise InvalidRequestError(
            validation_message(error.errors(include_url=False, include_context=False, include_input=False))
        ) from None
