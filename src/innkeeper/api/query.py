"""Query parameters of the hand-written routes."""

from __future__ import annotations

from urllib.parse import parse_qs

from starlette.types import Scope

from innkeeper.errors import InvalidRequestError

MAX_INTEGER = (1 << 63) - 1


class Query:
    """The parameters of a request; of a repeated one the first counts, unknown ones are ignored."""

    def __init__(self, scope: Scope) -> None:
        raw: bytes = scope.get("query_string", b"")
        try:
            self._values = parse_qs(raw.decode("ascii"), keep_blank_values=True, max_num_fields=50, errors="strict")
        except ValueError:
            # Not ASCII, not UTF-8 after decoding, or too many fields.
            raise InvalidRequestError("The query string is not valid.") from None

    def text(self, name: str) -> str | None:
        """The value, or None without it."""
        values = self._values.get(name)
        return values[0] if values else None

    def flag(self, name: str) -> bool:
        """Whether it is `1` or `true`. Raises InvalidRequestError for anything but those, `0` and `false`."""
        value = self.text(name)
        if value in (None, "0", "false"):
            return False
        if value in ("1", "true"):
            return True
        raise InvalidRequestError(f"{name}: must be 1 or 0")

    def integer(self, name: str, *, default: int, minimum: int = 0, maximum: int = MAX_INTEGER) -> int:
        """The whole number, or the default. Raises InvalidRequestError outside the limits."""
        value = self.text(name)
        if value is None:
            return default
        if not (value.isascii() and value.isdigit()) or len(value) > 19 or not minimum <= int(value) <= maximum:
            raise InvalidRequestError(f"{name}: must be a whole number from {minimum} to {maximum}")
        return int(value)
