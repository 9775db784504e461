"""Registries: references to images in them, and which addresses may be asked. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from innkeeper.errors import InvalidRequestError

REFERENCE_MAX = 512
HOST = r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)*"
_REGISTRY = re.compile(rf"({HOST}|\[[0-9a-fA-F:]+\])(?::([0-9]{{1,5}}))?")
_PATH = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# Networks that `is_global` takes for public and that lead to somebody's own machines all the same.
_SPECIAL = tuple(
    ip_network(text)
    for text in ("100.64.0.0/10", "168.63.129.16/32", "192.88.99.0/24", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "fec0::/10")
)  # fmt: skip

Address = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Reference:
    """An image in a registry: `registry` is a host with its port where one is said, and exactly one of `tag` and `digest` is set or both."""

    registry: str
    path: str
    tag: str | None
    digest: str | None

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag and not self.digest else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.registry}/{self.path}{tag}{digest}"

    def at(self, digest: str) -> Reference:
        """The same image by its digest."""
        return Reference(self.registry, self.path, None, digest)


def parse_reference(text: str, *, default_registry: str = "") -> Reference:
    """`registry/path[:tag][@sha256:…]`; without a tag and a digest it is `latest`.

    A name without a registry (`python:3.12`, `team/app`) is one in `default_registry`, where there is one; a name of one word is in its `library`, as
    the clients of registries have it.

    Raises:
        InvalidRequestError: anything else; a transport (`docker://`, `dir:`), a path and a file are never references.

    """
    refused = InvalidRequestError(
        f"reference: not an image in a registry, like registry.example.com/team/app:1: {text[:100]!r}"
    )
    if len(text) > REFERENCE_MAX or not text.isascii():
        raise refused
    rest, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise refused
    registry, slash, path = rest.partition("/")
    # `team/app` has no host in front, and `python:3` neither: each is a path in a registry that nobody named.
    named = bool(slash) and ("." in registry or ":" in registry or registry == "localhost")
    if not named:
        registry, path = default_registry, rest if slash else f"library/{rest}"
    path, colon, tag = path.partition(":")
    if not _PATH.fullmatch(path) or (colon and not _TAG.fullmatch(tag)):
        raise refused
    if not named and not default_registry:
        raise InvalidRequestError(
            f"{refused.message}; the server has no registry for names without one (INNKEEPER_DEFAULT_REGISTRY)"
        )
    if not is_registry(registry):
        raise refused
    return Reference(registry, path, tag or (None if digest else "latest"), digest or None)


def is_registry(text: str) -> bool:
    """Whether it is a host, or an address, with its port where one is said."""
    found = _REGISTRY.fullmatch(text)
    return found is not None and len(text) <= 255 and (found[2] is None or 0 < int(found[2]) <= 65_535)


@dataclass(frozen=True, slots=True)
class RegistryPolicy:
    """Where imports may connect to beside public addresses: `hosts` (a host, or a host and port) and `networks` are the operator's exceptions.

    Only those may also be spoken to without TLS, or with a certificate that nobody knows.
    """

    hosts: frozenset[str] = frozenset()
    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    def allows_name(self, host: str, port: int) -> bool:
        """Whether the operator named this host."""
        return host.lower() in self.hosts or f"{host.lower()}:{port}" in self.hosts

    def names(self, host: str, port: int, address: Address) -> bool:
        """Whether the operator made an exception for this."""
        return self.allows_name(host, port) or any(plain_address(address) in network for network in self.networks)

    def allows(self, host: str, port: int, address: Address) -> bool:
        """Whether a connection to `address`, which `host` stands for, may be made."""
        return self.names(host, port, address) or is_public(plain_address(address))

    def may_be_insecure(self, registry: str) -> bool:
        """Whether the registry may be asked without TLS."""
        host, port = split_registry(registry)
        if self.allows_name(host, port or 443) or self.allows_name(host, port or 80):
            return True
        try:
            address = ip_address(host.strip("[]"))
        except ValueError:
            return False
        return any(address in network for network in self.networks)


def split_registry(registry: str) -> tuple[str, int | None]:
    """Host and port of a registry."""
    found = _REGISTRY.fullmatch(registry)
    if found is None:
        raise InvalidRequestError("registry: not a host")
    return found[1], int(found[2]) if found[2] else None


def plain_address(address: Address) -> Address:
    """The IPv4 address that an IPv6 one carries, else the address itself."""
    return address.ipv4_mapped if isinstance(address, IPv6Address) and address.ipv4_mapped else address


def is_public(address: Address) -> bool:
    """Whether an address is somebody's on the internet: not private, loopback, link-local, multicast or reserved."""
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not any(address in network for network in _SPECIAL)
    )


def parse_policy(text: str) -> RegistryPolicy:
    """The policy of its setting: comma-separated hosts, hosts with ports, addresses and networks. Raises ValueError."""
    hosts, networks = set(), []
    for item in filter(None, (part.strip() for part in text.split(","))):
        try:
            networks.append(ip_network(item))
        except ValueError:
            if not is_registry(item):
                raise ValueError(f"{item!r} is neither a host nor a network") from None
            hosts.add(item.lower())
    return RegistryPolicy(frozenset(hosts), tuple(networks))
