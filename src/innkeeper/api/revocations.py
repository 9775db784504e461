"""Tokens that are revoked while something is sent in their name: what streams ends then, as if its bearer had come only now."""

from __future__ import annotations

import asyncio
from uuid import UUID

from starlette.types import Message, Scope

from innkeeper.control.token_cache import TokenCache
from innkeeper.core.token import Principal
from innkeeper.errors import UnauthorizedError

HELD = "innkeeper.held"
REVOKED = "The token was revoked"


class Held:
    """One request in a token's name. Where its answer has not begun when that is revoked, it is carried out to its end."""

    def __init__(self, token_id: UUID) -> None:
        self.token_id = token_id
        self.revoked = asyncio.Event()
        self.was_cut = False
        self._task = asyncio.current_task()
        self._streams = False

    def sends(self, message: Message) -> None:
        """A part of the answer goes out; from the first one to the last it is a stream."""
        self._streams = message["type"] == "http.response.start" or message.get("more_body", False)
        self._cut()

    def takes_over(self) -> None:
        """Its connection carries something else than an answer from now on."""
        self._streams = True
        self._cut()

    def revoke(self) -> None:
        """The token is worth nothing any more."""
        self.revoked.set()
        self._cut()

    def _cut(self) -> None:
        if self._streams and self.revoked.is_set() and not self.was_cut and self._task is not None:
            self.was_cut = True
            self._task.cancel()


class Revocations:
    """The requests that are under way in tokens' names."""

    def __init__(self, tokens: TokenCache) -> None:
        self._tokens = tokens

    def begin(self, scope: Scope, principal: Principal) -> None:
        """Follow a request, which its current task ends with; in one step with its authentication, lest a revocation fall in between. `end` must follow."""
        if principal.token_id is not None and HELD not in scope:
            held = scope[HELD] = Held(principal.token_id)
            self._tokens.hold(held.token_id, held.revoke)

    def end(self, scope: Scope) -> None:
        """The request is over; nothing for one in no token's name."""
        held = scope.pop(HELD, None)
        if held is not None:
            self._tokens.let_go(held.token_id, held.revoke)


async def until_revoked(scope: Scope) -> None:
    """Waits. Raises UnauthorizedError when the token of a request is revoked."""
    held = scope.get(HELD)
    if held is None:
        await asyncio.get_running_loop().create_future()
        raise AssertionError
    await held.revoked.wait()
    raise UnauthorizedError(REVOKED)


def takes_over(scope: Scope) -> None:
    """The connection of a request becomes a way to somebody else, which ends with the token of the request."""
    held = scope.get(HELD)
    if held is not None:
        held.takes_over()
