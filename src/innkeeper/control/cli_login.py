"""Logging a command line in through a browser: it begins a pairing, a person approves it with a token of theirs, and it gets a key of its own.

The code goes by way of the person's browser to a port of their own machine, and is worth nothing without the verifier that only the command line knows
(RFC 7636 with S256), so a link that somebody else sends does not give them a key. Pairings live in memory: after a restart of the server one begins again.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from innkeeper.control import account, tokens
from innkeeper.control.account import Account
from innkeeper.core.token import DEFAULT_SCOPES, Dialect, Principal
from innkeeper.errors import InvalidRequestError, NotFoundError, RateLimitedError

if TYPE_CHECKING:
    from innkeeper.control.context import Control

SECONDS = 600.0
PAIRINGS_MAX = 1_000
# Wrong tokens on the page, or wrong codes and verifiers, until a pairing is over.
ATTEMPTS = 5
TEXT_MAX = 256
_CALLBACK = re.compile(r"http://127\.0\.0\.1:([1-9][0-9]{0,4})/callback")
# The base64url of 32 bytes.
_CHALLENGE = re.compile(r"[A-Za-z0-9_-]{43}")
_STATE = re.compile(r"[A-Za-z0-9_.~-]{8,256}")


@dataclass(frozen=True, slots=True)
class PairingRequest:
    """What a command line says of itself; every field is text of a stranger."""

    state: str
    code_challenge: str
    redirect_uri: str
    hostname: str
    cli_version: str = ""


@dataclass(slots=True)
class _Pairing:
    asked: PairingRequest
    expires_at: float
    attempts: int = ATTEMPTS
    code: str | None = field(default=None, repr=False)
    approved_by: Principal | None = None


@dataclass(frozen=True, slots=True)
class LoggedIn:
    """The key of a command line, shown this once, and who it stands for."""

    api_key: str = field(repr=False)
    account: Account


class Pairings:
    """The pairings that are under way."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, _Pairing] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, asked: PairingRequest) -> str:
        """The id of a new pairing.

        Raises:
            InvalidRequestError: a challenge that is none, or a callback that is not the asker's own machine.
            RateLimitedError: too many are under way.

        """
        callback = _CALLBACK.fullmatch(asked.redirect_uri)
        if callback is None or int(callback[1]) > 65_535:
            raise InvalidRequestError("redirect_uri: must be http://127.0.0.1:<port>/callback")
        if not _CHALLENGE.fullmatch(asked.code_challenge):
            raise InvalidRequestError("code_challenge: must be the base64url of a SHA-256, without padding")
        if not _STATE.fullmatch(asked.state):
            raise InvalidRequestError("state: must be 8 to 256 characters of A-Z, a-z, 0-9 and -._~")
        for name in ("hostname", "cli_version"):
            text = getattr(asked, name)
            if len(text) > TEXT_MAX or not text.isprintable():
                raise InvalidRequestError(f"{name}: must be at most {TEXT_MAX} printable characters")
        self._forget_old()
        if len(self._open) >= PAIRINGS_MAX:
            raise RateLimitedError("Too many logins are under way", retry_after_seconds=60)
        pairing_id = secrets.token_urlsafe(24)
        self._open[pairing_id] = _Pairing(asked, time.monotonic() + SECONDS)
        return pairing_id

    def asked(self, pairing_id: str) -> PairingRequest:
        """Who began a pairing that nobody has approved yet. Raises NotFoundError."""
        pairing = self._find(pairing_id)
        if pairing.code is not None:
            raise NotFoundError("This login is over")
        return pairing.asked

    async def approve(self, control: Control, pairing_id: str, token: str) -> str:
        """Where to send the browser, for a person's token.

        Raises:
            NotFoundError: no such pairing, or it is over.
            UnauthorizedError, ForbiddenError: the token may not make keys; after ATTEMPTS of them the pairing is over.

        """
        self.asked(pairing_id)
        pairing = self._spend(pairing_id)
        principal = await tokens.authenticate(control, token)
        tokens.check_may_create(principal)
        pairing.code, pairing.approved_by, pairing.attempts = secrets.token_urlsafe(32), principal, ATTEMPTS
        return f"{pairing.asked.redirect_uri}?state={pairing.asked.state}&code={pairing.code}"

    async def exchange(self, control: Control, pairing_id: str, code: str, verifier: str) -> LoggedIn:
        """The key, once.

        Raises:
            NotFoundError: no such pairing, or it is over.
            InvalidRequestError: a code or verifier that is not its own; after ATTEMPTS of them the pairing is over.

        """
        pairing = self._spend(pairing_id)
        digest = hashlib.sha256(verifier.encode("utf-8", "surrogatepass")).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        fits = hmac.compare_digest(challenge, pairing.asked.code_challenge)
        right = hmac.compare_digest((pairing.code or "").encode(), code.encode("utf-8", "surrogatepass"))
        if pairing.approved_by is None or not (fits and right):
            raise InvalidRequestError("code: not the one of this login")
        del self._open[pairing_id]
        by = pairing.approved_by
        scopes = frozenset(scope for scope in DEFAULT_SCOPES if by.allows(scope))
        name = f"CLI - {pairing.asked.hostname}"[: tokens.NAME_MAX]
        new = await tokens.create(control, by, name, dialect=Dialect.INSTAVM, scopes=scopes)
        return LoggedIn(new.text, await account.of_principal(control, by))

    def _find(self, pairing_id: str) -> _Pairing:
        self._forget_old()
        found = self._open.get(pairing_id)
        if found is None:
            raise NotFoundError("This login is over")
        return found

    def _spend(self, pairing_id: str) -> _Pairing:
        """The pairing, with one attempt less; the last one takes it away from the others."""
        pairing = self._find(pairing_id)
        pairing.attempts -= 1
        if pairing.attempts <= 0:
            del self._open[pairing_id]
        return pairing

    def _forget_old(self) -> None:
        now = time.monotonic()
        while self._open and next(iter(self._open.values())).expires_at <= now:
            self._open.popitem(last=False)
