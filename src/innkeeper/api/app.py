"""Puts the HTTP edge together: `build_app(control)` is the whole server as one ASGI application."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from starlette.types import Scope

from innkeeper.api import cli_login
from innkeeper.api.auth import OPERATOR, authenticate
from innkeeper.api.dialects.gentility import openapi as gentility_openapi
from innkeeper.api.dialects.gentility import profiles, public_files
from innkeeper.api.dialects.gentility import schemas as gentility
from innkeeper.api.dialects.gentility.surface import ROUTES as ROOM_ROUTES
from innkeeper.api.dialects.gentility.surface import GentilitySurface
from innkeeper.api.dialects.gentity import schemas as gentity
from innkeeper.api.dialects.gentity import tokens as gentity_tokens
from innkeeper.api.edge import Edge, Surface
from innkeeper.api.errors import in_shape
from innkeeper.api.json_app import JsonGate, build_json_app, routes_of
from innkeeper.api.metrics import HttpMetrics
from innkeeper.api.once import Once
from innkeeper.api.openapi import build_openapi
from innkeeper.api.operations import PATHS, Operations
from innkeeper.api.port_proxy import app_paths
from innkeeper.api.port_proxy.published import HostNames, PublishedPorts
from innkeeper.api.rate_limit import AddressRateLimit
from innkeeper.api.requests_at_once import RequestsAtOnce
from innkeeper.api.revocations import Revocations
from innkeeper.api.v1 import dialect, volume_files
from innkeeper.api.v1 import files as vm_files
from innkeeper.api.v1 import routes as v1_routes
from innkeeper.api.v1 import schemas as v1
from innkeeper.api.v1.image_builds import CONTEXT_PATH
from innkeeper.api.v1.images import ARCHIVE_PATH
from innkeeper.api.v1.not_here import NotHere
from innkeeper.api.v1.sessions import CREATE_PATH
from innkeeper.api.v1.terminal_socket import TerminalSockets
from innkeeper.api.v1.terminals import ROOM_BASES, VM_BASES
from innkeeper.api.v1.vm_schemas import FieldProblems
from innkeeper.control.cli_login import Pairings
from innkeeper.control.context import Control
from innkeeper.core.token import Principal

READING = ("GET", "HEAD")


def build_app(control: Control) -> Edge:
    """The ASGI application over a running control side. It starts and stops nothing itself."""

    requests = RequestsAtOnce(control.settings.max_requests_per_organization)
    revocations = Revocations(control.tokens)

    async def known(scope: Scope, *, accept_api_key: bool) -> Principal:
        principal = await authenticate(control, scope, accept_api_key=accept_api_key)
        revocations.begin(scope, principal)
        if not scope.get(OPERATOR):
            requests.begin(scope, principal.organization_id)
        return principal

    async def bearer(scope: Scope) -> Principal:
        return await known(scope, accept_api_key=False)

    async def bearer_or_key(scope: Scope) -> Principal:
        return await known(scope, accept_api_key=True)

    metrics = HttpMetrics()
    profile_routes = profiles.build_router(control)
    token_routes = gentity_tokens.build_router(control)
    own_routes = v1_routes.build_router(control)
    vm_routes = dialect.build_router(control)
    limit = AddressRateLimit(control.settings.public_files_per_minute)
    own_json = JsonGate(
        build_json_app(own_routes), bearer_or_key, once=Once(control), streamed=f"{CONTEXT_PATH}|{ARCHIVE_PATH}"
    )
    own = TerminalSockets(control, ROOM_BASES, bearer_or_key, NotHere(own_json, bearer_or_key))
    vm_json = JsonGate(
        build_json_app(vm_routes),
        bearer_or_key,
        streamed=f"{vm_files.STREAMED_PATHS}|{volume_files.STREAMED_PATHS}",
        key_in_body=CREATE_PATH,
        once=Once(control, repeatable=frozenset({CREATE_PATH, "/v1/vms"})),
    )
    vms = TerminalSockets(control, VM_BASES, bearer_or_key, NotHere(vm_json, bearer_or_key))
    surfaces = [
        Surface(
            (b"/api/",),
            in_shape(gentility.error_shape),
            GentilitySurface(control, JsonGate(build_json_app(profile_routes), bearer), bearer),
            _pairs({template: tuple(methods) for template, methods in ROOM_ROUTES.items()}) | routes_of(profile_routes),
        ),
        Surface(
            (gentity_tokens.PREFIX,),
            in_shape(gentity.error_shape),
            JsonGate(build_json_app(token_routes), bearer),
            routes_of(token_routes),
        ),
        Surface(
            (public_files.PREFIX,),
            in_shape(gentility.error_shape),
            public_files.PublicFiles(control, limit),
            _pairs({public_files.TEMPLATE: READING}),
        ),
        Surface(
            (b"/v1/",),
            in_shape(v1.error_shape),
            own,
            routes_of(own_routes) | own.routes,
        ),
        Surface(
            tuple(prefix.encode() for prefix in dialect.PREFIXES),
            dialect.answer_error,
            vms,
            routes_of(vm_routes) | vms.routes,
        ),
        Surface(
            (cli_login.API_PREFIX, cli_login.PAGE_PREFIX),
            in_shape(v1.error_shape),
            cli_login.CliLogin(control, Pairings()),
            _pairs(cli_login.ROUTES),
        ),
        Surface(
            (app_paths.PREFIX,),
            in_shape(v1.error_shape),
            app_paths.AppPaths(control, bearer_or_key),
            _pairs({app_paths.TEMPLATE: app_paths.METHODS}),
        ),
        Surface(
            (b"/",),
            in_shape(gentility.error_shape),
            Operations(control, metrics, lambda: _document(token_routes, profile_routes, own_routes, vm_routes)),
            _pairs(dict.fromkeys(PATHS, READING)),
        ),
    ]
    names = HostNames(control)
    shared = Surface((), in_shape(gentility.error_shape), PublishedPorts(control, names, revocations), frozenset())
    return Edge(
        surfaces,
        published=lambda scope: None if names.label(scope) is None else shared,
        default_answer=in_shape(gentility.error_shape),
        metrics=metrics,
        requests=requests,
        revocations=revocations,
    )


def _pairs(routes: Mapping[str, Iterable[str]]) -> frozenset[tuple[str, str]]:
    return frozenset((method, template) for template, methods in routes.items() for method in methods)


def _document(*routers: Any) -> dict[str, Any]:
    bearer: list[dict[str, list[str]]] = [{"bearer": []}]
    either: list[dict[str, list[str]]] = [*bearer, {"api_key": []}]
    return build_openapi(
        routes=[route for router in routers for route in router.routes],
        error_models={
            **dict.fromkeys(dialect.PREFIXES, v1.DetailError),
            gentity_tokens.PREFIX.decode(): gentity.GentityError,
            "/api/": gentility.ErrorAnswer,
            "/v1/": v1.DetailError,
        },
        invalid_models=dict.fromkeys(dialect.PREFIXES, FieldProblems),
        security={
            **dict.fromkeys(dialect.PREFIXES, either),
            gentity_tokens.PREFIX.decode(): bearer,
            "/api/": bearer,
            "/v1/": either,
        },
        paths={**gentility_openapi.build_paths(), **cli_login.build_paths()},
        models=(*gentility_openapi.MODELS, *cli_login.MODELS),
    )
