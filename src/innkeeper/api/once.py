"""`Idempotency-Key`: a POST that creates something is carried out once, however often it is sent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from innkeeper.api.body import header_values
from innkeeper.control.context import Control
from innkeeper.control.idempotency import Answered
from innkeeper.core.token import Principal
from innkeeper.errors import ConflictError, InstanceNotReadyError, InvalidRequestError

HEADER = b"idempotency-key"
# What a use case may derive its ids from, so that a second attempt finds what the first one made.
ONCE_ID = "innkeeper.once_id"
ANSWER_BYTES_MAX = 1 << 20
REPLAYED = {"Idempotency-Replayed": "true"}


def _once_id(request: Request) -> UUID | None:
    found: UUID | None = request.scope.get(ONCE_ID)
    return found


OnceId = Annotated[UUID | None, Depends(_once_id)]


class Once:
    """Answers requests with a key. `repeatable`: the paths whose use cases find by ONCE_ID what a cut-short attempt made."""

    def __init__(self, control: Control, *, repeatable: frozenset[str] = frozenset()) -> None:
        self._control = control
        self._repeatable = repeatable

    def key_of(self, scope: Scope) -> str | None:
        """The key of a request that is to be carried out once. Raises InvalidRequestError for two."""
        if scope["method"] != "POST":
            return None
        values = header_values(scope["headers"], HEADER)
        if len(values) > 1:
            raise InvalidRequestError("Idempotency-Key: given more than once")
        return values[0].decode("latin-1") if values else None

    async def answer(
        self,
        key: str,
        principal: Principal,
        body: bytes,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        serve: Callable[[Scope, Receive, Send], Awaitable[None]],
    ) -> None:
        """Serve the request, or give the answer that it had; errors are raised, and leave the key free.

        Raises:
            ConflictError: an earlier attempt was cut short, and whether it did anything is not known.

        """
        control, keys = self._control, self._control.keys
        request = b"\0".join((scope["path"].encode(), scope.get("query_string", b""), body))
        begun = await keys.begin(control, principal, key, request)
        if isinstance(begun, Answered):
            kept = Response(begun.body, begun.status, REPLAYED, "application/json")
            await kept(scope, receive, send)
            return
        if begun.again and scope["path"] not in self._repeatable:
            keys.leave(principal, key)
            raise ConflictError(
                "Idempotency-Key: the answer of its request is not known; look whether it did anything, and use another"
            )
        scope[ONCE_ID] = begun.id
        answered = _Answer(send)
        try:
            await serve(scope, receive, answered.send)
        except InstanceNotReadyError:
            # It goes on: the next one with the key finds what this one began.
            keys.leave(principal, key)
            raise
        except Exception:
            await keys.end(control, principal, key, begun, None)
            raise
        except BaseException:
            keys.leave(principal, key)
            raise
        if answered.too_large:
            # It was done, and must not be done again for want of its answer.
            keys.leave(principal, key)
        else:
            await keys.end(control, principal, key, begun, answered.kept)


class _Answer:
    """Passes an answer on and keeps it, where it is JSON of a size that is worth keeping."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._status = 0
        self._pieces: list[bytes] = []
        self._size = 0

    @property
    def too_large(self) -> bool:
        """Whether something was done whose answer cannot be kept."""
        return 200 <= self._status < 300 and self._size > ANSWER_BYTES_MAX

    @property
    def kept(self) -> Answered | None:
        """The answer, if it says that something was done."""
        if 200 <= self._status < 300 and self._size <= ANSWER_BYTES_MAX:
            return Answered(self._status, b"".join(self._pieces))
        return None

    async def send(self, message: Message) -> None:
        """Pass a part on."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
        else:
            body = message.get("body", b"")
            self._size += len(body)
            if self._size <= ANSWER_BYTES_MAX:
                self._pieces.append(body)
        await self._send(message)
