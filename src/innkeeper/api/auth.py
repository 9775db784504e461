"""Who asks: the bearer token of a request, or the operator on the server's own unix socket."""

from __future__ import annotations

from starlette.types import Scope

from innkeeper.api.body import header_values
from innkeeper.control import tokens
from innkeeper.control.context import Control
from innkeeper.core.token import Principal
from innkeeper.errors import UnauthorizedError

# Set by the wrapper around the unix socket's listener (api/server.py). A scope key cannot come from the wire.
OPERATOR = "innkeeper.operator"
# Set for the one endpoint to which a token may come in the query, because browsers can send WebSockets no headers.
QUERY_KEY = "innkeeper.query_key"
MAX_TOKEN_CHARACTERS = 512


def bearer_token(scope: Scope) -> str | None:
    """The token of `Authorization: Bearer ...`, or None without that header.

    Raises:
        UnauthorizedError: another scheme, an empty or overlong token, or the header twice.

    """
    values = header_values(scope["headers"], b"authorization")
    if not values:
        return None
    if len(values) > 1:
        raise UnauthorizedError("Authorization: given more than once")
    scheme, _, token = values[0].decode("latin-1").partition(" ")
    if scheme.lower() != "bearer":
        raise UnauthorizedError("Authorization: must be 'Bearer <token>'")
    return _checked(token)


def api_key(scope: Scope) -> str | None:
    """The token of `X-API-Key`, or None without that header. Raises UnauthorizedError like `bearer_token`."""
    values = header_values(scope["headers"], b"x-api-key")
    if not values:
        return None
    if len(values) > 1:
        raise UnauthorizedError("X-API-Key: given more than once")
    return _checked(values[0].decode("latin-1"))


def has_credential(scope: Scope) -> bool:
    """Whether a request says who it is, rightly or wrongly."""
    named = header_values(scope["headers"], b"authorization") or header_values(scope["headers"], b"x-api-key")
    return bool(named or scope.get(OPERATOR))


def _checked(token: str) -> str:
    token = token.strip()
    if not token or len(token) > MAX_TOKEN_CHARACTERS:
        raise UnauthorizedError
    return token


async def authenticate(control: Control, scope: Scope, *, accept_api_key: bool = False) -> Principal:
    """The principal of a request.

    Raises:
        UnauthorizedError: no token, a malformed one, an unknown or revoked one.

    """
    token = bearer_token(scope)
    if token is None and accept_api_key:
        token = api_key(scope)
    if token is None and scope.get(QUERY_KEY) is not None:
        token = _checked(scope[QUERY_KEY])
    if token is None:
        if scope.get(OPERATOR):
            return tokens.operator_principal(control)
        raise UnauthorizedError
    return await tokens.authenticate(control, token)
