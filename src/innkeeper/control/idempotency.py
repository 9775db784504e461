"""Requests that are carried out once: who asks again with the same key is given the first answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import sqlalchemy as sa

from innkeeper.control import clock
from innkeeper.core.token import Principal
from innkeeper.errors import ConflictError, InvalidRequestError
from innkeeper.store import idempotency_keys as store
from innkeeper.store.idempotency_keys import KeyedRequest

if TYPE_CHECKING:
    from innkeeper.control.context import Control

KEY_CHARACTERS_MAX = 255
KEPT_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class Begun:
    """A request that is to be carried out now. `again`: an earlier attempt left no answer, and may have done some of it or all."""

    id: UUID
    again: bool


@dataclass(frozen=True, slots=True)
class Answered:
    """What the first request was answered."""

    status: int
    body: bytes


class Keys:
    """The keys whose requests this process is carrying out."""

    def __init__(self) -> None:
        self._under_way: dict[tuple[UUID, str], asyncio.Event] = {}

    async def begin(self, control: Control, principal: Principal, key: str, request: bytes) -> Begun | Answered:
        """Begin a request, after the one of the same key that is under way; `end` must follow what has Begun.

        Raises:
            InvalidRequestError: the key is none, or was used for another request, or by another token: an answer may hold what only its own may see.

        """
        if not 1 <= len(key) <= KEY_CHARACTERS_MAX or not (key.isascii() and key.isprintable()):
            raise InvalidRequestError(f"Idempotency-Key: must be 1 to {KEY_CHARACTERS_MAX} printable ASCII characters")
        place = (principal.organization_id, key)
        while (other := self._under_way.get(place)) is not None:
            await other.wait()
        self._under_way[place] = asyncio.Event()
        try:
            asked = control.box.digest(f"{principal.token_id}\0".encode() + request)
            found = await _insert(control, principal, key, asked)
            if isinstance(found, Answered):
                self._free(place)
        except BaseException:
            self._free(place)
            raise
        return found

    async def end(
        self, control: Control, principal: Principal, key: str, begun: Begun, answered: Answered | None
    ) -> None:
        """Keep the answer; None: nothing was done, so the key may be used again."""
        try:
            if answered is None:
                await control.database.write(store.delete, begun.id)
            else:
                sealed = control.box.seal(answered.body, organization_id=principal.organization_id, object_id=begun.id)
                await control.database.write(store.answer, begun.id, answered.status, sealed)
        finally:
            self._free((principal.organization_id, key))

    def leave(self, principal: Principal, key: str) -> None:
        """The request was cut short, or its answer is not kept: what it did is not known, and the next one with its key is told so."""
        self._free((principal.organization_id, key))

    def _free(self, place: tuple[UUID, str]) -> None:
        event = self._under_way.pop(place, None)
        if event is not None:
            event.set()


async def _insert(control: Control, principal: Principal, key: str, digest: bytes) -> Begun | Answered:
    request = KeyedRequest(uuid4(), principal.organization_id, key, digest, clock.now())
    try:
        await control.database.write(store.insert, request)
    except sa.exc.IntegrityError:
        found = await control.database.read(store.get, principal.organization_id, key)
        if found is None:
            raise ConflictError("Idempotency-Key: its request was given up at this moment; ask again") from None
    else:
        return Begun(request.id, again=False)
    if found.request_digest != digest:
        raise InvalidRequestError("Idempotency-Key: was used for another request")
    if found.status is None or found.answer_sealed is None:
        return Begun(found.id, again=True)
    body = control.box.open(found.answer_sealed, organization_id=found.organization_id, object_id=found.id)
    return Answered(found.status, body)
