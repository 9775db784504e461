"""The wire models of the Gentity dialect. Names are in camel case, times are RFC 3339."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


def error_shape(code: str, message: str) -> dict[str, Any]:
    """The dialect's errors: a sentence for people, and no code. Two of them have the very words that it documents."""
    if code == "unauthorized":
        return {"error": "Unauthorized"}
    return {"error": "Not Found" if code.endswith("not_found") else message}


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, populate_by_name=True)


class GentityError(BaseModel):
    """Every error of this dialect."""

    error: str = Field(description="A sentence for people.")


class TokenRequest(BaseModel):
    """Body of POST /api/tokens."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(description="What people know it by.")


class TokenRecord(_Answer):
    """A token as it is told of: never its text."""

    id: str = Field(description="What revokes it.")
    name: str = Field(description="What people know it by.")
    prefix: str = Field(description="Its first 16 characters.")
    created_at: datetime = Field(description="When it was made.")
    last_used_at: datetime | None = Field(description="When it was used last, to some seconds; null: never.")


class TokenMinted(_Answer):
    """A new token."""

    token: str = Field(description="Its text, which is in no other answer.")
    record: TokenRecord = Field(description="What is told of it from now on.")


class TokenList(_Answer):
    """Tokens that are valid."""

    tokens: list[TokenRecord] = Field(description="Oldest first.")


class Done(_Answer):
    """It is done."""

    ok: bool = Field(True, description="True.")
