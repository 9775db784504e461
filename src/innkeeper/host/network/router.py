"""The router namespace of one server: made, adopted after a crash, and taken away with everything attached to it."""

import asyncio
import contextlib
import fcntl
import json
import os
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, ip_network
from pathlib import Path
from typing import Any

import structlog

from innkeeper.host.linux import netns, nftables
from innkeeper.host.network import firewall
from innkeeper.host.network.addressing import ServerPlan, Slot, choose_subnet
from innkeeper.host.network.firewall import TABLE, UPLINK, FirewallLimits
from innkeeper.host.network.upstream import HostUpstreams

log = structlog.stdlib.get_logger(__name__)

PLAN_FILE = "network.json"
_LOCK = Path("/run/innkeeper-network.lock")

# Guests have no IPv6 anywhere on their way.
NO_IPV6 = {"net/ipv6/conf/all/disable_ipv6": "1", "net/ipv6/conf/default/disable_ipv6": "1"}
_ROUTER_SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    # The kernel's own check of source addresses, behind the firewall's.
    "net/ipv4/conf/all/rp_filter": "1",
    "net/ipv4/conf/default/rp_filter": "1",
    # Answer ARP only for the address of the interface that asks: a guest learns of no other one.
    "net/ipv4/conf/all/arp_ignore": "1",
    "net/ipv4/conf/default/arp_ignore": "1",
    "net/ipv4/conf/all/arp_announce": "2",
    "net/ipv4/conf/all/accept_redirects": "0",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
    "net/ipv4/conf/all/accept_source_route": "0",
    # Pieces of packets wait this many seconds for the rest. With the firewall's limit a guest holds at most 700 of them, 1 MB of 4.
    "net/ipv4/ipfrag_time": "5",
    # Refusals are ICMP errors; the default of one a second would turn every second one into a timeout.
    "net/ipv4/icmp_ratelimit": "0",
}


@dataclass(frozen=True, slots=True)
class Found:
    """What was there when the router was opened."""

    adopted: bool
    slots: tuple[Slot, ...]
    """Complete slots of an earlier run: namespace and link to the router both exist."""
    broken: tuple[Slot, ...]
    """Namespaces of slots that lost their link."""
    online: frozenset[int]
    """Indices of the complete slots that had the internet policy."""
    enabled_ip_forward: bool
    """Whether forwarding was off on this host and was turned on. It stays on: others may rely on it by then."""


async def open_plan(
    server_id: str, run_directory: Path, *, subnet: IPv4Network | None, host_netns: str | None
) -> ServerPlan:
    """The server's plan: the one kept from an earlier run while its router exists or nothing contradicts it.

    Call under `one_at_a_time`, until the route of the new subnet shows. Raises NoFreeSubnetError.
    """
    kept = _read_subnet(run_directory / PLAN_FILE)
    if kept is not None and subnet in (None, kept):
        plan = ServerPlan(server_id, kept)
        if netns.exists(plan.router_netns):
            return plan
        if not any(kept.overlaps(taken) for taken in await _taken(plan, host_netns) if taken.prefixlen):
            return plan
    if subnet is None:
        any_plan = ServerPlan(server_id, IPv4Network("10.0.0.0/20"))
        subnet = choose_subnet(server_id, await _taken(any_plan, host_netns))
    plan = ServerPlan(server_id, subnet)
    if netns.exists(plan.router_netns):  # its addresses are not known any more, or no longer wanted
        await remove(plan, host_netns=host_netns)
    _keep_subnet(run_directory, subnet)
    return plan


@contextlib.asynccontextmanager
async def one_at_a_time() -> AsyncIterator[None]:
    """Keep other servers of this machine from choosing a subnet at the same moment."""
    fd = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(0.05)
        yield
    finally:
        os.close(fd)


async def bring_up(plan: ServerPlan, limits: FirewallLimits, *, host_netns: str | None) -> Found:
    """Make the router, or adopt the one that is there: its rules are replaced in one transaction, guests stay online.

    Raises CommandFailed.
    """
    found = await _inspect(plan, host_netns)
    if not found.adopted:
        await remove(plan, host_netns=host_netns)
        mtu = await uplink_mtu(host_netns)
        await netns.ip_batch(
            [
                f"netns add {plan.router_netns}",
                f"link add {plan.uplink} mtu {mtu} type veth peer name {UPLINK} mtu {mtu} netns {plan.router_netns}",
            ],
            inside=host_netns,
        )
    # Before any interface is up: without IPv6 there is no link-local address to begin with.
    netns.write_sysctls(host_netns, {f"net/ipv6/conf/{plan.uplink}/disable_ipv6": "1"}, ignore_missing=True)
    netns.write_sysctls(plan.router_netns, NO_IPV6, ignore_missing=True)
    netns.write_sysctls(plan.router_netns, _ROUTER_SYSCTLS)
    online = [slot for slot in found.slots if slot.index in found.online]
    rules = firewall.router_ruleset(plan, limits, slots=found.slots, online=online)
    await nftables.apply(rules, inside=plan.router_netns)
    await nftables.apply(firewall.host_ruleset(plan, limits), inside=host_netns)
    await netns.ip_batch(
        [
            "link set lo up",
            f"addr replace {plan.resolver_ip}/32 dev lo",
            f"addr replace {plan.uplink_router_ip}/30 dev {UPLINK}",
            f"link set {UPLINK} up",
        ],
        inside=plan.router_netns,
    )
    await netns.ip_batch(
        [
            f"addr replace {plan.uplink_host_ip}/30 dev {plan.uplink}",
            f"link set {plan.uplink} up",
            f"route replace {plan.subnet} via {plan.uplink_router_ip} dev {plan.uplink}",
        ],
        inside=host_netns,
    )
    await netns.ip_batch([f"route replace default via {plan.uplink_host_ip}"], inside=plan.router_netns)
    enabled = netns.read_sysctl(host_netns, "net/ipv4/ip_forward") == "0"
    if enabled:
        netns.write_sysctls(host_netns, {"net/ipv4/ip_forward": "1"})
        log.warning("turned on net.ipv4.ip_forward, which guests need; it stays on")
    return Found(found.adopted, found.slots, found.broken, found.online, enabled)


async def remove(plan: ServerPlan, *, host_netns: str | None) -> None:
    """Take away the router, every slot, the uplink and the host's table; harmless when they are gone."""
    # Deleting one end of a pair deletes both; a namespace may live on for a moment through a process inside it.
    await netns.ip_batch([f"link del {plan.uplink}"], inside=host_netns, force=True)
    for name in [*netns.names(plan.slot_netns_prefix), plan.router_netns]:
        await netns.delete(name)
    await nftables.delete_table("inet", plan.host_table, inside=host_netns)


async def uplink_mtu(host_netns: str | None) -> int:
    """The MTU of the host's default route, so that guests send nothing that the way out cannot carry; else 1500."""
    routes = await _json(["ip", "-j", "-4", "route", "show", "default"], host_netns)
    for route in routes:
        links = await _json(["ip", "-j", "link", "show", "dev", route["dev"]], host_netns) if "dev" in route else []
        for link in links:
            return max(576, min(int(link["mtu"]), 9000))
    return 1500


async def _inspect(plan: ServerPlan, host_netns: str | None) -> Found:
    nothing = Found(False, (), (), frozenset(), False)
    if not netns.exists(plan.router_netns):
        return nothing
    outside = await netns.run_inside(host_netns, ["ip", "link", "show", "dev", plan.uplink], check=False)
    inside = await netns.run_inside(plan.router_netns, ["ip", "-j", "link", "show"], check=False)
    links = {link["ifname"] for link in json.loads(inside.stdout or b"[]")} if inside.returncode == 0 else set()
    if outside.returncode != 0 or UPLINK not in links:
        return nothing
    present = slots_present(plan)
    complete = tuple(slot for slot in present if slot.router_interface in links)
    names = await nftables.set_elements("ip", TABLE, "online", inside=plan.router_netns)
    # One with a policy of its own stays closed until whoever knows that policy adopts it.
    limited = await nftables.set_elements("ip", TABLE, "limited", inside=plan.router_netns)
    online = frozenset(
        slot.index for slot in complete if slot.router_interface in names and slot.router_interface not in limited
    )
    return Found(True, complete, tuple(slot for slot in present if slot not in complete), online, False)


async def slots_in_firewall(plan: ServerPlan) -> set[int]:
    """The slots that the router's sets name, whether their namespaces exist or not."""
    if not netns.exists(plan.router_netns):
        return set()
    found = set()
    for entry in await nftables.list_ruleset(inside=plan.router_netns):
        for element in entry.get("set", {}).get("elem", ()):
            # The name alone, or joined with the addresses that go with it.
            parts = element["concat"] if isinstance(element, dict) and "concat" in element else [element]
            name = parts[0]
            if isinstance(name, str) and name[:1] == "s" and name[1:].isdecimal():
                found.add(int(name[1:]))
    return found


def known_plan(server_id: str, run_directory: Path) -> ServerPlan | None:
    """The plan that an earlier run of the server kept, or None."""
    subnet = _read_subnet(run_directory / PLAN_FILE)
    return None if subnet is None else ServerPlan(server_id, subnet)


def slots_present(plan: ServerPlan) -> list[Slot]:
    """The slots whose namespaces exist."""
    candidates: Iterable[Slot | None] = map(plan.slot_of_netns, netns.names(plan.slot_netns_prefix))
    return [slot for slot in candidates if slot is not None]


async def _taken(plan: ServerPlan, host_netns: str | None) -> list[IPv4Network]:
    """What the guests' subnet must not overlap: routes in every table (but our own), and name servers."""
    taken = []
    for route in await _json(["ip", "-j", "-4", "route", "show", "table", "all"], host_netns):
        if route.get("dev") != plan.uplink and route.get("dst", "default") != "default":
            with contextlib.suppress(ValueError):
                taken.append(ip_network(route["dst"], strict=False))
    for upstream in HostUpstreams()():
        with contextlib.suppress(ValueError):
            taken.append(ip_network(upstream.host))
    return [network for network in taken if isinstance(network, IPv4Network)]


def _read_subnet(path: Path) -> IPv4Network | None:
    try:
        return IPv4Network(json.loads(path.read_text())["subnet"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep_subnet(run_directory: Path, subnet: IPv4Network) -> None:
    run_directory.mkdir(parents=True, exist_ok=True)
    fresh = run_directory / f"{PLAN_FILE}.new"
    fresh.write_text(json.dumps({"subnet": str(subnet)}) + "\n")
    fresh.replace(run_directory / PLAN_FILE)


async def _json(argv: list[str], host_netns: str | None) -> list[dict[str, Any]]:
    completed = await netns.run_inside(host_netns, argv)
    objects: list[dict[str, Any]] = json.loads(completed.stdout or b"[]")
    return objects
