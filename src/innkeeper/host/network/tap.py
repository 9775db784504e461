"""A microVM's end of its slot: a tap in the router's namespace, in place of the pair that joins the slot's own namespace to the router.

It has the name, addresses and neighbour of the router's end of that pair, so every rule of the firewall holds for it as it is: what a guest sends with a
hardware or IP address that is not its own is dropped on arrival. Nothing of the guest's network is in the namespace that its QEMU runs in.
"""

from __future__ import annotations

import fcntl
import os
import struct

from innkeeper.host.linux import netns
from innkeeper.host.network.addressing import ServerPlan, Slot

TUN_DEVICE = "/dev/net/tun"
TUNSETIFF = 0x400454CA
# Frames of Ethernet, without a header of the kernel's own, and with one of virtio's, by which large packets cross in one piece.
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


async def open_tap(plan: ServerPlan, slot: Slot, *, mtu: int) -> int:
    """The guest's end of a slot in use, as a descriptor that the caller closes.

    The interface is gone when the last descriptor is: a machine that ends takes it along. Raises OSError, CommandFailed; the slot is of no use then.
    """
    # Both ends go with the one.
    await netns.ip_batch([f"link del {slot.router_interface}"], inside=plan.router_netns, force=True)
    descriptor = netns.call_inside(plan.router_netns, lambda: _make(slot.router_interface))
    try:
        end = slot.router_interface
        await netns.ip_batch(
            [
                f"link set {end} address {slot.gateway_mac} mtu {mtu}",
                f"addr add {slot.gateway_ip}/{slot.prefix_length} dev {end}",
                f"link set {end} up",
                f"neigh replace {slot.guest_ip} lladdr {slot.mac} dev {end} nud permanent",
            ],
            inside=plan.router_netns,
        )
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _make(name: str) -> int:
    descriptor = os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        # Made where the thread is; the descriptor works anywhere.
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
