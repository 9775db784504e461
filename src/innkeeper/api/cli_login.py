"""`instavm login`: two endpoints for the command line, and the page on which a person says yes.

The page has no script, and its form goes to this server and the person's own machine alone. The token is in a body, never in an address.
"""

from __future__ import annotations

import html
import inspect
from typing import Any
from urllib.parse import parse_qs
from uuid import UUID

from pydantic import BaseModel, ConfigDict
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import Receive, Scope, Send

from innkeeper.api.body import header_values, read_body, read_json_body
from innkeeper.api.edge import ROUTE
from innkeeper.api.errors import MethodNotAllowedError, validate_json
from innkeeper.api.openapi import error_responses, json_content
from innkeeper.api.rate_limit import AddressRateLimit
from innkeeper.api.raw_path import raw_path
from innkeeper.api.v1.schemas import DetailError
from innkeeper.control.cli_login import PairingRequest, Pairings
from innkeeper.control.context import Control
from innkeeper.errors import (
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    UnauthorizedError,
)

API_PREFIX, PAGE_PREFIX = b"/api/cli-auth/", b"/cli-login/"
START, EXCHANGE, PAGE = "/api/cli-auth/start", "/api/cli-auth/exchange", "/cli-login/{pairing_id}"
ROUTES = {START: ("POST",), EXCHANGE: ("POST",), PAGE: ("GET", "POST")}
PER_MINUTE = 60
FORM_MAX_BYTES = 4_096
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; form-action 'self' http://127.0.0.1:*; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
PAGE_ANSWERS = {
    "200": "The page with its form.",
    "403": "The page again: the token may not make keys.",
    "404": "There is no such login any more.",
}
_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Log in a command line</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 32rem; margin: 4rem auto; padding: 0 1rem; color: #222; }}
input, button {{ font: inherit; padding: .4rem .6rem; }}
input {{ width: 100%; box-sizing: border-box; margin: .3rem 0 1rem; }}
.refused {{ color: #a00; }}
</style>
</head>
<body>
<h1>{title}</h1>
{content}
</body>
</html>
"""
_FORM = """\
<p>The command line on <b>{hostname}</b> asks for an API key. It gets one of its own, <q>CLI - {hostname}</q>, which you can revoke by itself.</p>
<p>Say yes only if you have just run <code>login</code> there.</p>
{refused}
<form method="post" autocomplete="off">
<label for="token">A token of yours that may make keys</label>
<input id="token" name="token" type="password" required autofocus maxlength="256">
<button>Log in</button>
</form>
"""


class StartRequest(BaseModel):
    """Body of POST /api/cli-auth/start."""

    model_config = ConfigDict(extra="ignore", strict=True)

    state: str
    code_challenge: str
    code_challenge_method: str = "S256"
    redirect_uri: str
    hostname: str = "unknown"
    cli_version: str = ""


class ExchangeRequest(BaseModel):
    """Body of POST /api/cli-auth/exchange."""

    model_config = ConfigDict(extra="ignore", strict=True)

    pairing_id: str
    code: str
    code_verifier: str


class StartAnswer(BaseModel):
    """A pairing, and the page on which a person approves it."""

    pairing_id: str
    login_url: str


class LoggedInUser(BaseModel):
    """Who the key stands for."""

    id: UUID
    email: str | None
    name: str


class ExchangeAnswer(BaseModel):
    """The key, which is in no other answer."""

    api_key: str
    user: LoggedInUser


MODELS = (StartRequest, StartAnswer, ExchangeRequest, ExchangeAnswer)


def build_paths() -> dict[str, dict[str, Any]]:
    """The OpenAPI operations, by template."""

    def operation(name: str, body: dict[str, Any] | None, answers: dict[str, Any]) -> dict[str, Any]:
        errors = error_responses(DetailError, ("400", "404", "405", "413", "429", "500"))
        asked = {} if body is None else {"requestBody": {"required": True, "content": body}}
        return {
            "tags": ["login"], "operationId": name, "security": [], "parameters": [], **asked, "responses": {**errors, **answers}
        }  # fmt: skip

    pairing = {"name": "pairing_id", "in": "path", "required": True, "schema": {"type": "string"}}
    form = {"type": "object", "required": ["token"], "properties": {"token": {"type": "string"}}}
    html_page = {code: {"description": text, "content": {"text/html": {}}} for code, text in PAGE_ANSWERS.items()}
    page = operation("get_login_page", None, html_page)
    posted = operation("approve_login", {"application/x-www-form-urlencoded": {"schema": form}}, html_page)
    posted["responses"]["303"] = {"description": "To the command line that asks."}
    return {
        START: {"post": operation("begin_login", json_content(StartRequest), _ok(StartAnswer))},
        EXCHANGE: {"post": operation("finish_login", json_content(ExchangeRequest), _ok(ExchangeAnswer))},
        PAGE: {"get": {**page, "parameters": [pairing]}, "post": {**posted, "parameters": [pairing]}},
    }


def _ok(model: type[BaseModel]) -> dict[str, Any]:
    return {"200": {"description": inspect.getdoc(model), "content": json_content(model)}}


class CliLogin:
    """The ASGI application of both prefixes."""

    def __init__(self, control: Control, pairings: Pairings) -> None:
        self._control = control
        self._pairings = pairings
        self._limit = AddressRateLimit(PER_MINUTE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Nobody is known yet, so an address may ask so often only."""
        client = scope.get("client")
        self._limit.check(client[0] if client else "")
        path = raw_path(scope).decode("ascii", "replace")
        page = path.startswith(PAGE_PREFIX.decode())
        template = PAGE if page else path
        if template not in ROUTES:
            raise NotFoundError("There is no such endpoint.")
        scope[ROUTE] = template
        if scope["method"] not in ROUTES[template]:
            raise MethodNotAllowedError(ROUTES[template])
        if page:
            answer = await self._page(path.removeprefix(PAGE_PREFIX.decode()), scope, receive)
        elif template == START:
            answer = self._start(scope, validate_json(StartRequest, await read_json_body(scope, receive)))
        else:
            answer = await self._exchange(validate_json(ExchangeRequest, await read_json_body(scope, receive)))
        await answer(scope, receive, send)

    def _start(self, scope: Scope, body: StartRequest) -> Response:
        if body.code_challenge_method != "S256":
            raise InvalidRequestError("code_challenge_method: must be S256")
        asked = PairingRequest(
            body.state, body.code_challenge, body.redirect_uri, hostname=body.hostname, cli_version=body.cli_version
        )
        hosts = header_values(scope["headers"], b"host")
        if len(hosts) != 1:
            raise InvalidRequestError("Host: exactly one is required")
        pairing_id = self._pairings.begin(asked)
        # As the command line itself reached us.
        where = f"{scope.get('scheme', 'http')}://{hosts[0].decode('latin-1')}"
        return JSONResponse({"pairing_id": pairing_id, "login_url": f"{where}/cli-login/{pairing_id}"})

    async def _exchange(self, body: ExchangeRequest) -> Response:
        done = await self._pairings.exchange(self._control, body.pairing_id, body.code, body.code_verifier)
        user = {"id": str(done.account.id), "email": done.account.email, "name": done.account.organization}
        return JSONResponse({"api_key": done.api_key, "user": user}, headers={"Cache-Control": "no-store"})

    async def _page(self, pairing_id: str, scope: Scope, receive: Receive) -> Response:
        try:
            hostname = html.escape(self._pairings.asked(pairing_id).hostname)
            refused = ""
            if scope["method"] == "POST":
                body = await read_body(scope, receive, max_bytes=FORM_MAX_BYTES)
                token = parse_qs(body.decode("utf-8", "replace"), max_num_fields=4).get("token", [""])[0].strip()
                try:
                    target = await self._pairings.approve(self._control, pairing_id, token)
                except (UnauthorizedError, ForbiddenError) as error:
                    refused = f'<p class="refused">{html.escape(error.message)}</p>'
                else:
                    return RedirectResponse(target, 303, HEADERS)
            content = _FORM.format(hostname=hostname, refused=refused)
            return _html("Log in a command line", content, 403 if refused else 200)
        except NotFoundError as error:
            return _html(html.escape(error.message), "<p>Run <code>login</code> again.</p>", 404)


def _html(title: str, content: str, status: int) -> Response:
    return HTMLResponse(_PAGE.format(title=title, content=content), status, HEADERS)
