"""What an instance may connect to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from innkeeper.errors import InvalidRequestError

MODES = ("internet", "none")


@dataclass(frozen=True, slots=True)
class EgressPolicy:
    """`internet`: public addresses and DNS through the gateway; `none`: nothing at all."""

    mode: str = "internet"

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"mode": self.mode}


def parse_egress_policy(value: Mapping[str, Any]) -> EgressPolicy:
    """The policy of its JSON form `{"mode": "internet"|"none"}`.

    Raises:
        InvalidRequestError: anything else, named: a policy that is not enforced is never accepted.

    """
    unknown = sorted(set(value) - {"mode"})
    if unknown:
        raise InvalidRequestError(
            f"egress_policy: {', '.join(map(repr, unknown))} is not supported; use {{'mode': 'internet'}} or {{'mode': 'none'}}"
        )
    mode = value.get("mode")
    if mode not in MODES:
        raise InvalidRequestError(f"egress_policy.mode: {mode!r} is not supported; use 'internet' or 'none'")
    return EgressPolicy(mode=mode)
