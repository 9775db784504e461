"""What the clients of InstaVM know and this server does not have: 501 with a sentence, in place of an endpoint that seems to be misspelt."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from innkeeper.api.edge import ROUTE
from innkeeper.api.raw_path import raw_path
from innkeeper.core.token import Principal
from innkeeper.errors import NotHereError

# By path, method aside; the first that fits.
NOT_HERE: tuple[tuple[str, str], ...] = (
    (r"/v1/browser/.*", "Browser sessions are not part of this server"),
    (r"/v1/computeruse/.*", "Desktops are not part of this server"),
    (r"/v1/recordings(/.*)?", "Recordings are not part of this server"),
    (r"/v1/templates(/.*)?", "Templates are not part of this server"),
    (r"/v1/(tapes(/.*)?|sessions/[^/]+/tape/.*)", "Tapes are not part of this server"),
    (r"/v1/credits/.*", "Credits are not part of this server; see /v1/users/me/usage-breakdown"),
    (r"/v1/webhooks/.*", "Webhooks are not part of this server; see /v1/audit/events"),
    (r"/v1/vaults(/.*)?", "Vaults are not part of this server yet"),
    (r"/v1/egress/.*", "A VM's egress cannot be changed yet; it is given with `egress_policy` in POST /v1/vms"),
    (r"/v1/custom-domains(/.*)?", "Custom domains are not part of this server yet"),
)
_TABLE = tuple((re.compile(pattern.encode()), sentence) for pattern, sentence in NOT_HERE)


class NotHere:
    """Answers for what is not here, and hands everything else on."""

    def __init__(self, inner: ASGIApp, authenticate: Callable[[Scope], Awaitable[Principal]]) -> None:
        self._inner = inner
        self._authenticate = authenticate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        path = raw_path(scope)
        sentence = next((sentence for pattern, sentence in _TABLE if pattern.fullmatch(path)), None)
        if sentence is None:
            await self._inner(scope, receive, send)
            return
        await self._authenticate(scope)
        scope[ROUTE] = "(not here)"
        raise NotHereError(sentence)
