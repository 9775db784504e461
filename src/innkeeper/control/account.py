"""Who a token stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa

from innkeeper.core.token import Principal, User
from innkeeper.errors import NotFoundError
from innkeeper.store import organizations, tokens

if TYPE_CHECKING:
    from innkeeper.control.context import Control


@dataclass(frozen=True, slots=True)
class Account:
    """A person as clients show them. `email` is None for a token of an organization without people."""

    id: UUID
    organization: str
    email: str | None


async def of_principal(control: Control, principal: Principal) -> Account:
    """The account behind a request: the token's own user, else the organization and its first one."""

    def read(connection: sa.Connection) -> tuple[str, User | None]:
        organization = organizations.get(connection, principal.organization_id)
        if organization is None:
            raise NotFoundError("Organization not found")
        token = None if principal.token_id is None else tokens.get(connection, organization.id, principal.token_id)
        own = None if token is None or token.user_id is None else organizations.user(connection, token.user_id)
        return organization.name, own or organizations.first_user(connection, organization.id)

    name, user = await control.database.read(read)
    return Account(principal.organization_id if user is None else user.id, name, None if user is None else user.email)
