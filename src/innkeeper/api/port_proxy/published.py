"""Host names of shares: who may come through, and what a visitor gets."""

from __future__ import annotations

import contextlib
import time
from urllib.parse import parse_qsl, quote

from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import Receive, Scope, Send

from innkeeper.api.auth import OPERATOR
from innkeeper.api.body import header_values
from innkeeper.api.edge import ROUTE
from innkeeper.api.errors import ClientDisconnectedError, describe
from innkeeper.api.port_proxy.credentials import (
    COOKIE,
    LINK_PARAMETER,
    cookie_values,
    query_without_credentials,
    tokens_of,
)
from innkeeper.api.port_proxy.exchange import Patience, carry
from innkeeper.api.port_proxy.fields import Fields
from innkeeper.api.port_proxy.request import guest_request
from innkeeper.api.raw_connection import TAKEN_OVER
from innkeeper.api.raw_path import raw_path
from innkeeper.api.revocations import Revocations
from innkeeper.control import ports, shares, tokens
from innkeeper.control.context import Control
from innkeeper.control.shares import Target
from innkeeper.errors import InnkeeperError, InvalidRequestError, ShareNotFoundError, UnauthorizedError
from innkeeper.settings_values import comma_separated

TEMPLATE = "(share)"
PRIVATE = "This share is private: open it by a link (inn share link), or send a token of its organization."


class HostNames:
    """Which host names are shares'. What is not below the share domain is the API's, and so are the names that the operator reserved."""

    def __init__(self, control: Control) -> None:
        self._suffix = b"." + control.settings.share_domain.partition(":")[0].encode()
        self._reserved = {name.lower().encode() for name in comma_separated(control.settings.api_hosts)}

    def label(self, scope: Scope) -> str | None:
        """The part of the request's host below the share domain, or None where the host is the API's."""
        hosts = header_values(scope["headers"], b"host")
        if len(hosts) != 1 or scope.get(OPERATOR):
            return None
        host = hosts[0].lower().rpartition(b":")[0] if b":" in hosts[0] else hosts[0].lower()
        host = host.removesuffix(b".")
        if not host.endswith(self._suffix) or host in self._reserved:
            return None
        return host.removesuffix(self._suffix).decode("latin-1")


class PublishedPorts:
    """The ASGI application of all shares. Its answers are the guests'; where there is none, a plain page that tells nothing of the inside."""

    def __init__(self, control: Control, names: HostNames, revocations: Revocations) -> None:
        self._control = control
        self._names = names
        self._revocations = revocations
        self._patience = Patience(control.settings.share_answer_seconds, control.settings.share_idle_seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        scope[ROUTE] = TEMPLATE
        began = False

        async def send_noted(message: object) -> None:
            nonlocal began
            began = True
            await send(message)  # type: ignore[arg-type]

        try:
            await self._serve(scope, receive, send_noted)
        except ClientDisconnectedError:
            raise
        except Exception as error:
            if began or scope.get(TAKEN_OVER) or not isinstance(error, InnkeeperError):
                raise
            await _page(error)(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        target = shares.resolve(self._control, self._names.label(scope) or "")
        if target is None:
            raise ShareNotFoundError("There is nothing here.")
        if not target.is_public:
            welcome = await self._admit(scope, target)
            if welcome is not None:
                await welcome(scope, receive, send)
                return
        request = guest_request(scope, raw_path(scope))
        visitor = shares.visitor(target)
        async with ports.connect(self._control, visitor, target.entry, target.port) as connection:
            await carry(
                scope,
                receive,
                send,
                request=request,
                connection=connection,
                filter_fields=visitor_fields,
                patience=self._patience,
            )

    async def _admit(self, scope: Scope, target: Target) -> Response | None:
        """Let the holder of a token, a link or a link's cookie through: None, or where a link was followed, the way to the same page without it.

        Raises:
            UnauthorizedError: none of these.

        """
        fields = scope["headers"]
        for signature in _link_signatures(scope["query_string"]):
            expires_at = shares.link_opens(self._control, target, signature)
            if expires_at is not None:
                # Whoever asks for a page is a browser, which keeps cookies; a program just wants the answer.
                shown = any(b"text/html" in value for value in header_values(fields, b"accept"))
                return self._welcome(scope, target, expires_at) if shown and scope["method"] == "GET" else None
        if _same_origin(scope) and any(
            shares.visit_opens(self._control, target, value) for value in cookie_values(fields)
        ):
            return None
        for token in tokens_of(fields):
            with contextlib.suppress(UnauthorizedError):
                principal = await tokens.authenticate(self._control, token)
                if shares.admits(target, principal):
                    self._revocations.begin(scope, principal)
                    return None
        raise UnauthorizedError(PRIVATE)

    def _welcome(self, scope: Scope, target: Target, expires_at: int) -> Response:
        """Keep the visit in a cookie and take the signature out of the address, so that neither history nor Referer have it."""
        host = header_values(scope["headers"], b"host")[0].decode("latin-1")
        query = query_without_credentials(scope["query_string"]).decode("latin-1")
        path = quote(raw_path(scope).decode("latin-1"), safe="/%:@!$&'()*+,;=-._~")
        # With scheme and host: a path that begins with two slashes would be another host's.
        where = f"{scope['scheme']}://{host}{path}" + (f"?{query}" if query else "")
        answer = RedirectResponse(where, status_code=303)
        answer.set_cookie(
            COOKIE,
            shares.visit_signature(self._control, target, expires_at=expires_at),
            max_age=max(1, expires_at - int(time.time())),
            httponly=True,
            secure=scope["scheme"] == "https",
            samesite="lax",
        )
        answer.headers.update({"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"})
        return answer


def visitor_fields(fields: Fields) -> Fields:
    """A guest's fields as a visitor gets them: cookies are this host's own, and never ours."""
    kept: Fields = []
    for name, value in fields:
        if name != b"set-cookie":
            kept.append((name, value))
            continue
        pair, *attributes = value.split(b";")
        if pair.partition(b"=")[0].strip() != COOKIE.encode():
            # A cookie for the domain above would reach other shares, and the API where it is on that domain.
            own = [one for one in attributes if one.partition(b"=")[0].strip().lower() != b"domain"]
            kept.append((name, b";".join([pair, *own])))
    return kept


def _link_signatures(query: bytes) -> list[str]:
    if LINK_PARAMETER.encode() not in query:
        return []
    try:
        pairs = parse_qsl(query.decode("ascii"), max_num_fields=100)
    except ValueError:
        return []
    return [value for name, value in pairs if name == LINK_PARAMETER][:4]


def _same_origin(scope: Scope) -> bool:
    """Whether the cookie may count: a page of another share, which browsers take for the same site, could send it along otherwise."""
    origins = header_values(scope["headers"], b"origin")
    hosts = header_values(scope["headers"], b"host")
    return not origins or all(origin.lower().partition(b"://")[2] == hosts[0].lower() for origin in origins)


def _page(error: InnkeeperError) -> Response:
    status, _, message, headers = describe(error)
    if isinstance(error, InvalidRequestError):
        # Where it ended is a matter of opinion.
        headers["Connection"] = "close"
    return PlainTextResponse(f"{status} {message}\n", status, {**headers, "Cache-Control": "no-store"})
