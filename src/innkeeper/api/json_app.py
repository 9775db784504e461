"""The JSON endpoints that are not hot: FastAPI routes behind a gate that authenticates first and reads a bounded body."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BeforeValidator
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from innkeeper.api.auth import has_credential
from innkeeper.api.body import read_json_body
from innkeeper.api.edge import ROUTE
from innkeeper.api.errors import FieldsError, MethodNotAllowedError
from innkeeper.api.once import Once
from innkeeper.api.raw_path import decode_text, raw_path
from innkeeper.core.token import Principal
from innkeeper.errors import NotFoundError
from innkeeper.ids import parse_uuid

PRINCIPAL = "innkeeper.principal"
# What is read of a request before it is known whose it is.
KEY_BODY_MAX_BYTES = 64 << 10
Authenticate = Callable[[Scope], Awaitable[Principal]]


def _canonical_uuid(value: object) -> object:
    if isinstance(value, str) and parse_uuid(value) is None:
        raise ValueError("must be a UUID")
    return value


PathUuid = Annotated[UUID, BeforeValidator(_canonical_uuid)]


def _principal(request: Request) -> Principal:
    principal: Principal = request.scope[PRINCIPAL]
    return principal


CurrentPrincipal = Annotated[Principal, Depends(_principal)]


def build_json_app(router: APIRouter) -> FastAPI:
    """A FastAPI application that raises what went wrong instead of answering it: the edge knows the dialect."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.include_router(router)

    async def reraise(_: Request, error: Exception) -> Response:
        raise error

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101
        raise FieldsError(error.errors()) from None

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101
        if error.status_code == 404:
            raise NotFoundError("There is no such endpoint.") from None
        if error.status_code == 405:
            # Starlette names the methods of the first route of the path only.
            raise MethodNotAllowedError(_methods(router, request.scope)) from None
        raise error

    # Without it Starlette answers 500 itself, before the edge sees the error.
    app.add_exception_handler(Exception, reraise)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)
    return app


def routes_of(router: APIRouter) -> frozenset[tuple[str, str]]:
    """What the router serves: (method, path template)."""
    return frozenset(
        (method, route.path) for route in router.routes if isinstance(route, Route) for method in route.methods or ()
    )


def _methods(router: APIRouter, scope: Scope) -> set[str]:
    found: set[str] = set()
    for route in router.routes:
        if isinstance(route, Route) and route.path_regex.match(scope["path"]):
            found |= route.methods or set()
    return found


def _key_of(body: bytes) -> bytes:
    """The key in a body; empty where there is none, which is as good as an unknown one."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return b""
    key = value.get("api_key") if isinstance(value, dict) else None
    return key.encode("latin-1", "replace") if isinstance(key, str) else b""


class JsonGate:
    """Authenticates, then reads the whole (bounded, checked) body, then lets FastAPI have the request."""

    def __init__(
        self,
        app: FastAPI,
        authenticate: Authenticate,
        *,
        streamed: str | None = None,
        key_in_body: str | None = None,
        once: Once | None = None,
    ) -> None:
        self._app: ASGIApp = app
        # A path whose POST may carry the key in its body, as `api_key`.
        self._key_in_body = key_in_body
        self._once = once
        self._authenticate = authenticate
        # Paths whose PUT or POST reads its body itself, as it comes.
        self._streamed = None if streamed is None else re.compile(streamed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; errors are raised."""
        path = decode_text(raw_path(scope), "path")
        if path == self._key_in_body and scope["method"] == "POST" and not has_credential(scope):
            body = await read_json_body(scope, receive, max_bytes=KEY_BODY_MAX_BYTES)
            scope["headers"] = [*scope["headers"], (b"x-api-key", _key_of(body))]
            scope[PRINCIPAL] = await self._authenticate(scope)
            await self._answer(body, scope, receive, send)
            return
        scope[PRINCIPAL] = await self._authenticate(scope)
        if self._streamed is not None and scope["method"] in ("PUT", "POST") and self._streamed.fullmatch(path):
            await self._serve(scope, receive, send)
            return
        await self._answer(await read_json_body(scope, receive), scope, receive, send)

    async def _answer(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        key = None if self._once is None else self._once.key_of(scope)
        if self._once is None or key is None:
            await self._serve(scope, replay, send)
        else:
            await self._once.answer(key, scope[PRINCIPAL], body, scope, replay, send, serve=self._serve)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            route = scope.get("route")
            if route is not None:
                scope[ROUTE] = route.path
