"""What an instance may connect to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import Any

from innkeeper.errors import InvalidRequestError

MODES = ("internet", "none")
# What a host enforces: besides those, a port and network list of an instance's own.
HOST_MODES = (*MODES, "limited")
HTTP, HTTPS = 80, 443
CIDRS_MAX = 64


@dataclass(frozen=True, slots=True)
class EgressPolicy:
    """`internet`: public addresses and DNS through the gateway; `none`: nothing at all.

    `limited`: DNS, TCP to these ports, and whatever lies in these networks, as far as `internet` allows it.
    """

    mode: str = "internet"
    ports: tuple[int, ...] = ()
    cidrs: tuple[str, ...] = ()

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


def parse_limited_policy(value: Mapping[str, Any]) -> EgressPolicy:
    """The policy of InstaVM's form: `allow_http` and `allow_https` (default true), and `allowed_cidrs`.

    Raises:
        InvalidRequestError: anything else that would allow or forbid something, named.

    """
    known = {"allow_http", "allow_https", "allowed_cidrs"}
    idle = {"allowed_domains": [], "allow_public_repos": False, "allow_package_managers": False}
    for name, given in value.items():
        if name not in known and not (name in idle and given in (None, idle[name])):
            raise InvalidRequestError(f"egress_policy.{name[:64]}: is not supported by this server")
    ports = []
    for name, port in (("allow_http", HTTP), ("allow_https", HTTPS)):
        allowed = value.get(name, True)
        if not isinstance(allowed, bool):
            raise InvalidRequestError(f"egress_policy.{name}: must be true or false")
        if allowed:
            ports.append(port)
    cidrs = value.get("allowed_cidrs") or []
    if not isinstance(cidrs, list) or len(cidrs) > CIDRS_MAX:
        raise InvalidRequestError(f"egress_policy.allowed_cidrs: must be an array of at most {CIDRS_MAX} networks")
    return EgressPolicy("limited", tuple(ports), tuple(_network(one) for one in cidrs))


def show_limited_policy(policy: EgressPolicy) -> dict[str, Any] | None:
    """The policy in InstaVM's form; None where it limits nothing."""
    if policy.mode != "limited":
        return None
    return {
        "allow_http": HTTP in policy.ports,
        "allow_https": HTTPS in policy.ports,
        "allowed_cidrs": list(policy.cidrs),
        "allowed_domains": [],
        "allow_public_repos": False,
        "allow_package_managers": False,
    }


def _network(text: object) -> str:
    try:
        if isinstance(text, str):
            return str(IPv4Network(text))
    except ValueError:
        pass
    raise InvalidRequestError("egress_policy.allowed_cidrs: must be IPv4 networks such as 192.0.2.0/24")
