"""Policy as nft text: pure functions, one for each transaction.

Two places enforce it. The router namespace decides what a guest may reach; the host keeps everything that comes up the
uplink away from its own addresses, whichever those are. Both refuse instead of dropping, so that a guest fails fast: TCP by
a reset and UDP by "port unreachable", since gVisor lets "administratively prohibited" pass unheard.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Network, collapse_addresses
from types import MappingProxyType

from innkeeper.host.network.addressing import NOT_PUBLIC, ServerPlan, Slot

TABLE = "innkeeper"
UPLINK = "uplink"
"""The router's end of the pair to the host."""


class PolicyClass(StrEnum):
    """What a slot may reach: nothing at all, or public addresses and DNS through our resolver."""

    NONE = "none"
    INTERNET = "internet"


@dataclass(frozen=True, slots=True)
class Limited:
    """A policy of a slot's own: of what `internet` allows, TCP to these ports and whatever lies in these networks. DNS goes on."""

    ports: tuple[int, ...] = ()
    cidrs: tuple[IPv4Network, ...] = ()


Policy = PolicyClass | Limited


@dataclass(frozen=True, slots=True)
class FirewallLimits:
    """What holds for every guest of a server.

    `allowed_cidrs` opens addresses that are not public: intranets, tests. An address of the host itself opens only when
    it is listed alone, as a /32. `allow_smtp` opens TCP 25, closed by default since one guest's spam takes the whole
    host's reputation with it (submission on 465 and 587 is open). The rest keeps one guest from using up the host's
    connection table and the resolver: connections at once, new ones per second, DNS questions by UDP per second, and
    connections to the resolver at once and new ones per second, and IP fragments per second.
    """

    allowed_cidrs: tuple[IPv4Network, ...] = ()
    allow_smtp: bool = False
    connections_per_guest: int = 4096
    new_connections_per_second: int = 500
    dns_questions_per_second: int = 200
    dns_connections: int = 16
    dns_connections_per_second: int = 20
    fragments_per_second: int = 100


# How long the kernel keeps a TCP connection that nothing is heard of. A closed one stays for two minutes by default, and no
# limit of connections counts it: 500 a second would be 60,000 entries, the whole table of a small host. An open one whose
# guest is gone stays for five days; two hours are what RFC 5382 asks for.
_TIMEOUTS = """\
    ct timeout guest {
        protocol tcp;
        l3proto ip;
        policy = { established: 7440, fin_wait: 30, last_ack: 10, time_wait: 5, close: 5 };
    }"""


def router_ruleset(
    plan: ServerPlan, limits: FirewallLimits, *, slots: Iterable[Slot] = (), online: Iterable[Slot] = ()
) -> str:
    """The router's whole ruleset, replacing an earlier one in the same transaction.

    `slots` may speak at all (with their own address and MAC only); those in `online` have the internet policy.
    """
    guests = [_guest_element(slot) for slot in slots]
    pace, dns_pace = _over(limits.new_connections_per_second), _over(limits.dns_questions_per_second)
    dns_tcp_pace, pieces = _over(limits.dns_connections_per_second), _over(limits.fragments_per_second)
    smtp = "" if limits.allow_smtp else "tcp dport 25 goto refuse"
    return f"""\
table ip {TABLE}
delete table ip {TABLE}
table arp {TABLE}
delete table arp {TABLE}
table ip6 {TABLE}
delete table ip6 {TABLE}

table ip {TABLE} {{
    counter refused {{ }}
    counter spoofed {{ }}
    counter dns_flood {{ }}
    set guests {{ type ifname . ether_addr . ipv4_addr; {_elements(guests)} }}
    set online {{ type ifname; {_elements([_name(slot) for slot in online])} }}
    set limited {{ type ifname; }}
    set limited_ports {{ type ipv4_addr . inet_service; }}
    set limited_cidrs {{ type ipv4_addr . ipv4_addr; flags interval; }}
    set allowed {{ type ipv4_addr; flags interval; auto-merge; {_elements(limits.allowed_cidrs)} }}
    set not_public {{ type ipv4_addr; flags interval; {_elements(NOT_PUBLIC)} }}
    set connections {{ type ipv4_addr; size 65535; flags dynamic; }}
    set pace {{ type ipv4_addr; size 65535; flags dynamic; }}
    set dns_pace {{ type ipv4_addr; size 65535; flags dynamic; }}
    set dns_connections {{ type ipv4_addr; size 65535; flags dynamic; }}
    set pieces {{ type ipv4_addr; size 65535; flags dynamic; }}
    set dns_tcp_pace {{ type ipv4_addr; size 65535; flags dynamic; }}
{_TIMEOUTS}

    # No guest speaks with an address or a MAC that is not its own. Ahead of the kernel's reassembly (-400), whose 4 MB all
    # guests share: pieces that never become whole would fill it, and nobody's large packets got through any more.
    chain arrival {{
        type filter hook prerouting priority -450; policy drop;
        iifname {{ "lo", "{UPLINK}" }} accept
        iifname . ether saddr . ip saddr != @guests counter name spoofed drop
        ip frag-off & 0x3fff != 0 add @pieces {{ ip saddr {pieces} }} drop
        accept
    }}
    # What is addressed to the router itself: questions to the resolver, nothing else.
    chain local {{
        type filter hook input priority filter; policy drop;
        iifname "lo" accept
        iifname "{UPLINK}" drop
        iifname @online ip daddr {plan.resolver_ip} udp dport 53 add @dns_pace {{ ip saddr {dns_pace} }} counter name dns_flood drop
        iifname @online ip daddr {plan.resolver_ip} udp dport 53 accept
        iifname @online ip daddr {plan.resolver_ip} tcp dport 53 goto questions
        goto refuse
    }}
    chain questions {{
        ct state established accept
        ct state invalid drop
        add @dns_connections {{ ip saddr ct count over {limits.dns_connections} }} goto refuse
        add @dns_tcp_pace {{ ip saddr {dns_tcp_pace} }} goto refuse
        ct timeout set "guest"
        accept
    }}
    chain transit {{
        type filter hook forward priority filter; policy drop;
        tcp flags syn tcp option maxseg size set rt mtu
        iifname "{UPLINK}" oifname @online ct state established,related accept
        iifname "{UPLINK}" drop
        iifname @online goto internet
        goto refuse
    }}
    chain internet {{
        oifname != "{UPLINK}" goto refuse
        ip daddr {plan.subnet} goto refuse
        meta l4proto {{ tcp, udp }} th dport {{ 53, 853 }} goto refuse
        iifname @limited jump limits
        ip daddr @allowed goto connect
        ip daddr @not_public goto refuse
        {smtp}
        goto connect
    }}
    # Refuses what a slot's own policy does not allow; the rest of the way is everybody's. An address is its slot's: see arrival.
    chain limits {{
        ip saddr . ip daddr @limited_cidrs return
        meta l4proto tcp ip saddr . tcp dport @limited_ports return
        goto refuse
    }}
    chain connect {{
        ct state established,related accept
        ct state invalid drop
        meta l4proto != {{ tcp, udp, icmp }} goto refuse
        meta l4proto icmp icmp type != echo-request goto refuse
        add @connections {{ ip saddr ct count over {limits.connections_per_guest} }} goto refuse
        add @pace {{ ip saddr {pace} }} goto refuse
        meta l4proto tcp ct timeout set "guest"
        accept
    }}
    chain refuse {{
        counter name refused
        meta l4proto tcp reject with tcp reset
        meta l4proto udp reject with icmp port-unreachable
        reject with icmp admin-prohibited
    }}
}}
table arp {TABLE} {{
    set guests {{ type ifname . ether_addr . ipv4_addr; {_elements(guests)} }}
    chain arrival {{
        type filter hook input priority filter; policy drop;
        iifname "{UPLINK}" accept
        iifname . arp saddr ether . arp saddr ip @guests accept
    }}
}}
table ip6 {TABLE} {{
    chain arrival {{ type filter hook prerouting priority raw; policy drop; }}
    chain departure {{ type filter hook output priority filter; policy drop; }}
}}
"""


def host_ruleset(plan: ServerPlan, limits: FirewallLimits) -> str:
    """The host's table for one server, replacing an earlier one in the same transaction."""
    exceptions = [network for network in limits.allowed_cidrs if network.prefixlen == 32]
    return f"""\
table inet {plan.host_table}
delete table inet {plan.host_table}

table inet {plan.host_table} {{
    set exceptions {{ type ipv4_addr; flags interval; {_elements(exceptions)} }}
{_TIMEOUTS}

    # Ahead of everybody's address translation: otherwise a port that the host forwards to a container would be reached
    # through the host's address, as forwarded and not as local traffic.
    chain arrival {{
        type filter hook prerouting priority raw; policy accept;
        iifname != "{plan.uplink}" accept
        meta nfproto != ipv4 drop
        ip saddr != {plan.subnet} drop
        ip daddr @exceptions accept
        fib daddr type != unicast goto refuse
    }}
    chain local {{
        type filter hook input priority filter - 10; policy accept;
        iifname != "{plan.uplink}" accept
        ip daddr @exceptions accept
        goto refuse
    }}
    # Nobody opens a connection to a guest.
    chain transit {{
        type filter hook forward priority filter - 10; policy accept;
        iifname "{plan.uplink}" meta l4proto tcp ct timeout set "guest"
        oifname != "{plan.uplink}" accept
        meta nfproto ipv4 ct state established,related accept
        drop
    }}
    chain departure {{
        type filter hook output priority filter - 10; policy accept;
        oifname "{plan.uplink}" meta nfproto != ipv4 drop
    }}
    chain translation {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {plan.subnet} oifname != "{plan.uplink}" masquerade
    }}
    chain refuse {{
        meta nfproto != ipv4 drop
        meta l4proto tcp reject with tcp reset
        meta l4proto udp reject with icmp port-unreachable
        reject with icmp admin-prohibited
    }}
}}
"""


def add_slots(slots: Sequence[Slot], *, online: Sequence[Slot] = ()) -> str:
    """Let these slots speak; those in `online` have the internet policy."""
    guests = _elements([_guest_element(slot) for slot in slots], keyword="")
    lines = [f"add element {family} {TABLE} guests {guests}" for family in ("ip", "arp")]
    if online:
        lines.append(f"add element ip {TABLE} online {_elements([_name(slot) for slot in online], keyword='')}")
    return "\n".join(lines) + "\n"


def remove_slots(slots: Sequence[Slot], *, limited: Mapping[int, Limited] = MappingProxyType({})) -> str:
    """Silence these slots, of which some have policies of their own; also right for slots that were never added."""
    # nft 1.0.6 has no `destroy`; deleting what the same transaction added works whether or not it was there.
    guests = _elements([_guest_element(slot) for slot in slots], keyword="")
    names = _elements([_name(slot) for slot in slots], keyword="")
    targets = (
        ("ip", "guests", guests),
        ("arp", "guests", guests),
        ("ip", "online", names),
        ("ip", "limited", names),
        *(
            ("ip", name, elements)
            for slot in slots
            if slot.index in limited
            for name, elements in _limits_of(slot, limited[slot.index])
        ),
    )
    return "".join(
        f"{verb} element {family} {TABLE} {name} {elements}\n"
        for family, name, elements in targets
        for verb in ("add", "delete")
    )


def set_policy(slot: Slot, policy: Policy, *, before: Policy = PolicyClass.INTERNET) -> str:
    """Give a slot another policy in one transaction; connections that the new one does not allow stop at once."""
    online, limited = (f"element ip {TABLE} {name} {{ {_name(slot)} }}\n" for name in ("online", "limited"))
    lines = [f"add {online}", f"add {limited}"]
    if isinstance(before, Limited):
        lines += [f"delete element ip {TABLE} {name} {elements}\n" for name, elements in _limits_of(slot, before)]
    if isinstance(policy, Limited):
        lines += [f"add element ip {TABLE} {name} {elements}\n" for name, elements in _limits_of(slot, policy)]
    else:
        lines.append(f"delete {limited}")
    if policy is PolicyClass.NONE:
        lines.append(f"delete {online}")
    return "".join(lines)


def _limits_of(slot: Slot, limited: Limited) -> Iterable[tuple[str, str]]:
    """(set, elements) of a slot's own policy."""
    ports = [f"{slot.guest_ip} . {port}" for port in sorted(set(limited.ports))]
    # Intervals of one set must not overlap.
    cidrs = [f"{slot.guest_ip} . {network}" for network in collapse_addresses(limited.cidrs)]
    for name, values in (("limited_ports", ports), ("limited_cidrs", cidrs)):
        if values:
            yield name, _elements(values, keyword="")


def _guest_element(slot: Slot) -> str:
    return f"{_name(slot)} . {slot.mac} . {slot.guest_ip}"


def _over(per_second: int) -> str:
    return f"limit rate over {per_second}/second burst {per_second * 2} packets"


def _name(slot: Slot) -> str:
    return f'"{slot.router_interface}"'


def _elements(values: Sequence[object], *, keyword: str = "elements = ") -> str:
    """`elements = { … };` for a set's definition, `{ … }` for a command; nothing when there are none."""
    if not values:
        return ""
    listed = "{ " + ", ".join(str(value) for value in values) + " }"
    return f"{keyword}{listed};" if keyword else listed
