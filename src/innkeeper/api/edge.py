"""The outermost ASGI application: request ids, one log line and one measurement a request, and every error in its dialect's shape."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import structlog
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from innkeeper.api import sse
from innkeeper.api.body import header_values
from innkeeper.api.errors import ClientDisconnectedError, ErrorAnswer, describe
from innkeeper.api.metrics import HttpMetrics
from innkeeper.api.raw_connection import TAKEN_OVER
from innkeeper.api.raw_path import raw_path
from innkeeper.api.requests_at_once import RequestsAtOnce
from innkeeper.api.revocations import HELD, REVOKED, Revocations
from innkeeper.control.lifecycle import INSTANCE_ID
from innkeeper.errors import NotFoundError, UnauthorizedError

log = structlog.get_logger("innkeeper.api")

# What a route leaves in the scope for the log and the metrics: its template, never the path itself.
ROUTE = "innkeeper.route"
REQUEST_ID = "innkeeper.request_id"
UNKNOWN_ROUTE = "(unknown)"
CLIENT_CLOSED = 499
GOODBYE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Surface:
    """A part of the URL space: its path prefixes, its answers to errors, the application that answers, and its routes: (method, path template)."""

    prefixes: tuple[bytes, ...]
    answer_error: ErrorAnswer
    app: ASGIApp
    routes: frozenset[tuple[str, str]]


class Edge:
    """Finds the surface of a request, by its host where that is a share's, else by its path, and answers for whatever it raises."""

    def __init__(
        self,
        surfaces: Sequence[Surface],
        *,
        published: Callable[[Scope], Surface | None],
        default_answer: ErrorAnswer,
        metrics: HttpMetrics,
        requests: RequestsAtOnce,
        revocations: Revocations,
    ) -> None:
        pairs = [(prefix, surface) for surface in surfaces for prefix in surface.prefixes]
        # Everything that is served, from the tables that serve it.
        self.routes = frozenset[tuple[str, str]]().union(*(surface.routes for surface in surfaces))
        self._surfaces = sorted(pairs, key=lambda pair: -len(pair[0]))
        # By host, before any path is looked at: what guests publish is never served on the API's origin.
        self._published = published
        self._default_answer = default_answer
        self._metrics = metrics
        self._requests = requests
        self._revocations = revocations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "http":
            await self._serve(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})
        elif scope["type"] == "lifespan":
            await _lifespan(receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = perf_counter()
        request_id = secrets.token_hex(8)
        scope[REQUEST_ID] = request_id
        status = 0
        tells_events = False
        header = (b"x-request-id", request_id.encode())

        async def send_marked(message: Message) -> None:
            nonlocal status, tells_events
            if message["type"] == "http.response.start":
                status = message["status"]
                tells_events = any(
                    value.startswith(sse.MEDIA_TYPE) for value in header_values(message["headers"], b"content-type")
                )
                message["headers"] = [*message["headers"], header]
            held = scope.get(HELD)
            if held is not None:
                held.sends(message)
            await send(message)

        surface = self._published(scope)
        if surface is None:
            _collapse(scope)
            path = raw_path(scope)
            surface = next((surface for prefix, surface in self._surfaces if path.startswith(prefix)), None)
        tokens = structlog.contextvars.bind_contextvars(request_id=request_id)
        failure: BaseException | None = None
        self._metrics.in_flight.inc()
        try:
            if surface is None:
                raise NotFoundError("There is no such endpoint.")
            await surface.app(scope, receive, send_marked)
        except ClientDisconnectedError:
            status = status or CLIENT_CLOSED
        except asyncio.CancelledError:
            status = status or CLIENT_CLOSED
            if not _was_cut(scope):
                raise
            failure = UnauthorizedError(REVOKED)
            if tells_events and surface is not None:
                await _say_last(surface.answer_error(failure, request_id), send)
            # Else the connection is cut, as below.
        except Exception as error:
            # The last line: whatever it is, the client gets its dialect's shape.
            failure = error
            if status == 0:
                answer_error = surface.answer_error if surface else self._default_answer
                response = answer_error(error, request_id)
                await response(scope, receive, send_marked)
            # Else the answer broke in the middle: returning without an end makes the server cut the connection, so the client sees it.
        finally:
            self._requests.end(scope)
            self._revocations.end(scope)
            status = scope.get(TAKEN_OVER, status)
            self._metrics.in_flight.dec()
            seconds = perf_counter() - started
            route = scope.get(ROUTE, UNKNOWN_ROUTE)
            self._metrics.observe(scope["method"], route, status, seconds)
            self._log(scope, route, status, seconds, failure)
            structlog.contextvars.reset_contextvars(**tokens)
            structlog.contextvars.unbind_contextvars(INSTANCE_ID)

    def _log(self, scope: Scope, route: str, status: int, seconds: float, failure: BaseException | None) -> None:
        fields: dict[str, Any] = {
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 2),
        }
        if failure is not None and describe(failure)[1] == "internal_error":  # type: ignore[arg-type]
            log.error("request failed", exc_info=failure, **fields)
        elif failure is not None and status < 400:
            log.warning("answer cut", error=describe(failure)[1], **fields)  # type: ignore[arg-type]
        else:
            log.info("request", **fields)


def _was_cut(scope: Scope) -> bool:
    """Whether the current task was cancelled because of a token that was revoked, and only for that."""
    held, task = scope.get(HELD), asyncio.current_task()
    return held is not None and held.was_cut and task is not None and task.uncancel() == 0


async def _say_last(answer: Response, send: Send) -> None:
    """End a stream of events by the error's, unless the client does not read it."""
    frame = b"event: error\ndata: " + bytes(answer.body) + b"\n\n"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GOODBYE_SECONDS):
            await send({"type": "http.response.body", "body": frame, "more_body": False})


def _collapse(scope: Scope) -> None:
    """Make one slash of several that a path begins with: clients of InstaVM put `/v1/vms` behind the base they were given, also where that ends with one."""
    raw = scope.get("raw_path")
    if raw is not None and raw.startswith(b"//"):
        scope["raw_path"] = b"/" + raw.lstrip(b"/")
        scope["path"] = "/" + scope["path"].lstrip("/")


async def _lifespan(receive: Receive, send: Send) -> None:
    # The launcher owns what lives as long as the process; here is nothing to start.
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
