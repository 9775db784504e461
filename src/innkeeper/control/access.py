"""Who may do what: every use case begins here."""

from __future__ import annotations

from innkeeper.core.token import Principal, Scope
from innkeeper.errors import ForbiddenError


def require(principal: Principal, scope: Scope) -> None:
    """Check that the principal holds the scope.

    Raises:
        ForbiddenError: naming the scope.

    """
    if not principal.allows(scope):
        raise ForbiddenError(f"The token lacks the scope '{scope}'")


def require_socket(principal: Principal) -> None:
    """Check that it is the operator on the server's own unix socket: no token opens this.

    Raises:
        ForbiddenError: it is not.

    """
    require(principal, Scope.ADMIN)
    if principal.token_id is not None:
        raise ForbiddenError("This is asked over the server's own unix socket alone")


def require_any(principal: Principal, *scopes: Scope) -> None:
    """Check that the principal holds one of the scopes.

    Raises:
        ForbiddenError: naming them.

    """
    if not any(principal.allows(scope) for scope in scopes):
        raise ForbiddenError(f"The token lacks the scope '{' or '.join(scopes)}'")
