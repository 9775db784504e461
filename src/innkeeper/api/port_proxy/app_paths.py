"""`/v1/app/{session}/{port}/{path}`: a guest's port below the API's own address, for programs that send a token.

Whatever a guest answers here comes from the API's origin. So nothing of ours goes in, nothing that would stay in a browser comes out, and a page runs
in a sandbox in which it has no origin at all.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from functools import partial

from starlette.responses import RedirectResponse
from starlette.types import Receive, Scope, Send

from innkeeper.api.edge import ROUTE
from innkeeper.api.errors import MethodNotAllowedError
from innkeeper.api.port_proxy.exchange import Patience, carry
from innkeeper.api.port_proxy.fields import Fields
from innkeeper.api.port_proxy.request import guest_request
from innkeeper.api.raw_path import raw_path
from innkeeper.control import ports, sessions
from innkeeper.control.context import Control
from innkeeper.core.token import Principal
from innkeeper.errors import NotFoundError, SessionNotFoundError
from innkeeper.ids import parse_uuid

PREFIX = b"/v1/app/"
TEMPLATE = "/v1/app/{session}/{port}/{path}"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_PATH = re.compile(rb"/v1/app/([0-9A-Fa-f-]{36})/([1-9][0-9]{0,4})(/.*)?")
# The Referer and the Origin are ours, and a cookie here is somebody's on the API.
_DROPPED = frozenset({b"cookie", b"authorization", b"x-api-key", b"referer", b"origin"})
# What a browser would keep for the whole origin, or do in its name.
_KEPT_BY_BROWSERS = frozenset(
    {
        b"set-cookie", b"clear-site-data", b"strict-transport-security", b"public-key-pins", b"alt-svc", b"nel", b"report-to",
        b"reporting-endpoints", b"service-worker-allowed", b"origin-agent-cluster", b"www-authenticate", b"refresh", b"accept-ch",
        b"content-security-policy", b"content-security-policy-report-only", b"referrer-policy", b"x-content-type-options",
        b"access-control-allow-credentials", b"speculation-rules",
    }
)  # fmt: skip
_SANDBOX = [
    (b"content-security-policy", b"sandbox allow-scripts allow-forms allow-popups allow-modals allow-downloads"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


class AppPaths:
    """The ASGI application of the path form; errors are raised, the edge answers them."""

    def __init__(self, control: Control, authenticate: Callable[[Scope], Awaitable[Principal]]) -> None:
        self._control = control
        self._authenticate = authenticate
        self._patience = Patience(control.settings.share_answer_seconds, control.settings.share_idle_seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        scope[ROUTE] = TEMPLATE
        principal = await self._authenticate(scope)
        if scope["method"] not in METHODS:
            raise MethodNotAllowedError(METHODS)
        match = _PATH.fullmatch(raw_path(scope))
        session = None if match is None else parse_uuid(match[1].decode())
        if match is None or session is None or int(match[2]) > 65_535:
            raise NotFoundError("There is no such endpoint.")
        entry = await sessions.existing_entry(self._control, principal, session)
        if entry is None:
            raise SessionNotFoundError("The session has no VM that lives")
        if match[3] is None:
            # Relative addresses of the guest's pages need the slash.
            await RedirectResponse(f"{int(match[2])}/", status_code=307)(scope, receive, send)
            return
        prefix = match[0].removesuffix(match[3])
        request = guest_request(scope, match[3], drop=_DROPPED)
        async with ports.connect(self._control, principal, entry, int(match[2])) as connection:
            await carry(
                scope,
                receive,
                send,
                request=request,
                connection=connection,
                filter_fields=partial(sandboxed_fields, prefix=prefix),
                patience=self._patience,
            )


def sandboxed_fields(fields: Fields, *, prefix: bytes) -> Fields:
    """A guest's fields as they may come from the API's origin; its own absolute paths lead below the prefix."""
    kept: Fields = []
    for name, value in fields:
        if name in _KEPT_BY_BROWSERS:
            continue
        below = name in (b"location", b"content-location") and value.startswith(b"/") and not value.startswith(b"//")
        kept.append((name, prefix + value if below else value))
    return kept + _SANDBOX
