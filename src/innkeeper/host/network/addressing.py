"""Which addresses a server's guests have: pure functions of a server id, a subnet and a slot number.

A server has one subnet, cut into blocks of four addresses (/30). Block 0 holds the resolver, block 1 the uplink between
the host and the router namespace, and block 2 + n belongs to slot n: its gateway, then its guest.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

SUBNET_PREFIX = 20
BLOCK_PREFIX = 30
_BLOCKS_RESERVED = 2

# Tried in this order; 100.64.0.0/10 first, since it is what hosts and intranets route least.
CANDIDATE_RANGES = (
    IPv4Network("100.64.0.0/10"),
    IPv4Network("10.0.0.0/8"),
    IPv4Network("172.16.0.0/12"),
    IPv4Network("192.168.0.0/16"),
)

# Every range of the IANA special-purpose registry that is not plain public unicast, multicast, and what clouds hide among public addresses. A guest on the
# internet policy reaches none of them, and our resolver hands out no address in them.
NOT_PUBLIC = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by carriers: also our guests, and some clouds' metadata services
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # public by its number, yet Azure's host agent, which tells a machine its secrets
        "169.254.0.0/16",  # link-local: cloud metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments: some clouds' metadata
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays, given up
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)


class NoFreeSubnetError(RuntimeError):
    """The host's routes leave no /20 of private addresses for the guests; name one in the settings."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The names and addresses of one guest's place on the network.

    `router_interface` is the router's end of the pair; the guest's end is `guest_interface` in the namespace `netns`.
    """

    index: int
    netns: str
    router_interface: str
    guest_ip: IPv4Address
    gateway_ip: IPv4Address
    resolver_ip: IPv4Address
    mac: str
    gateway_mac: str
    guest_interface: str = "eth0"
    prefix_length: int = BLOCK_PREFIX

    @property
    def netns_path(self) -> Path:
        """The guest's namespace as a path, as an OCI specification wants it."""
        return Path("/run/netns") / self.netns


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """The names and addresses of one server's network."""

    server_id: str
    subnet: IPv4Network

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{8}", self.server_id):
            raise ValueError(f"a server id is 8 lower-case hexadecimal digits, not {self.server_id!r}")
        if self.subnet.prefixlen > 28:
            raise ValueError(f"{self.subnet} is too small: at least a /28 is needed")

    @property
    def router_netns(self) -> str:
        """The name of the router's namespace."""
        return f"ik{self.server_id}-router"

    @property
    def slot_netns_prefix(self) -> str:
        """What the names of all slots' namespaces begin with."""
        return f"ik{self.server_id}-s"

    @property
    def uplink(self) -> str:
        """The host's end of the pair to the router; at most 15 characters, as the kernel demands."""
        return f"ik{self.server_id}u"

    @property
    def host_table(self) -> str:
        """The nft table of this server on the host."""
        return f"innkeeper_{self.server_id}"

    @property
    def resolver_ip(self) -> IPv4Address:
        """Where every guest of this server finds DNS."""
        return self.subnet[1]

    @property
    def uplink_host_ip(self) -> IPv4Address:
        """The host's address towards the router."""
        return self.subnet[5]

    @property
    def uplink_router_ip(self) -> IPv4Address:
        """The router's address towards the host."""
        return self.subnet[6]

    @property
    def capacity(self) -> int:
        """How many slots fit into the subnet."""
        return (self.subnet.num_addresses >> (32 - BLOCK_PREFIX)) - _BLOCKS_RESERVED

    def slot(self, index: int) -> Slot:
        """The plan of slot `index`. Raises ValueError when it does not fit the subnet."""
        if not 0 <= index < self.capacity:
            raise ValueError(f"slot {index} is outside of 0..{self.capacity - 1}")
        first = (index + _BLOCKS_RESERVED) << (32 - BLOCK_PREFIX)
        return Slot(
            index=index,
            netns=f"{self.slot_netns_prefix}{index}",
            router_interface=f"s{index}",
            gateway_ip=self.subnet[first + 1],
            guest_ip=self.subnet[first + 2],
            resolver_ip=self.resolver_ip,
            mac=_mac(self.server_id, 0x02, index),
            gateway_mac=_mac(self.server_id, 0x06, index),
        )

    def slot_of_netns(self, name: str) -> Slot | None:
        """The slot whose namespace is called `name`, or None when it is none of ours."""
        number = name.removeprefix(self.slot_netns_prefix)
        if name == number or not re.fullmatch(r"0|[1-9][0-9]{0,8}", number) or int(number) >= self.capacity:
            return None
        return self.slot(int(number))


def server_id_of(state_directory: Path) -> str:
    """A server id for a state directory: the same path on the same host always gives the same one."""
    return hashlib.sha256(str(state_directory.resolve()).encode()).hexdigest()[:8]


def _mac(server_id: str, first: int, index: int) -> str:
    # Bit 1 of the first byte: locally administered; bit 0 clear: unicast.
    return ":".join(f"{byte:02x}" for byte in (first, *bytes.fromhex(server_id)[:2], *index.to_bytes(3, "big")))


# Services that are reached through the default route, so that no route gives them away: Alibaba Cloud's name servers
# and metadata, Tailscale's resolver.
_HIDDEN_SERVICES = (IPv4Network("100.100.0.0/16"),)


def choose_subnet(server_id: str, taken: Iterable[IPv4Network]) -> IPv4Network:
    """A /20 that overlaps none of `taken` (routes and name servers of the host, subnets of other servers).

    The search starts at a place that depends on the server id, so two servers rarely want the same one even when they
    cannot see each other. Raises NoFreeSubnetError.
    """
    # The default route covers everything.
    avoid = [*_HIDDEN_SERVICES, *(network for network in taken if network.prefixlen > 0)]
    for candidates in CANDIDATE_RANGES:
        count = 1 << (SUBNET_PREFIX - candidates.prefixlen)
        start = int(server_id, 16) % count
        for step in range(count):
            offset = ((start + step) % count) << (32 - SUBNET_PREFIX)
            subnet = IPv4Network((int(candidates.network_address) + offset, SUBNET_PREFIX))
            if not any(subnet.overlaps(network) for network in avoid):
                return subnet
    raise NoFreeSubnetError(NoFreeSubnetError.__doc__)


def is_public(address: IPv4Address) -> bool:
    """Whether `address` is plain public unicast."""
    return not any(address in network for network in NOT_PUBLIC)
