"""Slots made and unmade, several at a time: namespace, pair to the router, addresses, and the right to speak."""

import asyncio
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from innkeeper.host.linux import netns, nftables
from innkeeper.host.network import firewall
from innkeeper.host.network.addressing import ServerPlan, Slot
from innkeeper.host.network.firewall import Limited
from innkeeper.host.network.router import NO_IPV6

NO_LIMITS: Mapping[int, Limited] = MappingProxyType({})


async def create(plan: ServerPlan, slots: Sequence[Slot], *, mtu: int) -> None:
    """Make these slots, with the internet policy. Raises CommandFailed, and then none of them is left.

    A slot is used once: gVisor moves the address out of the namespace when it starts, and whatever a guest did to its
    interface must not greet the next one.
    """
    try:
        await netns.ip_batch([line for slot in slots for line in _router_lines(slot, mtu)], inside=plan.router_netns)
        await asyncio.gather(*(_arm(slot) for slot in slots))
        # Last: nobody is inside yet, and what is half made stays silent.
        await nftables.apply(firewall.add_slots(slots, online=slots), inside=plan.router_netns)
    except BaseException:
        await asyncio.shield(destroy(plan, slots))
        raise


async def destroy(plan: ServerPlan, slots: Sequence[Slot], *, limited: Mapping[int, Limited] = NO_LIMITS) -> None:
    """Unmake these slots, of which some have policies of their own, however much of them exists. Raises CommandFailed when the router refuses."""
    if not slots:
        return
    if netns.exists(plan.router_netns):
        await nftables.apply(firewall.remove_slots(slots, limited=limited), inside=plan.router_netns)
        # Only links that exist fail to be deleted silently, hence -force; a pair goes with either end.
        lines = [f"link del {slot.router_interface}" for slot in slots]
        await netns.ip_batch(lines, inside=plan.router_netns, force=True)
    for slot in slots:
        await netns.delete(slot.netns)


def _router_lines(slot: Slot, mtu: int) -> list[str]:
    end = slot.router_interface
    return [
        f"netns add {slot.netns}",
        f"link add {end} address {slot.gateway_mac} mtu {mtu} type veth "
        f"peer name {slot.guest_interface} address {slot.mac} mtu {mtu} netns {slot.netns}",
        f"addr add {slot.gateway_ip}/{slot.prefix_length} dev {end}",
        f"link set {end} up",
        # Written down, so that no ARP answer of a guest can change it.
        f"neigh replace {slot.guest_ip} lladdr {slot.mac} dev {end} nud permanent",
    ]


async def _arm(slot: Slot) -> None:
    netns.write_sysctls(slot.netns, NO_IPV6, ignore_missing=True)
    end = slot.guest_interface
    await netns.ip_batch(
        [
            "link set lo up",
            f"addr add {slot.guest_ip}/{slot.prefix_length} dev {end}",
            f"link set {end} up",
            f"neigh replace {slot.gateway_ip} lladdr {slot.gateway_mac} dev {end} nud permanent",
            f"route add default via {slot.gateway_ip} dev {end}",
        ],
        inside=slot.netns,
    )
